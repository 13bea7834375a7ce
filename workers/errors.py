"""Everything that can go wrong on a worker, as a tree; what a task meets becomes a row with a status and a reason.

WorkerError
├── ModelError      a model that cannot be found, described or loaded: every task of that model fails
├── DatasetError    a data set that cannot be read: every task of that data set fails
│   └── NotDownloaded   a hub data set that is not on this machine, where the network was not to be asked
├── SampleError     one sample that cannot be used: that sample's row fails, the others go on
├── RowMismatch     a data set that is no longer the one the plan saw: the task fails
└── DeviceError     a worker that does not see the device it was started for: it never takes a task

knobs.errors.KnobError (a value this model cannot take) stands beside it: `knobs` knows nothing of workers.
"""

from knobs.errors import UnusableModel


class WorkerError(Exception):
    """Base of all; the message is one line that names the place and the remedy."""


class ModelError(WorkerError, UnusableModel):
    """A model that cannot be found, described or loaded."""


class DatasetError(WorkerError):
    """A data set that cannot be read."""


class NotDownloaded(DatasetError):
    """A hub data set that is not on this machine, where the network was not to be asked."""


class SampleError(WorkerError):
    """A sample that cannot be used."""


class RowMismatch(WorkerError):
    """A data set whose content differs from what the plan fingerprinted."""


class DeviceError(WorkerError):
    """A worker that does not see the device it was started for."""
