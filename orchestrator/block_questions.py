"""What has to be measured before blocks can be chosen: a question per model, and the tasks of its rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pandas as pd

from knobs.beam import BeamSearch, Value
from knobs.block_tree import Blocks, single_ablations
from knobs.blocks import refuse_blocks
from knobs.errors import KnobError
from knobs.importance import FIRST_AND_LAST, BlockScores, Method, kept_blocks
from knobs.vision import VisionSetting
from orchestrator.analysis.importance import block_scores, candidate_values
from orchestrator.plan import PlannedDataset, PlannedModel, digest, task_identity
from orchestrator.spec import SpecError, Sweep
from workers.tasks import Kind, Knobs, Protocol, Task

# Samples of one task: small, so that every worker gets some, and fixed, so that the task stays what it is when there
# are more workers or more samples.
SAMPLES_PER_TASK = 16
# Samples per forward pass; fixed, because it decides how answers are rounded, and so which task it is.
BATCH_SIZE = 8
DEFAULT_WIDTH = 3


@dataclass(frozen=True)
class Question:
    """What has to be measured before the blocks of one model can be chosen, round by round.

    Attributes:
        model, dataset: what is asked about; the choice rests on the samples `choosing` of the data set.
        method: what is measured; for a search, its objective.
        keep: blocks that are never left out; -1 is the last.
        search: its settings, or None where scores of single blocks decide.
    """

    sweep: str
    model: PlannedModel
    dataset: PlannedDataset
    method: Method
    keep: tuple[int, ...]
    search: BeamSearch | None
    name: str = field(init=False, default="")

    def __post_init__(self) -> None:
        about = [task_identity(task) for task in self.tasks(pd.DataFrame())]
        search = None if self.search is None else [self.search.width, self.search.depth]
        object.__setattr__(self, "name", digest([about, list(self.keep), search]))

    def tasks(self, rows: pd.DataFrame) -> list[Task]:
        """Tasks of the next round, given the rows so far; none when everything is known."""
        candidates = self._candidates(rows)
        if candidates is None:
            return []
        card, source = self.model.card, self.model.source
        knobs = Knobs(card.geometry.complete(VisionSetting()), card.moe_top_k, tuple(range(card.num_blocks)))
        scored = self.method is Method.ACCURACY_DROP
        protocol = Protocol(
            max_new_tokens=self.dataset.max_new_tokens if scored else 1,
            batch_size=BATCH_SIZE,
            metric=self.dataset.source.metric if scored else None,
        )
        samples = self.dataset.choosing
        made = []
        for begin in range(0, len(samples), SAMPLES_PER_TASK):
            chunk = samples[begin : begin + SAMPLES_PER_TASK]
            task = Task(
                "",
                "",
                Kind.IMPORTANCE,
                self.sweep,
                None,
                source,
                knobs,
                self.dataset.source,
                chunk,
                protocol,
                method=self.method.value,
                candidates=tuple(candidates),
            )
            made.append(replace(task, task_id=digest(task_identity(task))))
        return made

    def cannot_be_asked(self) -> str | None:
        """Why the model cannot run without single blocks, where the method has to try; None if it can."""
        if not (self.method.needs_ablation or self.search):
            return None
        card = self.model.card
        for blocks in single_ablations(card.num_blocks):
            if reason := refuse_blocks(blocks, card.num_blocks, card.stack):
                (left_out,) = set(range(card.num_blocks)) - set(blocks)
                return (
                    f"{self.method} leaves out one block at a time, and without block {left_out}: {reason}; name lists "
                    "of blocks, or use method activation or similarity"
                )
        return None

    def scores(self, rows: pd.DataFrame) -> BlockScores:
        """The score of every block, and what it rests on."""
        asked = str(len(self.dataset.choosing))
        about = {"model": self.model.card.fingerprint, "dataset": self.dataset.source.name, "samples_asked": asked}
        return block_scores(rows, self.method, self.model.card.num_blocks, about)

    def _candidates(self, rows: pd.DataFrame) -> list[Blocks] | None:
        if self.search is not None:
            return self.search.next_round(known_values(rows)) or None
        if len(rows):
            return None
        return single_ablations(self.model.card.num_blocks) if self.method.needs_ablation else []

    def __str__(self) -> str:
        scored = len(set(self.dataset.choosing) & set(self.dataset.samples))
        what = "beam search by " if self.search is not None else ""
        return (
            f"{self.model.card.name}: {what}{self.method} over {len(self.dataset.choosing)} samples of "
            f"{self.dataset.source.name}" + (f", {scored} of them among those scored" if scored else "")
        )


def known_values(rows: pd.DataFrame) -> dict[Blocks, Value]:
    """What the rows so far say of block lists; nothing where there is none."""
    return candidate_values(rows) if len(rows) else {}


def questions(sweep: Sweep, models: Sequence[PlannedModel], datasets: Sequence[PlannedDataset]) -> list[Question]:
    """What has to be measured first: a question per model that is asked for fewer blocks than it has.

    Raises:
        SpecError: the sweep selects blocks by a data set that it does not have, or keeps blocks that a model lacks.
    """
    selection = sweep.block_selection
    if not selection.num_samples:
        return []
    dataset = _dataset(sweep, datasets)
    found = []
    networks: dict[str, PlannedModel] = {}
    for model in models:
        networks.setdefault(model.network, model)  # engines are compared on the same blocks
    for model in networks.values():
        num_blocks = model.card.num_blocks
        kept = blocks_kept(sweep, model)
        counts = [level for level in counts_to_choose(sweep, num_blocks) if level >= len(kept)]
        if not counts:
            continue
        keep = tuple(sorted(kept))
        search = None
        if selection.method == "beam":
            search = BeamSearch(num_blocks, selection.width or DEFAULT_WIDTH, num_blocks - min(counts), keep)
        objective = selection.method if search is None else selection.objective or "nll"
        method = Method.ACCURACY_DROP if objective == "accuracy" else Method(objective)
        found.append(Question(sweep.name, model, dataset, method, keep, search))
    return found


def blocks_kept(sweep: Sweep, model: PlannedModel) -> frozenset[int]:
    """The blocks of a model that always run.

    Raises:
        SpecError: the model does not have one of them.
    """
    keep = sweep.block_selection.keep
    try:
        return kept_blocks(FIRST_AND_LAST if keep is None else keep, model.card.num_blocks)
    except KnobError as error:
        raise SpecError([sweep.problem("block_selection.keep", f"{model.card.name}: {error}")]) from None


def counts_to_choose(sweep: Sweep, num_blocks: int) -> list[int]:
    """Numbers of blocks that leave a choice."""
    return [level for level in sweep.knobs.active_blocks if isinstance(level, int) and level < num_blocks]


def _dataset(sweep: Sweep, datasets: Sequence[PlannedDataset]) -> PlannedDataset:
    """The data set that the choice rests on."""
    names = [dataset.source.name for dataset in datasets]
    wanted = sweep.block_selection.dataset or names[0]
    if wanted not in names:
        what = f"must be a data set of this sweep, {' or '.join(names)}, got {wanted!r}"
        raise SpecError([sweep.problem("block_selection.dataset", what)])
    return datasets[names.index(wanted)]
