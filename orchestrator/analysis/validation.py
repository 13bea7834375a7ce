"""Is the vision knob sound on these data? Distortion, use of tokens, and what each tier adds, against stated limits."""

from __future__ import annotations

import itertools

import pandas as pd

from orchestrator.analysis.statistics import clustered_standard_error

# Limits of the tier guide: mean, 95th and 99th percentile of the mismatch of aspect, and the accuracy a tier must add.
MISMATCH_LIMITS = {"mean": 0.2, "p95": 0.4, "p99": 0.6}
LEAST_GAIN = 0.01

# Rows that are alike in these show one vision setting on one model and data set.
_SETTING = [
    "model",
    "dataset",
    "vision_knob",
    "vision_value",
    "tier_definition",
    "aspect_distance",
    "force_full_tokens",
    "resize_to_fill",
]


def validate_distortion(rows: pd.DataFrame) -> pd.DataFrame:
    """How far the aspect of the crops is from that of the images, by vision setting.

    Args:
        rows: sample rows of the latency or accuracy table, of any number of combinations; an image counts once.

    Returns:
        A line per model, data set and vision setting: `num_images`, `mean_mismatch`, `std_mismatch`, `max_mismatch`,
        `p95_mismatch`, `p99_mismatch` (|columns/rows - width/height|, percentiles by linear interpolation), and `ok`,
        whether mean, p95 and p99 are below MISMATCH_LIMITS. Settings without a closed form are left out.

    >>> rows = pd.DataFrame({"image_id": ["a", "b"], "aspect_mismatch": [0.1, 0.2]})
    >>> rows = rows.assign(model="m", dataset="d", vision_knob="crops", status="done", sample_id=rows["image_id"])
    >>> validate_distortion(rows)[["num_images", "mean_mismatch", "ok"]].round(2).to_dict("records")
    [{'num_images': 2, 'mean_mismatch': 0.15, 'ok': True}]
    """
    lines = []
    for setting, images in _by_setting(rows, "aspect_mismatch"):
        mismatch = images["aspect_mismatch"].astype(float)
        found = {
            "mean_mismatch": float(mismatch.mean()),
            "std_mismatch": float(mismatch.std()),
            "max_mismatch": float(mismatch.max()),
            "p95_mismatch": float(mismatch.quantile(0.95)),
            "p99_mismatch": float(mismatch.quantile(0.99)),
        }
        ok = all(found[f"{name}_mismatch"] < limit for name, limit in MISMATCH_LIMITS.items())
        lines.append(setting | {"num_images": len(images)} | found | {"ok": ok})
    columns = [f"{name}_mismatch" for name in ("mean", "std", "max", "p95", "p99")]
    return pd.DataFrame(lines, columns=[*_SETTING, "num_images", *columns, "ok"])


def validate_token_utilization(rows: pd.DataFrame) -> pd.DataFrame:
    """How many of the vision tokens that the tower makes stand in the prompt, by vision setting.

    Args:
        rows: as for `validate_distortion`.

    Returns:
        A line per model, data set and vision setting: `num_images`; `mean_utilization`, `min_utilization` and
        `p5_utilization`, actual against theoretical tokens, which crops that overlap keep below 1; `mean_as_predicted`,
        actual against the closed form, and `ok`, whether that is 1 for every image. The guide's limits (mean above
        0.95, p5 above 0.90) hold for full tokens only, so they are not judged here.
    """
    lines = []
    for setting, images in _by_setting(rows, "theoretical_vision_tokens"):
        actual = images["actual_vision_tokens"].astype(float)
        utilization = actual / images["theoretical_vision_tokens"].astype(float)
        as_predicted = actual / images["predicted_vision_tokens"].astype(float)
        lines.append(
            setting
            | {
                "num_images": len(images),
                "mean_utilization": utilization.mean(),
                "min_utilization": utilization.min(),
                "p5_utilization": utilization.quantile(0.05),
                "mean_as_predicted": as_predicted.mean(),
                "ok": bool(as_predicted.eq(1).all()),
            }
        )
    columns = ["mean_utilization", "min_utilization", "p5_utilization", "mean_as_predicted", "ok"]
    return pd.DataFrame(lines, columns=[*_SETTING, "num_images", *columns])


def validate_accuracy_benefits(rows: pd.DataFrame) -> pd.DataFrame:
    """What each tier adds to the accuracy of the next smaller one, on the same samples.

    Args:
        rows: sample rows of the accuracy table. Tiers are compared within the same model, data set, metric, top-k,
            blocks and options, in the order of the crops they come to.

    Returns:
        A line per step: `from_tier`, `to_tier`, `from_combination`, `to_combination`, `num_samples` that both have
        scored, `from_accuracy` and `to_accuracy` over those, `gain`, `gain_se` (of the paired difference, clustered by
        image; null for a single image), and `ok`, whether the gain is above LEAST_GAIN. Where a folder has a tier in
        several combinations, because it was defined or scored anew, each of them is compared with each of the next
        tier, and no step mixes the rows of two.

    Raises:
        ValueError: the rows have no scores, as those of the latency table.
    """
    if "score" not in rows:
        raise ValueError("these rows have no column score; the gain of a tier needs rows of the accuracy table")
    lines = []
    scored = _counted(rows)
    tiers = scored[scored["tier"].notna()]
    known = tiers[[name for name in (*_SHOWN, *_APART) if name in tiers]]
    # As text: a list of blocks is no key to group by.
    apart = pd.Series([repr(list(values)) for values in known.itertuples(index=False)], tiers.index, dtype=object)
    for _, group in tiers.groupby(apart, sort=False):
        by_tier = {name: _combinations(found) for name, found in group.groupby("tier", sort=False)}
        order = sorted(by_tier, key=lambda name: _crops(pd.concat(by_tier[name])))
        shown = group.iloc[0].reindex(_SHOWN).to_dict()
        for pair in itertools.pairwise(order):
            for both in itertools.product(*(by_tier[name] for name in pair)):
                # Tiers that are defined anew need not keep their order.
                smaller, larger = sorted(both, key=_crops)
                step = _step(smaller, larger)
                if step is not None:
                    lines.append(shown | _ends(smaller, larger) | step)
    ends = ["from_tier", "to_tier", "from_combination", "to_combination"]
    measured = ["num_samples", "from_accuracy", "to_accuracy", "gain", "gain_se", "ok"]
    return pd.DataFrame(lines, columns=[*_SHOWN, *ends, *measured])


# What must be alike for two tiers to be compared: the first are shown, the others only keep rows apart.
_SHOWN = [
    "model",
    "dataset",
    "metric",
    "moe_top_k",
    "num_active_blocks",
    "aspect_distance",
    "force_full_tokens",
    "resize_to_fill",
]
_APART = [
    "active_blocks",
    "dtype",
    "revision",
    "attention",
    "experts",
    "engine",
]


def _combinations(tier: pd.DataFrame) -> list[pd.DataFrame]:
    """The rows of a tier by its definition and combination, every sample once in each."""
    known = [name for name in ("tier_definition", "combination_id") if name in tier]
    if not known:
        return [tier.drop_duplicates("sample_id")]
    return [rows.drop_duplicates("sample_id") for _, rows in tier.groupby(known, dropna=False, sort=False)]


def _crops(rows: pd.DataFrame) -> float:
    return float(rows["selected_crops"].astype(float).mean())


def _ends(smaller: pd.DataFrame, larger: pd.DataFrame) -> dict[str, object]:
    """Which two are compared."""
    ends: dict[str, object] = {}
    for side, rows in (("from", smaller), ("to", larger)):
        first = rows.iloc[0]
        ends |= {f"{side}_tier": first["tier"], f"{side}_combination": first.get("combination_id")}
    return ends


def _step(smaller: pd.DataFrame, larger: pd.DataFrame) -> dict[str, float | int | bool | None] | None:
    both = (
        smaller[["sample_id", "image_id", "score"]]
        .merge(larger[["sample_id", "score"]], on="sample_id", suffixes=("_from", "_to"))
        .dropna(subset=["score_from", "score_to"])
    )  # a metric of the whole corpus scores no single answer
    if both.empty:
        return None
    gains = both["score_to"].astype(float) - both["score_from"].astype(float)
    gain = float(gains.mean())
    return {
        "num_samples": len(both),
        "from_accuracy": float(both["score_from"].mean()),
        "to_accuracy": float(both["score_to"].mean()),
        "gain": gain,
        "gain_se": clustered_standard_error(gains, both["image_id"]),
        "ok": gain > LEAST_GAIN,
    }


def _counted(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows that count: done, and valid where the table says."""
    done = rows[rows["status"] == "done"]
    return done[done["valid"].eq(True)] if "valid" in done else done


def _by_setting(rows: pd.DataFrame, promised: str) -> list[tuple[dict[str, object], pd.DataFrame]]:
    """One row per image and vision setting that has a promise, setting by setting, in the order of the rows."""
    known = [name for name in _SETTING if name in rows]
    # Invalid rows too: a mismatch of tokens is what this is to show.
    usable = rows[(rows["status"] == "done") & rows[promised].notna()]
    # A sample whose image has no name of its own counts for itself.
    usable = usable.assign(image_id=usable["image_id"].fillna(usable["sample_id"]))
    images = usable.drop_duplicates([*known, "image_id"])
    groups = images.groupby(known, dropna=False, sort=False)
    return [(dict(zip(known, key, strict=True)), group) for key, group in groups]
