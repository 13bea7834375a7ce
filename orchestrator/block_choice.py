"""Which blocks run when a sweep asks for a number of them: the first ones, by scores, or the best set of a search."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pandas as pd

from knobs.beam import BeamSearch, Value
from knobs.block_tree import Blocks, single_ablations
from knobs.blocks import refuse_blocks
from knobs.errors import KnobError
from knobs.importance import FIRST_AND_LAST, BlockScores, Method, kept_blocks, select_blocks
from knobs.score_files import read_scores, write_scores
from knobs.vision import VisionSetting
from orchestrator.analysis.importance import block_scores, candidate_values
from orchestrator.plan import BlockChoice, FirstBlocks, PlannedDataset, PlannedModel, digest, distinct, task_identity
from orchestrator.spec import BlockSelection, SpecError, Sweep
from workers.schema import Kind, Knobs, Protocol, Task

if TYPE_CHECKING:
    from orchestrator.record import Recorder

# Samples of one task: small, so that every worker gets some, and fixed, so that the task stays what it is when there
# are more workers or more samples.
SAMPLES_PER_TASK = 16
DEFAULT_WIDTH = 3


@dataclass(frozen=True)
class HighestScores:
    """The blocks of the highest scores, and those that are always kept."""

    scores: BlockScores
    keep: Sequence[int]

    def blocks(self, count: int) -> tuple[int, ...]:
        return select_blocks(self.scores, count, self.keep)


@dataclass(frozen=True)
class BestSets:
    """The best set of every size that a search has come to, by the number of blocks."""

    sets: Mapping[int, Blocks]

    def blocks(self, count: int) -> tuple[int, ...]:
        if count not in self.sets:
            raise KnobError(f"the search came to sets of {', '.join(map(str, sorted(self.sets)))} blocks, not {count}")
        return self.sets[count]


@dataclass(frozen=True)
class NotChosen:
    """No choice could be made; every number of blocks is skipped with the reason."""

    reason: str

    def blocks(self, count: int) -> tuple[int, ...]:
        raise KnobError(self.reason)


class Unfinished(Exception):
    """Tasks are left that a choice rests on; the same command goes on from there."""


@dataclass(frozen=True)
class Question:
    """What has to be measured before the blocks of one model can be chosen, round by round.

    Attributes:
        model, dataset: what is asked about; the choice rests on the samples `choosing` of the data set.
        method: what is measured; for a search, its objective.
        keep: blocks that are never left out; -1 is the last.
        search: its settings, or None where scores of single blocks decide.
        batch_size: samples per forward pass.
    """

    sweep: str
    model: PlannedModel
    dataset: PlannedDataset
    method: Method
    keep: tuple[int, ...]
    search: BeamSearch | None
    batch_size: int
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
            batch_size=self.batch_size,
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
                self.method.value,
                tuple(candidates),
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
        about = {"model": self.model.card.fingerprint, "dataset": self.dataset.source.name}
        return block_scores(rows, self.method, self.model.card.num_blocks, about)

    def _candidates(self, rows: pd.DataFrame) -> list[Blocks] | None:
        if self.search is not None:
            return self.search.next_round(_values(rows)) or None
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


def _values(rows: pd.DataFrame) -> dict[Blocks, Value]:
    return candidate_values(rows) if len(rows) else {}


def questions(sweep: Sweep, models: Sequence[PlannedModel], datasets: Sequence[PlannedDataset]) -> list[Question]:
    """What has to be measured first: a question per model that is asked for fewer blocks than it has.

    Raises:
        SpecError: the sweep selects blocks by a data set that it does not have, or keeps blocks that a model lacks.
    """
    selection = sweep.block_selection
    if selection.method in ("prefix", "importance"):
        return []
    dataset = _dataset(sweep, datasets)
    found = []
    for model in distinct(models).values():
        counts = _counts(sweep, model.card.num_blocks)
        if not counts:
            continue
        keep = FIRST_AND_LAST if selection.keep is None else selection.keep
        try:
            kept_blocks(keep, model.card.num_blocks)
            search = _search(selection, model.card.num_blocks, counts, keep)
        except KnobError as error:
            raise SpecError([sweep.problem("block_selection", f"{model.card.name}: {error}")]) from None
        objective = selection.method if search is None else selection.objective or "nll"
        method = Method.ACCURACY_DROP if objective == "accuracy" else Method(objective)
        batch_size = sweep.accuracy.batch_size if sweep.accuracy else 16
        found.append(Question(sweep.name, model, dataset, method, tuple(keep), search, batch_size))
    return found


def choices_known(sweep: Sweep, models: Sequence[PlannedModel]) -> dict[str, BlockChoice]:
    """The choice for every model, by `PlannedModel.key`, that needs nothing measured: first blocks, or a score file.

    Raises:
        SpecError: the score file cannot be read, or is not for this model.
    """
    selection = sweep.block_selection
    if selection.method != "importance":
        return {model.key: FirstBlocks(model.card.num_blocks) for model in models}
    found: dict[str, BlockChoice] = {}
    keep = FIRST_AND_LAST if selection.keep is None else selection.keep
    for model in models:
        path = _score_file(sweep, model.card.name)
        try:
            scores = read_scores(path, model.card.num_blocks, model.card.fingerprint)
            kept_blocks(keep, model.card.num_blocks)
        except KnobError as error:
            raise SpecError([sweep.problem("block_selection.scores", str(error))]) from None
        found[model.key] = HighestScores(scores, keep)
    return found


def choose_blocks(
    sweep: Sweep,
    models: Sequence[PlannedModel],
    datasets: Sequence[PlannedDataset],
    root: Path,
    measure: Callable[[Sequence[Task]], Recorder],
) -> dict[str, BlockChoice]:
    """The choice for every model, by `PlannedModel.key`; measures what has to be known and writes down the outcome.

    All models are asked about side by side, a round after the other.

    Args:
        root: the result folder; scores and sets go below it, into `block_scores`.
        measure: runs tasks.

    Raises:
        SpecError: see `questions` and `choices_known`.
        Unfinished: tasks are left, because the run was interrupted.
    """
    asked = questions(sweep, models, datasets)
    rows: dict[str, pd.DataFrame] = {question.name: pd.DataFrame() for question in asked}
    found = choices_known(sweep, models)
    for question in asked:
        if reason := question.cannot_be_asked():
            found[question.model.key] = NotChosen(reason)
    waiting = [question for question in asked if not question.cannot_be_asked()]
    while waiting:
        rounds = {question.name: question.tasks(rows[question.name]) for question in waiting}
        recorder = measure([task for tasks in rounds.values() for task in tasks])
        if recorder.todo():
            raise Unfinished("interrupted while blocks were chosen")
        measured, failures = recorder.importance_rows(), recorder.failures()
        again = []
        for question in waiting:
            ids = {task.task_id for task in rounds[question.name]}
            failed = failures[failures["task_id"].isin(ids)] if len(failures) else failures
            rows[question.name] = pd.concat(
                [rows[question.name], measured[measured["task_id"].isin(ids)]], ignore_index=True
            )
            if len(failed):
                found[question.model.key] = NotChosen(f"its blocks could not be chosen: {failed['reason'].iloc[0]}")
            elif any(task.task_id not in ids for task in question.tasks(rows[question.name])):
                again.append(question)
            else:
                # Nothing further is asked, or the same again, because samples have failed.
                found[question.model.key] = _concluded(question, rows[question.name], root)
        waiting = again
    return found


def choices_so_far(
    sweep: Sweep, models: Sequence[PlannedModel], datasets: Sequence[PlannedDataset], root: Path
) -> tuple[dict[str, BlockChoice], list[Question]]:
    """The choices that need nothing measured any more, and what is still to be asked; reads only, for a dry run.

    Raises:
        SpecError: see `questions` and `choices_known`.
    """
    found = choices_known(sweep, models)
    open_questions = []
    for question in questions(sweep, models, datasets):
        reason = question.cannot_be_asked()
        known = NotChosen(reason) if reason else _written_down(question, root)
        if known is None:
            open_questions.append(question)
        else:
            found[question.model.key] = known
    return found, open_questions


def _concluded(question: Question, rows: pd.DataFrame, root: Path) -> BlockChoice:
    """The choice that the rows of all rounds come to, written down under its identity."""
    path = _record_path(question, root)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place first: a reader, or a dry run, must never see half a file.
    unfinished = path.with_name(f".{path.name}.writing{path.suffix}")
    try:
        if question.search is None:
            scores = question.scores(rows)
            write_scores(unfinished, scores)
            choice: BlockChoice = HighestScores(scores, question.keep)
        else:
            sets = _best_sets(question, rows)
            unfinished.write_text(json.dumps({"about": str(question), "sets": sets}, indent=2) + "\n")
            choice = BestSets({len(entry["blocks"]): tuple(entry["blocks"]) for entry in sets})
    except ValueError as error:
        return NotChosen(f"its blocks could not be chosen: {error}")
    unfinished.replace(path)
    return choice


def _written_down(question: Question, root: Path) -> BlockChoice | None:
    path = _record_path(question, root)
    if not path.is_file():
        return None
    if question.search is None:
        return HighestScores(read_scores(path, question.model.card.num_blocks), question.keep)
    sets = json.loads(path.read_text())["sets"]
    return BestSets({len(entry["blocks"]): tuple(entry["blocks"]) for entry in sets})


def _record_path(question: Question, root: Path) -> Path:
    model = quote(question.model.card.name, safe="")
    kind, suffix = ("beam", ".json") if question.search is not None else (question.method.value, ".parquet")
    return root / "block_scores" / f"{model}-{kind}-{question.name[:12]}{suffix}"


def _best_sets(question: Question, rows: pd.DataFrame) -> list[dict[str, Any]]:
    assert question.search is not None
    values = _values(rows)
    best = question.search.best(values)
    if not best:
        raise ValueError(f"no sample has a value of {question.method} for every block list of the first round")
    return [
        {"blocks": list(blocks), "value": values[blocks].mean, "standard_error": values[blocks].standard_error}
        for blocks in best.values()
    ]


def _search(
    selection: BlockSelection, num_blocks: int, counts: Sequence[int], keep: Sequence[int]
) -> BeamSearch | None:
    if selection.method != "beam":
        return None
    # Numbers that keep forbids are skipped one by one, with the reason.
    removable = num_blocks - max(1, len(kept_blocks(keep, num_blocks)))
    depth = min(num_blocks - min(counts), removable)
    return BeamSearch(num_blocks, selection.width or DEFAULT_WIDTH, depth, tuple(keep))


def _counts(sweep: Sweep, num_blocks: int) -> list[int]:
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


def _score_file(sweep: Sweep, model: str) -> Path:
    """The score file of a model; `{model}` in its name stands for the model's, and it may lie beside the sweep."""
    named = Path(str(sweep.block_selection.scores).replace("{model}", model)).expanduser()
    beside = Path(sweep.file).parent / named
    return beside if beside.is_file() else named
