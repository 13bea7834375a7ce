"""What knobs raise, and what they expect to be raised of a model they ask for."""


class KnobError(ValueError):
    """A knob value that this model cannot take; the message says which values it can."""


class UnusableModel(Exception):
    """A model that cannot be found or described; the message names the place and the remedy."""
