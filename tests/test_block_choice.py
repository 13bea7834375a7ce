"""Which blocks run when a sweep asks for a number of them: questions, rounds, files, and the whole through a sweep."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from ray.cluster_utils import Cluster
from tiny import picture

from knobs.errors import KnobError
from knobs.importance import BlockScores, Method, select_blocks
from knobs.score_files import read_scores, write_scores
from orchestrator.block_choice import (
    BestSets,
    HighestScores,
    NotChosen,
    Unfinished,
    choices_known,
    choices_so_far,
    choose_blocks,
)
from orchestrator.block_questions import SAMPLES_PER_TASK, Question, questions
from orchestrator.plan import FirstBlocks, PlannedDataset, PlannedModel, expand, make_plan
from orchestrator.resolve import planned_models, resolve
from orchestrator.run import DONE, SOME_FAILED, main
from orchestrator.spec import SpecError, Sweep, parse_sweep
from workers.session import Session
from workers.tasks import Kind, Task

ALL_SIX = (0, 1, 2, 3, 4, 5)
# What the pretended measurements say: how much the log-likelihood drops without each block, and what a pair loses more.
WORTH = {0: 9.0, 1: 0.5, 2: 3.0, 3: 0.1, 4: 2.0, 5: 9.0}


def sweep(selection: str, blocks: str = "[3, 4, 6]", models: str = "tiny-smolvlm", samples: int = 40) -> Sweep:
    return parse_sweep(
        f"name: example\nmodels: [{models}]\ndatasets: [{{name: demo, samples: {samples}}}]\n"
        f"knobs: {{active_blocks: {blocks}}}\nblock_selection: {selection}\n"
    )


def resolved(spec: Sweep) -> tuple[list[PlannedModel], list[PlannedDataset]]:
    cards, datasets = resolve(spec, offline=True)
    return planned_models(spec, cards, ["cpu"]), datasets


def asked(spec: Sweep) -> list[Question]:
    return questions(spec, *resolved(spec))


class Pretended:
    """What `choose_blocks` needs of a recorder, with rows made up from WORTH; counts what it was asked."""

    def __init__(self, tasks: Sequence[Task], failed: bool = False, left: bool = False) -> None:
        self.tasks, self.failed, self.left = tasks, failed, left

    def todo(self) -> list[Task]:
        return list(self.tasks) if self.left else []

    def failed_rows(self) -> int:
        return 0

    def failures(self) -> pd.DataFrame:
        failed = [{"task_id": self.tasks[0].task_id, "reason": "out of memory"}] if self.failed else []
        return pd.DataFrame(failed, columns=["task_id", "reason"])

    def importance_rows(self) -> pd.DataFrame:
        rows = [
            {
                "task_id": task.task_id,
                "sample_id": ref.uid,
                "image_id": ref.uid,
                "blocks": list(blocks),
                # Worthless alone, 1 and 3 stand in for one another: without both, much is lost.
                "value": -sum(WORTH[b] for b in ALL_SIX if b not in blocks)
                - (20.0 if not {1, 3} & set(blocks) else 0.0)
                + position / 100,
            }
            for task in self.tasks
            for position, ref in enumerate(task.samples)
            for blocks in task.candidates or [(block,) for block in ALL_SIX]
        ]
        return pd.DataFrame(rows)


SAID: list[str] = []  # the lines of the last choice


def choose(
    spec: Sweep, root: Path, recorder: Callable[..., Any] = Pretended
) -> tuple[dict[str, Any], list[Sequence[Task]]]:
    rounds: list[Sequence[Task]] = []

    def measure(tasks: Sequence[Task]) -> Any:
        rounds.append(tasks)
        return recorder(tasks)

    said: list[str] = []
    choices = choose_blocks(spec, *resolved(spec), root, measure, said.append)
    assert len(said) == len(asked(spec))
    SAID[:] = said
    return dict(choices.by_model), rounds


# -- what is asked ----------------------------------------------------------------------------------------------------


def test_nothing_is_asked_where_nothing_is_left_to_choose() -> None:
    assert asked(sweep("{}")) == []
    assert asked(sweep("{method: nll}", blocks="[6, [0, 2]]")) == []
    assert asked(sweep("{method: nll}", blocks="[8]")) == []  # a number it does not have is skipped by the plan
    assert len(asked(sweep("{method: nll}"))) == 1


def test_one_question_per_model_whatever_entries_leave_out() -> None:
    spec = sweep("{method: nll}", models="tiny-smolvlm, {name: tiny-smolvlm, dtype: float32}, tiny-internvl")
    assert [question.model.card.name for question in asked(spec)] == ["tiny-smolvlm", "tiny-internvl"]


def test_engines_and_back_ends_are_compared_on_the_same_blocks(tmp_path: Path) -> None:
    """Blocks are measured once, and rounding under another back-end gives no other choice."""
    models = "{name: tiny-smolvlm, engine: [eager, graph], attention: [sdpa, eager], dtype: [float32, bfloat16]}"
    spec = sweep("{method: nll, samples: 40}", models=models)
    assert len(asked(spec)) == 1
    choices, _ = choose(spec, tmp_path)
    planned, datasets = resolved(spec)
    plan = make_plan(spec, planned, datasets, ["cpu"], choices)
    assert len({combination.model for combination in plan.combinations}) == 8
    assert {c.knobs.active_blocks for c in plan.combinations} == {(0, 2, 5), (0, 2, 4, 5), ALL_SIX}


def test_tasks_are_cut_by_samples_and_hold_every_candidate() -> None:
    (question,) = asked(sweep("{method: nll, samples: 40}"))
    tasks = question.tasks(pd.DataFrame())
    assert [len(task.samples) for task in tasks] == [SAMPLES_PER_TASK, SAMPLES_PER_TASK, 8]
    assert {task.kind for task in tasks} == {Kind.IMPORTANCE}
    for task in tasks:
        assert (task.accelerator, task.method, task.knobs.active_blocks) == (None, "nll", ALL_SIX)
        assert sorted(task.candidates) == sorted([ALL_SIX, *itertools.combinations(ALL_SIX, 5)])
    (similarity,) = asked(sweep("{method: similarity, samples: 40}"))
    assert {task.candidates for task in similarity.tasks(pd.DataFrame())} == {()}


def test_more_samples_leave_the_first_tasks_what_they_were() -> None:
    (few,), (many,) = (asked(sweep(f"{{method: nll, samples: {n}}}")) for n in (32, 40))
    ids = [task.task_id for task in many.tasks(pd.DataFrame())]
    assert [task.task_id for task in few.tasks(pd.DataFrame())] == ids[:2]
    assert few.name != many.name


@pytest.mark.parametrize(
    "changed",
    [
        sweep("{method: accuracy_drop}"),
        sweep("{method: nll, samples: 50}"),
        sweep("{method: nll}", models="tiny-internvl"),
        sweep("{method: nll, keep: [0]}"),
        sweep("{method: similarity}"),
        sweep("{method: beam}"),
        sweep("{method: beam, width: 4}"),
        sweep("{method: beam, objective: accuracy}"),
        sweep("{method: beam}", blocks="[5]"),
    ],
    ids=lambda spec: str(spec.block_selection),
)
def test_every_setting_is_part_of_the_identity(changed: Sweep) -> None:
    (question,) = asked(sweep("{method: nll}"))
    (other,) = asked(changed)
    assert other.name != question.name


def test_blocks_are_chosen_on_samples_that_are_not_scored_as_far_as_there_are_any() -> None:
    (question,) = asked(sweep("{method: nll, samples: 40}", samples=40))
    dataset = question.dataset
    assert len(dataset.samples) == len(dataset.choosing) == 40
    assert not set(dataset.samples) & set(dataset.choosing)
    assert str(question) == "tiny-smolvlm: nll over 40 samples of demo"
    (short,) = asked(sweep("{method: nll, samples: 40}", samples=80))  # 96 in all
    assert len(set(short.dataset.choosing) & set(short.dataset.samples)) == 24
    assert str(short).endswith("over 40 samples of demo, 24 of them among those scored")
    # Scoring more later leaves the question what it was.
    assert short.name == question.name
    assert [t.task_id for t in short.tasks(pd.DataFrame())] == [t.task_id for t in question.tasks(pd.DataFrame())]
    everything = parse_sweep(
        "name: a\nmodels: [tiny-smolvlm]\ndatasets: [demo]\nknobs: {active_blocks: [3]}\n"
        "block_selection: {method: nll, samples: 5}\n"
    )
    (question,) = asked(everything)
    assert question.dataset.choosing == question.dataset.samples[:-6:-1]


def test_a_data_set_that_the_sweep_does_not_have() -> None:
    with pytest.raises(SpecError, match=r"block_selection\.dataset: must be a data set of this sweep, demo, got"):
        asked(sweep("{method: nll, dataset: pope}"))


def test_a_block_to_keep_that_the_model_does_not_have() -> None:
    with pytest.raises(SpecError, match=r"block_selection\.keep: tiny-smolvlm: keep 7: the model has blocks 0 to 5"):
        asked(sweep("{method: nll, keep: [0, 7]}"))


# -- what is chosen ---------------------------------------------------------------------------------------------------


def test_the_highest_scores_are_kept_with_first_and_last(tmp_path: Path) -> None:
    spec = sweep("{method: nll, samples: 40}")
    choices, rounds = choose(spec, tmp_path)
    ((_, choice),) = choices.items()
    assert isinstance(choice, HighestScores)
    assert choice.scores.scores == pytest.approx([WORTH[b] for b in ALL_SIX])
    assert (choice.scores.about["samples"], choice.scores.about["samples_asked"]) == ("40", "40")
    (line,) = SAID
    assert line == ("blocks   tiny-smolvlm: nll over 40 samples of demo: of 6, 3 are 0, 2, 5; 4 are 0, 2, 4, 5")
    assert [choice.blocks(n) for n in (3, 4, 6)] == [(0, 2, 5), (0, 2, 4, 5), ALL_SIX]
    assert len(rounds) == 1
    # Written down, and the next dry run knows it.
    (file,) = (tmp_path / "block_scores").iterdir()
    assert read_scores(file, 6).scores == choice.scores.scores
    known, unknown = choices_so_far(spec, *resolved(spec), tmp_path)
    assert unknown == []
    assert [found.blocks(4) for found in known.values()] == [(0, 2, 4, 5)]


def test_a_beam_finds_what_single_scores_cannot_see(tmp_path: Path) -> None:
    """1 and 3 are worth little each and much together: by scores both go, by the search one stays."""
    by_scores, _ = choose(sweep("{method: nll}"), tmp_path)
    assert [choice.blocks(4) for choice in by_scores.values()] == [(0, 2, 4, 5)]
    spec = sweep("{method: beam, width: 2}")
    choices, rounds = choose(spec, tmp_path)
    ((_, choice),) = choices.items()
    assert isinstance(choice, BestSets)
    assert [choice.blocks(n) for n in (3, 4, 5)] == [(0, 1, 5), (0, 1, 2, 5), (0, 1, 2, 4, 5)]
    assert len(rounds) == 3  # three blocks may go
    with pytest.raises(KnobError, match="the search came to sets of 3, 4, 5, 6 blocks, not 2"):
        choice.blocks(2)
    file = next((tmp_path / "block_scores").glob("*beam*.json"))
    assert [entry["blocks"] for entry in json.loads(file.read_text())["sets"]][1] == [0, 1, 2, 4, 5]
    known, unknown = choices_so_far(spec, *resolved(spec), tmp_path)
    assert (unknown, [found.blocks(3) for found in known.values()]) == ([], [(0, 1, 5)])


def test_activation_needs_no_candidates(tmp_path: Path) -> None:
    class Norms(Pretended):
        def importance_rows(self) -> pd.DataFrame:
            rows = super().importance_rows()
            return rows.assign(value=[WORTH[blocks[0]] for blocks in rows["blocks"]])

    choices, _ = choose(sweep("{method: activation, keep: []}"), tmp_path, Norms)
    assert [choice.blocks(2) for choice in choices.values()] == [(0, 5)]
    assert [choice.blocks(3) for choice in choices.values()] == [(0, 2, 5)]


def test_a_model_whose_tasks_fail_is_skipped_with_the_reason_and_others_go_on(tmp_path: Path) -> None:
    spec = sweep("{method: nll}", models="tiny-smolvlm, tiny-internvl")
    choices, _ = choose(spec, tmp_path, lambda tasks: Pretended(tasks, failed=True))
    failed, fine = choices.values()
    assert isinstance(failed, NotChosen)
    assert isinstance(fine, HighestScores)
    models, _ = resolved(spec)
    points = expand(spec, models[0].card, failed)
    assert [knobs.active_blocks for knobs in points.knobs] == [ALL_SIX]
    assert [str(skip) for skip in points.skips] == [
        f"tiny-smolvlm: active_blocks={n}: its blocks could not be chosen: out of memory" for n in (3, 4)
    ]


def test_an_interruption_decides_nothing(tmp_path: Path) -> None:
    with pytest.raises(Unfinished):
        choose(sweep("{method: nll}"), tmp_path, lambda tasks: Pretended(tasks, left=True))
    assert not (tmp_path / "block_scores").exists()


def test_fewer_blocks_than_are_kept_are_skipped(tmp_path: Path) -> None:
    spec = sweep("{method: nll}", blocks="[1, 3]")
    choices, _ = choose(spec, tmp_path)
    models, _ = resolved(spec)
    points = expand(spec, models[0].card, choices[models[0].network])
    assert [knobs.active_blocks for knobs in points.knobs] == [(0, 2, 5)]
    assert [skip.reason for skip in points.skips] == ["active_blocks 1: keep alone names 2 blocks (0, 5)"]


def test_scores_that_cannot_tell_are_said_to(tmp_path: Path) -> None:
    """Equal scores on both sides of the cut, and unequal ones within their errors."""

    class Equal(Pretended):
        def importance_rows(self) -> pd.DataFrame:
            return super().importance_rows().assign(value=1.0)

    choose(sweep("{method: nll}"), tmp_path, Equal)
    assert SAID[0].endswith("; for 3, 4 the scores on both sides of the cut are within a standard error")
    scores = BlockScores((9.0, 1.0, 2.0, 1.9, 0.5, 9.0), (0.1, 0.1, 0.1, 0.1, 0.1, 0.1))
    choice = HighestScores(scores, (0, 5))
    assert [choice.is_unclear(count) for count in (2, 3, 4, 5, 6)] == [False, True, False, False, False]


def test_a_part_that_turns_out_damaged_is_measured_again(tmp_path: Path) -> None:
    """Read first, asked second: what is left then must not pass for the whole."""
    seen: list[int] = []

    class Damaged(Pretended):
        def importance_rows(self) -> pd.DataFrame:
            seen.append(1)
            rows = super().importance_rows()
            self.left = len(seen) == 1
            return rows[rows["task_id"] != self.tasks[0].task_id] if self.left else rows

    choices, rounds = choose(sweep("{method: nll, samples: 40}"), tmp_path, Damaged)
    (choice,) = choices.values()
    assert (len(rounds), choice.scores.about["samples"]) == (2, "40")


@pytest.mark.parametrize("selection", ["{method: nll}", "{method: beam}"])
@pytest.mark.parametrize("content", ["", "garbage", '{"sets": ['])
def test_a_damaged_record_is_no_record(tmp_path: Path, selection: str, content: str) -> None:
    spec = sweep(selection)
    choose(spec, tmp_path)
    (file,) = (tmp_path / "block_scores").iterdir()
    file.write_text(content)
    known, unknown = choices_so_far(spec, *resolved(spec), tmp_path)
    assert len(unknown) == 1
    assert [choice.blocks(3) for choice in known.values()] == [(0, 1, 2)]  # stands in


def test_numbers_that_keep_forbids_are_not_measured_for(tmp_path: Path) -> None:
    spec = sweep("{method: nll, keep: [0, 1, 2, 3]}", blocks="[2, 3]")
    choices, rounds = choose(spec, tmp_path)
    assert rounds == []
    models, _ = resolved(spec)
    points = expand(spec, models[0].card, choices[models[0].network])
    assert [skip.reason for skip in points.skips] == [
        f"active_blocks {n}: keep alone names 4 blocks (0, 1, 2, 3)" for n in (2, 3)
    ]


# -- score files ------------------------------------------------------------------------------------------------------


def test_a_score_file_chooses_without_measuring(tmp_path: Path) -> None:
    scores = BlockScores(tuple(WORTH.values()), (None,) * 6)
    for name in ("tiny-smolvlm.json", "other.parquet"):
        write_scores(tmp_path / name, scores)
    for path in (tmp_path / "{model}.json", tmp_path / "other.parquet"):
        spec = sweep(f"{{method: importance, scores: '{path}'}}")
        (choice,) = choices_known(spec, resolved(spec)[0]).values()
        assert choice.blocks(4) == (0, 2, 4, 5)
        assert choose(spec, tmp_path)[1] == []


def test_a_score_file_that_is_not_for_the_model_is_an_error_at_its_line(tmp_path: Path) -> None:
    write_scores(tmp_path / "five.json", BlockScores((1.0,) * 5, (None,) * 5))
    for path, reason in [("five.json", "no score for block 5"), ("none.json", "no such file of block scores")]:
        spec = sweep(f"{{method: importance, scores: {tmp_path / path}}}")
        with pytest.raises(SpecError, match=rf"sweep.yaml:5: block_selection.scores: .*{path}: {reason}"):
            choices_known(spec, resolved(spec)[0])


def test_the_first_blocks_need_nothing() -> None:
    spec = sweep("{}")
    (choice,) = choices_known(spec, resolved(spec)[0]).values()
    assert choice == FirstBlocks(6)
    assert choice.blocks(4) == (0, 1, 2, 3)


# -- the whole --------------------------------------------------------------------------------------------------------

CHOSEN = """\
name: chosen
models: [tiny-qwen3-vl-moe]
datasets: [{{name: demo, samples: 4, max_new_tokens: 2}}]
knobs: {{active_blocks: [3, 6, [0, 1]]}}
block_selection: {selection}
latency: {{samples: 1, repeats: 1, output_tokens: 2}}
"""


def test_a_sweep_measures_then_chooses_then_runs(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(selection: str, *arguments: str) -> str:
        (tmp_path / "sweep.yaml").write_text(CHOSEN.format(selection=selection))
        given = [str(tmp_path / "sweep.yaml"), "--results", str(tmp_path), "--address", cluster.address]
        assert main([*given, *arguments]) == DONE
        return capsys.readouterr().out

    nll = "{method: nll, samples: 6}"
    dry = run(nll, "--dry-run")
    assert "note: blocks are chosen first, tiny-qwen3-vl-moe: nll over 6 samples of demo (1 task); until then" in dry
    out = run(nll)
    assert "choosing blocks of tiny-qwen3-vl-moe: 1 task of up to 7 block lists each; 0 done, 0 failed before" in out
    (file,) = (tmp_path / "chosen" / "block_scores").iterdir()
    scores = read_scores(file, 6)
    expected = select_blocks(scores, 3)
    assert all(error is not None and error > 0 for error in scores.standard_errors)
    rows = pd.read_parquet(tmp_path / "chosen" / "combinations")
    assert sorted(map(tuple, rows["active_blocks"])) == sorted([expected, ALL_SIX, (0, 1)])
    latency = pd.read_parquet(tmp_path / "chosen" / "latency")
    assert {tuple(blocks) for blocks in latency["active_blocks"]} == {expected, ALL_SIX, (0, 1)}

    # What the workers found is what a session finds, and what a task's row says of it.
    raw = pd.read_parquet(tmp_path / "chosen" / "importance")
    assert (set(raw["status"]), len(raw)) == ({"done"}, 6 * 7)
    tasks = pd.read_parquet(tmp_path / "chosen" / "tasks")
    assert (tasks["kind"] == "importance").sum() == 1

    # Again: nothing is measured; another sweep reuses the file; a dry run knows the blocks.
    assert "choosing blocks of tiny-qwen3-vl-moe: 1 task of up to 7 block lists each; 1 done, 0 failed before" in run(
        nll
    )
    assert f"active_blocks=3 [{', '.join(map(str, expected))}]".replace("0, 1,", "0-1,") in run(nll, "--dry-run")
    reused = run(f"{{method: importance, scores: {file}}}")
    assert "choosing blocks" not in reused
    assert "6 tasks: 3 latency, 3 accuracy; 6 done, 0 failed before, 0 to run" in reused


def test_a_session_measures_what_the_method_says(tmp_path: Path) -> None:
    spec = sweep("{method: accuracy_drop, samples: 4}", models="tiny-smolvlm")
    (question,) = asked(spec)
    (task,) = question.tasks(pd.DataFrame())
    result = Session("w").run(task)
    assert result.rows is not None, result.traceback
    frame = result.rows.to_pandas()
    assert set(frame["method"]) == {"accuracy_drop"}
    assert set(frame["value"]) <= {0.0, 1.0}
    assert len(frame) == 4 * 7
    for method in (Method.ACTIVATION, Method.SIMILARITY):
        (task,) = asked(sweep(f"{{method: {method}, samples: 4}}"))[0].tasks(pd.DataFrame())
        result = Session("w").run(task)
        assert result.rows is not None, result.traceback
        frame = result.rows.to_pandas()
        assert sorted(tuple(blocks) for blocks in frame["blocks"].drop_duplicates().map(tuple)) == [
            (block,) for block in ALL_SIX
        ]
        assert (frame["value"] > 0).all()


def questions_about_pictures(folder: Path, count: int, broken: Sequence[int] = ()) -> str:
    """Data of one's own, as the entry of a sweep; pictures named in `broken`, by their place in the draw, are cut."""
    lines = [{"image": f"{i}.png", "question": f"What is {i}?", "answers": ["red"], "id": str(i)} for i in range(count)]
    for i in range(count):
        picture(30, 40, seed=i).save(folder / f"{i}.png")
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    columns = "columns: {image: image, question: question, answers: answers, id: id}"
    entry = f"{{name: own, path: {folder / 'data.jsonl'}, metric: exact_match, {columns}"
    spec = parse_sweep(f"name: a\nmodels: [tiny-smolvlm]\ndatasets: [{entry}}}]\n")
    drawn = resolve(spec, offline=True)[1][0].samples
    for place in broken:
        file = folder / f"{drawn[place].uid.rsplit(':', 1)[-1]}.png"
        file.write_bytes(file.read_bytes()[:100])
    return entry


def test_a_broken_sample_is_a_failed_row_and_the_others_decide(tmp_path: Path) -> None:
    entry = questions_about_pictures(tmp_path, 4, broken=[1])
    spec = parse_sweep(
        f"name: a\nmodels: [tiny-smolvlm]\ndatasets: [{entry}}}]\nknobs: {{active_blocks: [3]}}\n"
        "block_selection: {method: nll}\n"
    )
    (question,) = asked(spec)
    (task,) = question.tasks(pd.DataFrame())
    result = Session("w").run(task)
    assert result.rows is not None, result.traceback
    frame = result.rows.to_pandas()
    failed = frame[frame["status"] == "failed"]
    assert list(failed["sample_id"]) == [task.samples[2].uid]  # the second drawn, the last but one chosen on
    assert "cannot be decoded" in failed["error"].iloc[0]
    scores = question.scores(frame[frame["status"] == "done"])
    assert scores.about["samples"] == "3"


def test_a_choice_that_nothing_is_left_for_ends_with_exit_code_1(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = questions_about_pictures(tmp_path, 3, broken=[2])  # the last one is chosen on
    (tmp_path / "sweep.yaml").write_text(
        f"name: chosen\nmodels: [tiny-smolvlm]\ndatasets: [{entry}, samples: 2}}]\n"
        "knobs: {active_blocks: [3, 6]}\nblock_selection: {method: nll, samples: 1}\n"
        "latency: {samples: 1, repeats: 1, output_tokens: 2}\n"
    )
    code = main([str(tmp_path / "sweep.yaml"), "--results", str(tmp_path / "r"), "--address", cluster.address])
    out = capsys.readouterr().out
    assert code == SOME_FAILED
    reason = "its blocks could not be chosen: no sample has a value of nll for each of 6 blocks"
    assert "failed   1 sample in 1 row:\n         own:" in out
    assert f"skipped  tiny-smolvlm: active_blocks=3: {reason}" in out
    rows = pd.read_parquet(tmp_path / "r" / "chosen" / "combinations")
    assert [len(blocks) for blocks in rows["active_blocks"]] == [6]
