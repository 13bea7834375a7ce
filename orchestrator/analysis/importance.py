"""From the values of candidate block lists on samples to block scores, and how far their ranking can be trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from knobs.beam import Value
from knobs.block_tree import Blocks, single_ablations
from knobs.importance import FIRST_AND_LAST, BlockScores, Method, select_blocks
from orchestrator.analysis.statistics import clustered_standard_error

# Rows are what `workers.candidates.importance_rows` makes: a sample, its image, a list of blocks, and a value.


def block_scores(
    rows: pd.DataFrame, method: Method, num_blocks: int, about: Mapping[str, str] | None = None
) -> BlockScores:
    """Score and standard error of every block, from rows of any number of workers in any order.

    The score of a block is the mean of its values over the samples. Where the method ablates, a sample's value is its
    value under the whole model less that without the block: a paired difference, in which what makes the sample easy or
    hard cancels. Standard errors are clustered by image. Samples that lack one of the values are left out.

    Args:
        rows: `sample_id`, `image_id`, `blocks`, `value`; of one method only.
        method: what the values are.
        num_blocks: blocks of the model.
        about: what the scores should say of themselves; the number of samples and images is added.

    Raises:
        ValueError: no sample has all the values.
    """
    values, images = block_values(rows, method, num_blocks)
    errors = [clustered_standard_error(values[block], images) for block in range(num_blocks)]
    counted = {"samples": str(len(values)), "images": str(images.nunique())}
    means = tuple(float(values[block].mean()) for block in range(num_blocks))
    return BlockScores(means, tuple(errors), method, dict(about or {}) | counted)


def block_values(rows: pd.DataFrame, method: Method, num_blocks: int) -> tuple[pd.DataFrame, pd.Series]:
    """What each block is worth on each sample (samples x blocks), and each sample's image; see `block_scores`."""
    table, images, number_of = _by_candidate(rows)
    whole, *without = single_ablations(num_blocks)
    wanted = [whole, *without] if method.needs_ablation else [(block,) for block in range(num_blocks)]
    complete = table.reindex(columns=[number_of.get(blocks, -1) for blocks in wanted]).dropna()
    if complete.empty:
        raise ValueError(f"no sample has a value of {method} for each of {num_blocks} blocks")
    found = complete.to_numpy(dtype=float)
    values = found[:, :1] - found[:, 1:] if method.needs_ablation else found
    return pd.DataFrame(values, index=complete.index), images.loc[complete.index]


def candidate_values(rows: pd.DataFrame) -> dict[Blocks, Value]:
    """Mean and standard error, clustered by image, of every block list in the rows: what a beam search goes by."""
    table, images, number_of = _by_candidate(rows)
    found: dict[Blocks, Value] = {}
    for blocks, number in number_of.items():
        known = table[number].dropna()
        if len(known):
            found[blocks] = Value(float(known.mean()), clustered_standard_error(known, images.loc[known.index]))
    return found


def kendall_tau(left: Sequence[float], right: Sequence[float]) -> float:
    """Kendall's tau-b of two scorings of the same blocks: 1 for the same ranking, -1 for the opposite, 0 for chance.

    Kendall 1945: agreeing less disagreeing pairs over the geometric mean of the pairs that each scoring does not tie.
    0 where one of them ties all blocks and so says nothing.
    """
    signs = [np.sign(np.subtract.outer(np.asarray(v, float), np.asarray(v, float))) for v in (left, right)]
    untied = float(np.abs(signs[0]).sum() * np.abs(signs[1]).sum())
    return float((signs[0] * signs[1]).sum() / np.sqrt(untied)) if untied else 0.0


def split_half_tau(values: pd.DataFrame, size: int, draws: int = 200, seed: int = 0) -> float:
    """How much alike two sets of `size` samples rank the blocks: mean Kendall's tau over random disjoint pairs of sets.

    Args:
        values: samples x blocks, see `block_values`.
        size: samples in each set.

    Raises:
        ValueError: there are not twice as many samples.
    """
    if 2 * size > len(values):
        raise ValueError(f"two sets of {size} samples need {2 * size}, not {len(values)}")
    array, random = values.to_numpy(dtype=float), np.random.default_rng(seed)
    taus = []
    for _ in range(draws):
        chosen = random.permutation(len(array))[: 2 * size]
        taus.append(kendall_tau(array[chosen[:size]].mean(axis=0), array[chosen[size:]].mean(axis=0)))
    return float(np.mean(taus))


def selection_stability(
    values: pd.DataFrame,
    images: pd.Series,
    count: int,
    keep: Sequence[int] = FIRST_AND_LAST,
    draws: int = 200,
    seed: int = 0,
) -> float:
    """Share of bootstrap samples, drawn image by image, that select the same `count` blocks as all samples do."""
    random = np.random.default_rng(seed)
    grouped = values.groupby(images)
    sums, sizes = grouped.sum().to_numpy(dtype=float), grouped.size().to_numpy()

    def selected(drawn: np.ndarray) -> tuple[int, ...]:
        means = sums[drawn].sum(axis=0) / sizes[drawn].sum()
        return select_blocks(BlockScores(tuple(means), (None,) * len(means)), count, keep)

    expected = selected(np.arange(len(sums)))
    return float(np.mean([selected(random.integers(len(sums), size=len(sums))) == expected for _ in range(draws)]))


def _by_candidate(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series, dict[Blocks, int]]:
    """Values, samples x numbers of block lists; the image of each sample; and the number of each block list."""
    lists: list[Blocks] = [tuple(int(block) for block in blocks) for blocks in rows["blocks"]]
    number_of = {blocks: number for number, blocks in enumerate(sorted(set(lists)))}
    keyed = rows.assign(candidate=[number_of[blocks] for blocks in lists])
    # A task that was run twice has left the same rows twice.
    keyed = keyed.drop_duplicates(["sample_id", "candidate"], keep="last")
    values = keyed.pivot(index="sample_id", columns="candidate", values="value")
    # Sorted, so that sums are the same to the last bit whatever the order of the rows.
    return values.sort_index(), keyed.groupby("sample_id")["image_id"].first(), number_of
