"""Which blocks run when a sweep asks for a number of them: the first ones, by scores, or the best set of a search."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pandas as pd

from knobs.block_tree import Blocks
from knobs.blocks import prefix_blocks
from knobs.errors import KnobError
from knobs.importance import BlockScores, select_blocks
from knobs.score_files import read_scores, write_scores
from orchestrator.block_questions import Question, blocks_kept, counts_to_choose, known_values, questions
from orchestrator.plan import BlockChoice, FirstBlocks, PlannedDataset, PlannedModel
from orchestrator.spec import SpecError, Sweep
from workers.tasks import Task

if TYPE_CHECKING:
    from orchestrator.record import Recorder


@dataclass(frozen=True)
class HighestScores:
    """The blocks of the highest scores, and those that are always kept."""

    scores: BlockScores
    keep: Sequence[int]

    def blocks(self, count: int) -> tuple[int, ...]:
        return select_blocks(self.scores, count, self.keep)

    def is_unclear(self, count: int) -> bool:
        """Whether the least important block that runs and the most important one that does not are as good as equal."""
        chosen = [block for block in self.blocks(count) if block not in self.keep]
        left_out = [block for block in range(self.scores.num_blocks) if block not in {*chosen, *self.keep}]
        if not chosen or not left_out:
            return False
        worst = min(chosen, key=lambda block: self.scores.scores[block])
        best = max(left_out, key=lambda block: self.scores.scores[block])
        errors = [self.scores.standard_errors[block] or 0.0 for block in (worst, best)]
        return self.scores.scores[worst] - self.scores.scores[best] <= math.hypot(*errors)


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


@dataclass(frozen=True)
class StandIn:
    """The first blocks, until a choice is made, where `keep` allows so few."""

    num_blocks: int
    kept: frozenset[int]

    def blocks(self, count: int) -> tuple[int, ...]:
        if count < len(self.kept):
            raise KnobError(_too_few(count, self.kept))
        return prefix_blocks(count, self.num_blocks)


@dataclass(frozen=True)
class Choices:
    """What came of choosing: the choice for every model, by `PlannedModel.network`, and whether anything failed."""

    by_model: Mapping[str, BlockChoice]
    failed: bool


class Unfinished(Exception):
    """Tasks are left that a choice rests on; the same command goes on from there."""


def choices_known(sweep: Sweep, models: Sequence[PlannedModel]) -> dict[str, BlockChoice]:
    """The choice for every model, by `PlannedModel.network`, that needs nothing measured: first blocks or a score file.

    Where something has to be measured, a stand-in.

    Raises:
        SpecError: the score file cannot be read, or is not for this model; a block to keep that a model lacks.
    """
    selection = sweep.block_selection
    found: dict[str, BlockChoice] = {}
    for model in models:
        num_blocks = model.card.num_blocks
        if selection.method == "prefix":
            found[model.network] = FirstBlocks(num_blocks)
        elif selection.method != "importance":
            found[model.network] = StandIn(num_blocks, blocks_kept(sweep, model))
        else:
            kept = blocks_kept(sweep, model)
            try:
                scores = read_scores(_score_file(sweep, model.card.name), num_blocks, model.card.fingerprint)
            except KnobError as error:
                raise SpecError([sweep.problem("block_selection.scores", str(error))]) from None
            found[model.network] = HighestScores(scores, tuple(sorted(kept)))
    return found


def choose_blocks(
    sweep: Sweep,
    models: Sequence[PlannedModel],
    datasets: Sequence[PlannedDataset],
    root: Path,
    measure: Callable[[Sequence[Task]], Recorder],
    report: Callable[[str], None] = print,
) -> Choices:
    """Measure what has to be known, choose, and write down what it came to.

    All models are asked about side by side, a round after the other.

    Args:
        root: the result folder; scores and sets go below it, into `block_scores`.
        measure: runs tasks.
        report: is told every choice, in a line.

    Raises:
        SpecError: see `questions` and `choices_known`.
        Unfinished: tasks are left, because the run was interrupted.
    """
    asked = questions(sweep, models, datasets)
    found = choices_known(sweep, models)
    rows: dict[str, pd.DataFrame] = {question.name: pd.DataFrame() for question in asked}
    failed = False
    waiting = []
    for question in asked:
        if reason := question.cannot_be_asked():
            found[question.model.network] = NotChosen(reason)
        else:
            waiting.append(question)
    while waiting:
        rounds = {question.name: question.tasks(rows[question.name]) for question in waiting}
        measured, failures, some_failed = _measured([t for tasks in rounds.values() for t in tasks], measure)
        failed |= some_failed
        again = []
        for question in waiting:
            ids = {task.task_id for task in rounds[question.name]}
            reasons = failures.loc[failures["task_id"].isin(ids), "reason"] if len(failures) else failures
            mine = measured[measured["task_id"].isin(ids)]
            rows[question.name] = pd.concat([rows[question.name], mine], ignore_index=True)
            if len(reasons):
                found[question.model.network] = NotChosen(f"its blocks could not be chosen: {reasons.iloc[0]}")
            elif any(task.task_id not in ids for task in question.tasks(rows[question.name])):
                again.append(question)
                continue
            else:
                # Nothing further is asked, or the same again, because samples have failed.
                found[question.model.network] = _concluded(question, rows[question.name], root)
            report(
                _in_a_line(
                    question, found[question.model.network], counts_to_choose(sweep, question.model.card.num_blocks)
                )
            )
        waiting = again
    return Choices(found, failed or any(isinstance(choice, NotChosen) for choice in found.values()))


def _measured(
    tasks: Sequence[Task], measure: Callable[[Sequence[Task]], Recorder]
) -> tuple[pd.DataFrame, pd.DataFrame, bool]:
    """Rows of the tasks, why tasks failed, and whether any task or row did. A part found damaged is measured again."""
    for _ in range(2):
        recorder = measure(tasks)
        rows, failures = recorder.importance_rows(), recorder.failures()
        if not recorder.todo():  # asked last: reading may find a part that is damaged
            return rows, failures, bool(len(failures) or recorder.failed_rows())
    raise Unfinished("interrupted while blocks were chosen")


def _in_a_line(question: Question, choice: BlockChoice, counts: Sequence[int]) -> str:
    """What was chosen, on what, and whether the scores could tell."""
    if isinstance(choice, NotChosen):
        return f"blocks   {question}: {choice.reason}"
    chosen, unclear = [], []
    for count in sorted(set(counts)):
        try:
            chosen.append(f"{count} are {', '.join(map(str, choice.blocks(count)))}")
        except KnobError:
            continue  # it is skipped, and the plan says why
        if isinstance(choice, HighestScores) and choice.is_unclear(count):
            unclear.append(count)
    line = f"blocks   {question}: of {question.model.card.num_blocks}, {'; '.join(chosen)}"
    if unclear:
        line += f"; for {', '.join(map(str, unclear))} the scores on both sides of the cut are within a standard error"
    return line


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
            found[question.model.network] = known
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
    """What an earlier run has come to; None if there is nothing, or nothing that can be read: then it is made again."""
    path = _record_path(question, root)
    try:
        if question.search is None:
            return HighestScores(read_scores(path, question.model.card.num_blocks), question.keep)
        sets = json.loads(path.read_text())["sets"]
        return BestSets({len(entry["blocks"]): tuple(entry["blocks"]) for entry in sets})
    except (KnobError, OSError, ValueError, KeyError, TypeError):
        return None


def _record_path(question: Question, root: Path) -> Path:
    model = quote(question.model.card.name, safe="")
    kind, suffix = ("beam", ".json") if question.search is not None else (question.method.value, ".parquet")
    return root / "block_scores" / f"{model}-{kind}-{question.name[:12]}{suffix}"


def _best_sets(question: Question, rows: pd.DataFrame) -> list[dict[str, Any]]:
    assert question.search is not None
    values = known_values(rows)
    best = question.search.best(values)
    if not best:
        raise ValueError(f"no sample has a value of {question.method} for every block list of the first round")
    return [
        {"blocks": list(blocks), "value": values[blocks].mean, "standard_error": values[blocks].standard_error}
        for blocks in best.values()
    ]


def _too_few(count: int, kept: frozenset[int]) -> str:
    named = ", ".join(map(str, sorted(kept)))
    return f"active_blocks {count}: keep alone names {len(kept)} blocks ({named})"


def _score_file(sweep: Sweep, model: str) -> Path:
    """The score file of a model; `{model}` in its name stands for the model's, and it may lie beside the sweep."""
    named = Path(str(sweep.block_selection.scores).replace("{model}", model)).expanduser()
    beside = Path(sweep.file).parent / named
    return beside if beside.is_file() else named
