"""Block scores: which blocks they select, how they are read and written, and the beam search over what to leave out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from knobs.beam import BeamSearch, Value
from knobs.block_tree import Blocks
from knobs.errors import KnobError
from knobs.importance import BlockScores, Method, kept_blocks, select_blocks
from knobs.score_files import read_scores, write_scores


def scores_of(*values: float) -> BlockScores:
    return BlockScores(values, (None,) * len(values))


# -- selection --------------------------------------------------------------------------------------------------------


def test_the_first_and_the_last_block_stay_whatever_their_scores() -> None:
    scores = scores_of(0.0, 0.5, 0.9, 0.7, 0.1, 0.0)
    assert select_blocks(scores, 4) == (0, 2, 3, 5)
    assert select_blocks(scores, 4, keep=()) == (1, 2, 3, 4)
    assert select_blocks(scores, 4, keep=[4, 1]) == (1, 2, 3, 4)
    assert select_blocks(scores, 6) == (0, 1, 2, 3, 4, 5)
    assert select_blocks(scores, 2) == (0, 5)


def test_of_equal_scores_the_earlier_block_is_kept() -> None:
    assert select_blocks(scores_of(*[0.5] * 6), 4) == (0, 1, 2, 5)
    assert scores_of(0.5, 0.7, 0.5, 0.7).ranking() == (1, 3, 0, 2)


def test_harmful_blocks_go_first() -> None:
    assert select_blocks(scores_of(1.0, -0.2, 0.0, 0.1, 1.0), 4) == (0, 2, 3, 4)


@pytest.mark.parametrize(
    ("count", "keep", "reason"),
    [
        (0, (0, -1), "active_blocks 0: the model has 4 blocks, so active_blocks must be 1 to 4"),
        (5, (0, -1), "active_blocks 5: the model has 4 blocks, so active_blocks must be 1 to 4"),
        (1, (0, -1), "active_blocks 1: keep alone names 2 blocks (0, 3)"),
        (3, (4, -5), "keep 4, -5: the model has blocks 0 to 3, and -1 is the last"),
    ],
)
def test_selections_that_cannot_be(count: int, keep: tuple[int, ...], reason: str) -> None:
    with pytest.raises(KnobError) as caught:
        select_blocks(scores_of(1, 2, 3, 4), count, keep)
    assert str(caught.value) == reason


def test_names_of_kept_blocks() -> None:
    assert kept_blocks((0, -1, 5, -6), 6) == {0, 5}
    assert kept_blocks((0, -1), 1) == {0}
    assert select_blocks(scores_of(0.3), 1) == (0,)


@pytest.mark.parametrize("values", [(1.0, math.nan), (math.inf, 1.0)])
def test_scores_are_finite(values: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="are not finite"):
        scores_of(*values)


# -- files ------------------------------------------------------------------------------------------------------------

MEASURED = BlockScores((0.5, -0.1, 1 / 3), (0.1, None, 1e-9), Method.NLL, {"model": "abc", "samples": "12"})


def test_parquet_holds_everything(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "scores.parquet"
    write_scores(path, MEASURED)
    assert read_scores(path, 3) == MEASURED
    assert read_scores(path, 3, model="abc") == MEASURED
    frame = pd.read_parquet(path)
    assert list(frame.columns) == ["block", "score", "standard_error"]
    assert frame["block"].tolist() == [0, 1, 2]


def test_json_holds_the_bare_scores(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    write_scores(path, MEASURED)
    assert json.loads(path.read_text()) == {"0": 0.5, "1": -0.1, "2": 1 / 3}
    assert read_scores(path, 3, model="whatever") == BlockScores(MEASURED.scores, (None, None, None))


def test_a_table_made_with_pandas_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    pd.DataFrame({"score": [3, 1, 2], "block": [2, 0, 1], "note": ["a", "b", "c"]}).to_parquet(path)
    assert read_scores(path, 3) == scores_of(1.0, 2.0, 3.0)


def written_json(text: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "s.json"
        path.write_text(text)
        return path

    return write


def written_parquet(**columns: object) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "s.parquet"
        pq.write_table(pa.table(columns), path)
        return path

    return write


def written_metadata(content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        table = pa.table({"block": [0, 1, 2], "score": [1.0, 2.0, 3.0]})
        pq.write_table(table.replace_schema_metadata({b"block_importance": content}), folder / "s.parquet")
        return folder / "s.parquet"

    return write


def written_bytes(name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(b"\x80PAR1 no")
        return folder / name

    return write


HAS = "the model has blocks 0 to 2"
WRONG = {
    "missing file": (
        lambda folder: folder / "s.json",
        "no such file of block scores; correct the path, or choose method nll",
    ),
    "a folder": (lambda folder: (folder / "s.json").mkdir() or folder / "s.json", "no such file of block scores"),
    "unknown format": (lambda folder: folder / "s.csv", "unknown format '.csv'; block scores are .parquet or .json"),
    "not JSON": (written_json("{0: 1}"), "cannot be read as JSON (Expecting property name"),
    "not text": (written_bytes("s.json"), "cannot be read as JSON ("),
    "a list": (written_json("[1, 2, 3]"), "expected an object of scores by block, like"),
    "a number": (written_json("7"), "expected an object of scores by block, like"),
    "block missing": (written_json('{"0": 1, "2": 1}'), f"no score for block 1; {HAS} and each needs one"),
    "blocks missing": (written_json("{}"), f"no score for blocks 0, 1, 2; {HAS} and each needs one"),
    "one too many": (written_json('{"0": 1, "1": 1, "2": 1, "3": 1}'), f"scores for block 3, but {HAS}"),
    "negative block": (written_json('{"-1": 1}'), f"scores for block -1, but {HAS}"),
    "no block": (written_json('{"first": 1, "1": 2}'), f"scores for block first, but {HAS}"),
    "twice": (written_json('{"0": 1, "0": 2, "1": 1, "2": 1}'), "more than one score for block 0; leave one of each"),
    "text": (written_json('{"0": 1, "1": "2", "2": 1}'), "the score of block 1 is not a finite number"),
    "truth": (written_json('{"0": 1, "1": true, "2": 1}'), "the score of block 1 is not a finite number"),
    "nested": (written_json('{"0": {"a": 1}, "1": 1, "2": 1}'), "the score of block 0 is not a finite number"),
    "not a number": (written_json('{"0": NaN, "1": null, "2": 1}'), "the score of blocks 0, 1 is not a finite number"),
    "not Parquet": (written_bytes("s.parquet"), "cannot be read as Parquet ("),
    "no column": (written_parquet(layer=[0], value=[1.0]), "no column block and score among layer, value"),
    "no score": (written_parquet(block=[0, 1, 2], score=[1.0, None, 2.0]), "the score of block 1 is not a finite"),
    "text as index": (
        written_parquet(block=["0"], score=[1.0]),
        "the indices in its column block are text, not whole numbers; write them as such",
    ),
    "fraction as index": (written_parquet(block=[0.5], score=[1.0]), "the indices in its column block are double, not"),
    "beyond floats": (written_json(f'{{"0": {"9" * 400}, "1": 1, "2": 1}}'), "the score of block 0 is not a finite"),
    "a long index": (written_json(f'{{"{"9" * 5000}": 1}}'), "scores for block 999"),
    "nested too deep": (written_json("[" * 200_000), "cannot be read as JSON ("),
    "metadata no JSON": (written_metadata(b"{no"), "its metadata block_importance are not the JSON object they"),
    "metadata a list": (written_metadata(b"[1]"), "its metadata block_importance are not the JSON object they"),
    "metadata no object": (written_metadata(b'{"about": 3}'), "its metadata block_importance are not the JSON object"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_refused_in_one_line_with_the_path(case: str, tmp_path: Path) -> None:
    write, reason = WRONG[case]
    path = write(tmp_path)
    with pytest.raises(KnobError) as caught:
        read_scores(path, 3)
    assert str(caught.value).startswith(f"{path}: {reason}")
    assert "\n" not in str(caught.value)


def test_scores_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    write_scores(path, MEASURED)
    with pytest.raises(KnobError) as caught:
        read_scores(path, 3, model="xyz")
    assert str(caught.value) == f"{path}: these scores were measured on abc, not on xyz; measure them again"


def test_scores_are_not_written_under_a_name_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(KnobError, match=r"unknown format '\.txt'"):
        write_scores(tmp_path / "scores.txt", MEASURED)


# -- beam search ------------------------------------------------------------------------------------------------------


def searched(
    search: BeamSearch, objective: Callable[[Blocks], float], chunk: int | None = None
) -> tuple[dict[Blocks, Value], list[list[Blocks]]]:
    """Values and rounds of a whole search; with `chunk`, so many candidates are valued before it is asked again."""
    values: dict[Blocks, Value] = {}
    rounds = []
    while candidates := search.next_round(values):
        rounds.append(candidates)
        values |= {blocks: Value(objective(blocks)) for blocks in candidates[:chunk]}
    return values, rounds


def interacting(blocks: Blocks) -> float:
    """A model in which blocks 2 and 3 are worth something together only: two steps that each look cheap miss that."""
    worth = [5.0, 0.9, 0.0, 0.0, 2.0, 1.5, 3.0]
    return sum(worth[block] for block in blocks) + 2.2 * ({2, 3} <= set(blocks))


def exhaustive(num_blocks: int, removed: int, kept: set[int], objective: Callable[[Blocks], float]) -> Blocks:
    lists = [b for b in combinations(range(num_blocks), num_blocks - removed) if kept <= set(b)]
    return max(lists, key=lambda blocks: (objective(blocks), [-b for b in blocks]))


def test_a_wide_beam_finds_what_trying_everything_finds() -> None:
    search = BeamSearch(7, width=100, depth=4)
    values, rounds = searched(search, interacting)
    assert len(rounds) == 4
    best = search.best(values)
    assert best == {removed: exhaustive(7, removed, {0, 6}, interacting) for removed in range(5)}
    narrow = BeamSearch(7, width=1, depth=4)
    greedy = narrow.best(searched(narrow, interacting)[0])
    assert interacting(greedy[2]) < interacting(best[2]), "so the width counts"


def test_the_first_round_is_ablation_and_later_ones_go_on_from_the_best() -> None:
    search = BeamSearch(4, width=2, depth=2, keep=[0])
    values, rounds = searched(search, lambda blocks: -sum(blocks))
    assert rounds[0] == [(0, 1, 2, 3), (0, 1, 2), (0, 1, 3), (0, 2, 3)]
    # The best two lists lack 3 and 2; both lead to (0, 1), which is one candidate.
    assert rounds[1] == [(0, 1), (0, 2), (0, 3)]
    assert search.best(values) == {0: (0, 1, 2, 3), 1: (0, 1, 2), 2: (0, 1)}


def test_a_search_goes_on_from_whatever_values_there_are() -> None:
    search = BeamSearch(7, width=2, depth=3)
    values, rounds = searched(search, interacting)
    in_pieces, asked = searched(search, interacting, chunk=3)
    assert in_pieces == values
    assert len(asked) > len(rounds)
    wanted = {blocks for candidates in rounds for blocks in candidates}
    assert wanted == set(values)
    # Values that nobody asked for change nothing.
    more: Mapping[Blocks, Value] = {**values, (0, 6): Value(99.0)}
    assert search.next_round(more) == []
    assert search.best(more) == search.best(values)
    # As far as the rounds are complete, the best so far is known.
    known = {blocks: value for blocks, value in values.items() if len(blocks) >= 6}
    assert sorted(search.best(known)) == [0, 1]
    assert search.best({}) == {}


def test_ties_and_values_that_are_no_numbers() -> None:
    search = BeamSearch(5, width=2, depth=2, keep=())
    values, rounds = searched(search, lambda _: 0.0)
    assert search.best(values) == {0: (0, 1, 2, 3, 4), 1: (0, 1, 2, 3), 2: (0, 1, 2)}
    values, rounds = searched(search, lambda blocks: math.nan if 0 in blocks and len(blocks) == 4 else 0.0)
    assert search.best(values)[1] == (1, 2, 3, 4), "a candidate that has no value is the last choice"
    assert rounds[1][0] == (0, 1, 2)
    assert BeamSearch(2, 1, 1, keep=()).next_round({}) == [(0, 1), (0,), (1,)]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ((4, 0, 1), "width 0: a beam needs at least one list"),
        ((4, 1, 0), "depth 0: of 4 blocks 1 to 2 can be taken out"),
        ((4, 1, 3), "depth 3: of 4 blocks 1 to 2 can be taken out"),
        ((4, 1, 4, ()), "depth 4: of 4 blocks 1 to 3 can be taken out"),
        ((4, 1, 1, (7,)), "keep 7: the model has blocks 0 to 3, and -1 is the last"),
    ],
)
def test_searches_that_cannot_be(settings: tuple[int, ...], reason: str) -> None:
    with pytest.raises(KnobError) as caught:
        BeamSearch(*settings)  # type: ignore[arg-type]
    assert str(caught.value) == reason
