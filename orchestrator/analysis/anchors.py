"""Workers against each other and against the clock, by the anchor that each of them times again and again.

A call is one visit of a worker to an anchor: a few answers within seconds. A run is one process of a worker. Everything
is reckoned in logarithms of times, where a machine that is 5 % slower adds the same to a short time and to a long one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd

from orchestrator.analysis.statistics import clustered_standard_error, half_width_95, student_t_chance
from workers.schema import PARTITIONS, SUMMARISED, WORKER_COLUMNS, to_table
from workers.stopping import Z95, independent

# A worker is slow or fast beyond this: two GPUs of a kind are often 1 % apart, and what a knob saves is rarely less.
MOST_BIAS = 0.02
# Relative change per hour. Sweeps take hours, and combinations that are timed an hour apart are compared.
MOST_DRIFT_PER_HOUR = 0.01
# Relative change over the time seen, without which a drift has not yet moved any number that matters.
LEAST_CHANGE = 0.005
# Relative standard deviation around the line: with more, neither line nor correction says much about an hour.
MOST_SPREAD = 0.05
# What marking the stages may cost; half of what users tell apart when they compare combinations.
MOST_OVERHEAD = 0.005
# How likely any slow, fast, drift or overhead may come from chance alone, over all rows of a model, kind of device and
# data set: they are dozens of numbers, and one in twenty of them is beyond its 95 % interval for no reason.
CHANCE = 0.01
# A finding about a part of an answer is told in words when it comes to this share of the whole answer.
WORTH_TELLING = 0.005
# Seconds that anchors have to be apart for a change per hour to mean anything.
LEAST_DRIFT_SECONDS = 120.0
# Fewer pairs do not give a median a 95 % interval: all of five lie on one side of it once in 16 times.
FEWEST_PAIRS = 6
# Exponents end here, at changes of 5e8. A slope of seconds may come to more in an hour, which means as little.
_LARGEST = 20.0

_PLACE = [column.name for column in PARTITIONS]
_RUN = ["worker", "session_started_at"]
_ANCHOR = [*_PLACE, "anchor_id"]
_COLUMNS = [column.name for column in WORKER_COLUMNS]
_TRENDS = [*_PLACE, *_COLUMNS]
_COUNTED = ["marked", "pair", "visit", "status", "valid", "started_at", *SUMMARISED]
_DEVICE = ["device_name", "device_uuid", "environment_id"]
# A slot of a pool keeps its name when it comes back on another device.
_WHO = ["worker", "host", "device_uuid"]
# What an anchor is, with the words for it; a flag has one word for each of its values.
_NUMBERS = {"moe_top_k": "top-k {}", "num_active_blocks": "{} blocks", "output_tokens": "{} tokens"}
_FLAGS = {"force_full_tokens": {True: "full tokens"}, "resize_to_fill": {True: "fill", False: "letterbox"}}
_NAMES = ["dtype", "attention", "experts", "engine"]


def worker_trends(anchors: pd.DataFrame, environments: pd.DataFrame | None = None) -> pd.DataFrame:
    """How fast each run of a worker is, how it changes with time, how steady it is, and what marking the stages costs.

    The value of a call is the median of its valid marked answers; times that are null or not positive are left out.
    Over the n calls of a run, log(value) = level + slope * hours + noise by ordinary least squares, with the level at
    the mean time. Errors have n - 2 degrees of freedom (Student's t), and are widened by sqrt(n / independent calls) of
    the residuals, because the load of a machine often wanders, and neighbours in time are then alike; without that a
    wandering machine would be said to drift (see `workers.stopping.independent`).

    bias: the level of a run less the median of the levels of all workers that timed the same anchor, each worker with
    one level, the mean of its runs weighted by calls, so that restarts do not make a worker count more. A worker is its
    name on one host and device; where there is but one, its runs are compared with each other. The variance of
    a run's level is s^2 / n, with s^2 pooled over the runs of its worker: about the line where a run has four calls,
    about the mean where it has fewer. The interval adds the variance of the run's level and that of the worker in the
    middle (of two in the middle, of their mean), which is exact for a worker far from the median and wide for one near
    it; of two workers, half of the difference has half of the error. Degrees of freedom are Welch-Satterthwaite's. It
    is null for a worker whose calls say nothing of its noise, such as a single one; such a worker in the middle is
    taken to be as noisy as the others.

    overhead: median of marked over bare total_ms over all pairs with both valid. A median, because times have heavy
    tails on one side, and one disturbed answer would spoil a mean. Its interval is that of order statistics (Conover
    1999, section 3.2: ranks n/2 -+ 1.96 sqrt(n)/2), its larger side. Where pairs of one call are alike, n is divided by
    the design effect of "above the median" within calls (Woodruff 1952); null under FEWEST_PAIRS.

    findings: slow and fast, drift, overhead are beyond the constants above, beyond their 95 % intervals, and so
    unlikely by chance that in all rows of a model, kind of device and data set there is one with probability CHANCE at
    most (Bonferroni). spread describes what was seen and is judged as it is.

    drift_per_hour is null where the calls lie within LEAST_DRIFT_SECONDS.

    Args:
        anchors: rows of that table, with the partition columns; of any number of workers, models and anchors.
        environments: rows of that table, to name the hosts.

    Returns:
        WORKER_COLUMNS after the partition columns, a row per model, accelerator, data set, anchor, run and timing that
        has a value, with the types of a result folder; `findings` are lists.
    """
    valid = _valid(anchors)
    hosts = _hosts(environments)
    rows: list[dict[str, Any]] = []
    chances: list[dict[str, float]] = []
    for place, answers in valid.groupby(_ANCHOR, sort=True, dropna=False):
        calls = _calls(answers)
        runs = [
            (_run_columns(answers_of_run, hosts), calls.loc[[run]], _overhead(answers_of_run))
            for run, answers_of_run in answers.groupby("run", sort=True)
            if run in calls.index
        ]
        for timing in SUMMARISED:
            for about, columns, chance in _timing_rows(timing, runs):
                rows.append(dict(zip(_ANCHOR, place, strict=True)) | about | columns)
                chances.append(chance)
    places = [tuple(row[name] for name in _PLACE) for row in rows]
    for row, found in zip(rows, _unlikely(places, chances), strict=True):
        row["findings"] = _findings(row, found)
    return _trends_frame(rows)


def corrected(latency: pd.DataFrame, trends: pd.DataFrame) -> pd.DataFrame:
    """The rows with `<timing>_corrected` for every timing: what the median worker in its mean state would have taken.

    value / ((1 + bias) * exp(slope * (t - mean time of the anchors))), t being the row's `started_at`, with bias and
    slope of the anchor that the row names and the same run timed, on the same model, accelerator and data set. Null
    where there is none, or none with that timing.

    Only what is known is corrected, for anything else would add the noise of the anchors to every row of a worker. The
    bias counts where it exceeds its interval; a worker that may as well be like the others is left untouched. The slope
    counts where `drift` was found, and t ends at the first and the last anchor: nobody has seen the line go on.

    The mean time is the column `mean_at`; where the trends lack it, halfway between the first and the last anchor,
    which is the same for evenly spread ones. Each timing is corrected by its own trend, so that corrected stages need
    not add up to the corrected total.

    Args:
        latency: rows of that table, with the partition columns; it is not changed.
        trends: what `worker_trends` makes, or the table workers with the partition columns.
    """
    made = latency.copy()
    rows = _keyed(latency)
    at = _seconds(latency, "started_at").to_numpy()
    for timing in SUMMARISED:
        lines = rows.merge(_lines(trends, timing), on=[*_ANCHOR, *_RUN], how="left")
        end = lines["last"].to_numpy()
        hours = (np.minimum(np.maximum(at, lines["first"].to_numpy()), end) - lines["mean"].to_numpy()) / 3600
        slopes = lines["slope"].to_numpy()
        change = np.where(slopes == 0, 0.0, slopes * hours)
        made[f"{timing}_corrected"] = _floats(latency, timing).to_numpy() / np.exp(lines["bias"].to_numpy() + change)
    return made


def findings_in_words(trends: pd.DataFrame) -> list[str]:
    """A line per worker and finding; it names total_ms where that is out of bounds, else the timing that weighs most.

    What a part of an answer does is left out where it comes to less than WORTH_TELLING of the answer: a transfer of
    microseconds is never steady.

    Args:
        trends: what `worker_trends` makes, or the table workers with the partition columns.
    """
    told: dict[Hashable, tuple[tuple[int, bool, float], str]] = {}
    shares, workers, runs = _shares(trends), _count(trends, _WHO), _count(trends, _RUN)
    names = [str(name) for name in trends.columns]
    for position, values in enumerate(trends.itertuples(index=False, name=None)):
        row = dict(zip(names, values, strict=True))
        for finding in _list(row["findings"]):
            effect = {"slow": "bias", "fast": "bias", "drift": "drift_per_hour"}.get(finding, finding)
            if effect not in row or pd.isna(row[effect]):
                continue
            weight = abs(row[effect]) * shares[position]
            whole = row["timing"] == "total_ms"
            if not whole and weight < WORTH_TELLING:
                continue
            rank = (list(_WORDS).index(finding), not whole, -weight)
            of_run = row["session_started_at"] if finding in ("slow", "fast") and workers[position] == 1 else None
            key = (row.get("accelerator"), row["worker"], _none_if_null(row["device_uuid"]), of_run, finding)
            if key not in told or rank < told[key][0]:
                told[key] = (rank, _WORDS[finding](row, workers[position], runs[position]))
    return [line for _, line in sorted(told.values())]


# -- rows that count --------------------------------------------------------------------------------------------------


def _valid(anchors: pd.DataFrame) -> pd.DataFrame:
    """The answers that count, with times in seconds, the anchor in words, and `run`, a number in order of time."""
    rows = _keyed(anchors)
    rows["anchor"] = _in_words(anchors)
    rows["anchor_id"] = rows["anchor_id"].where(rows["anchor_id"].notna(), rows["anchor"])
    for name in (*_COUNTED, *_DEVICE):
        rows[name] = _column(anchors, name).to_numpy()
    rows["at"] = _seconds(anchors, "started_at").to_numpy()
    for name in SUMMARISED:
        values = _floats(rows, name)
        rows[name] = values.where(np.isfinite(values) & (values > 0))
    counted = rows["valid"].eq(True) & rows["marked"].notna() & rows["at"].notna()
    rows = rows[(rows["status"] == "done") & counted].copy()
    rows["run"] = rows.groupby(_RUN, sort=True, dropna=False).ngroup()
    return rows


def _keyed(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns that tell runs apart, of types that can be compared; null where the frame lacks one."""
    keys = {name: _column(frame, name).astype(object).to_numpy() for name in (*_ANCHOR, "worker")}
    return pd.DataFrame(keys | {"session_started_at": _times(frame, "session_started_at").to_numpy()}).assign(
        session_started_at=lambda made: pd.to_datetime(made["session_started_at"], utc=True)
    )


def _column(frame: pd.DataFrame, name: str) -> pd.Series:
    return frame[name] if name in frame else pd.Series(None, index=frame.index, dtype=object)


def _floats(frame: pd.DataFrame, name: str) -> pd.Series:
    return _column(frame, name).astype(float)


def _times(frame: pd.DataFrame, name: str) -> pd.Series:
    return pd.to_datetime(_column(frame, name), utc=True).dt.as_unit("us")


def _seconds(frame: pd.DataFrame, name: str) -> pd.Series:
    """Seconds since 1970, which unlike times can be averaged and be null without special cases."""
    return (_times(frame, name) - pd.Timestamp(0, tz="UTC")).dt.total_seconds()


def _time(seconds: float) -> pd.Timestamp:
    return pd.Timestamp(round(seconds * 1e6), unit="us", tz="UTC")


def _none_if_null(value: Any) -> Any:
    return None if pd.isna(value) else value


def _list(findings: Any) -> list[str]:
    return [] if findings is None or isinstance(findings, float) else list(findings)


def _in_words(anchors: pd.DataFrame) -> list[str]:
    names = ["vision_knob", "vision_value", *_FLAGS, *_NUMBERS, *_NAMES, "sample_id"]
    parts = pd.DataFrame({name: _column(anchors, name).astype(object).to_numpy() for name in names})
    known: dict[tuple[Any, ...], str] = {}
    found = []
    for values in parts.itertuples(index=False, name=None):
        key = tuple(_none_if_null(value) for value in values)
        if key not in known:
            known[key] = _anchor(dict(zip(names, key, strict=True)))
        found.append(known[key])
    return found


def _anchor(of: Mapping[str, Any]) -> str:
    words = [" ".join(str(of[name]) for name in ("vision_knob", "vision_value") if of[name] is not None)]
    words += [flags.get(bool(of[name]), "") for name, flags in _FLAGS.items() if of[name] is not None]
    words += [text.format(int(of[name])) for name, text in _NUMBERS.items() if of[name] is not None]
    words.append(" ".join(str(of[name]) for name in _NAMES if of[name] is not None))
    words.append("" if of["sample_id"] is None else f"sample {of['sample_id']}")
    return ", ".join(word for word in words if word)


def _calls(answers: pd.DataFrame) -> pd.DataFrame:
    """Runs x calls: when the first marked answer began, the mean of when they did, and the median of every timing."""
    calls = answers[answers["marked"].eq(True)].groupby(["run", "visit"], sort=True, dropna=False)
    found = calls[list(SUMMARISED)].median()
    return found.assign(began=calls["at"].min(), at=calls["at"].mean())


def _hosts(environments: pd.DataFrame | None) -> dict[Any, Any]:
    if environments is None or environments.empty:
        return {}
    return dict(zip(environments["environment_id"], environments["host"], strict=True))


def _run_columns(answers: pd.DataFrame, hosts: Mapping[Any, Any]) -> dict[str, Any]:
    """Who it was, by the first answer that says so."""
    about = {name: next(iter(answers[name].dropna()), None) for name in ("anchor", *_RUN, *_DEVICE)}
    return about | {"host": _none_if_null(hosts.get(about.pop("environment_id")))}


# -- level, slope and spread ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fit:
    """The line through the calls of a run, in log(ms) and hours; what cannot be told is None.

    Attributes:
        level: at the mean time.
        slope, slope_error, slope_freedom: per hour, its standard error and the degrees of freedom of that.
        spread: standard deviation around the line.
        squares, freedom: sum of squared residuals, and its degrees of freedom: what the noise of a worker is made of.
        widening: how much larger errors of means are, because neighbours in time are alike.
    """

    calls: int
    level: float
    slope: float | None
    slope_error: float | None
    slope_freedom: int
    spread: float | None
    squares: float
    freedom: int
    widening: float


def _fit(hours: np.ndarray, values: np.ndarray) -> _Fit:
    n = len(values)
    logs = np.log(values)
    level = float(logs.mean())
    about_mean = logs - level
    times = hours - hours.mean()
    reach = float(times @ times)
    flat = float(about_mean @ about_mean)
    if n < 3 or reach == 0:
        spread = math.sqrt(flat / (n - 1)) if n >= 3 else None
        return _Fit(n, level, None, None, 0, spread, flat, n - 1, math.sqrt(n / independent(about_mean)))
    slope = float(times @ logs) / reach
    about_line = about_mean - slope * times
    squares = float(about_line @ about_line)
    widening = math.sqrt(n / independent(about_line))
    spread = math.sqrt(squares / (n - 2))
    error = widening * spread / math.sqrt(reach)
    # A line through three points leaves one degree of freedom, whose interval is of no use; their mean leaves two.
    squares, freedom = (flat, n - 1) if n == 3 else (squares, n - 2)
    return _Fit(n, level, slope, error, n - 2, spread, squares, freedom, widening)


def _timing_rows(
    timing: str, runs: list[tuple[dict[str, Any], pd.DataFrame, dict[str, float | None]]]
) -> list[tuple[dict[str, Any], dict[str, Any], dict[str, float]]]:
    """For every run that has the timing: who it was, the measured columns, and how likely they are by chance alone."""
    measured = [(about, calls[calls[timing].notna()], overhead) for about, calls, overhead in runs]
    measured = [of_run for of_run in measured if len(of_run[1])]
    fits = [_fit(calls["at"].to_numpy() / 3600, calls[timing].to_numpy()) for _, calls, _ in measured]
    biases = _biases(_compared([about for about, _, _ in measured]), fits)
    found = []
    for (about, calls, overhead), fit, bias in zip(measured, fits, biases, strict=True):
        chance: dict[str, float] = {}
        columns: dict[str, Any] = {
            "timing": timing,
            "num_anchors": fit.calls,
            "first_at": _time(calls["began"].min()),
            "last_at": _time(calls["began"].max()),
            "mean_at": _time(calls["at"].mean()),
            "anchor_ms": math.exp(fit.level),
            "spread": fit.spread,
        }
        long_enough = calls["began"].max() - calls["began"].min() >= LEAST_DRIFT_SECONDS
        if fit.slope is not None and fit.slope_error is not None and long_enough:
            columns |= _relative("drift_per_hour", fit.slope, fit.slope_error, fit.slope_freedom)
            chance["drift"] = _chance_of_t(fit.slope, fit.slope_error, fit.slope_freedom)
        if bias is not None:
            columns |= _relative("bias", *bias)
            if bias[1] is not None:
                chance["bias"] = _chance_of_t(*bias)
        if timing == "total_ms":
            columns |= {name: value for name, value in overhead.items() if name != "chance"}
            if (by_chance := overhead.get("chance")) is not None:
                chance["overhead"] = by_chance
        found.append((about, columns, chance))
    return found


def _compared(runs: list[dict[str, Any]]) -> list[Hashable]:
    """Per run: which worker it counts to; if it is the same for all, the run itself."""
    workers: list[Hashable] = [tuple(_none_if_null(about[name]) for name in _WHO) for about in runs]
    return workers if len(set(workers)) > 1 else list(range(len(runs)))


def _biases(workers: list[Hashable], fits: list[_Fit]) -> list[tuple[float, float | None, int] | None]:
    """Per run: distance of its level from the median of the workers, standard error (None: unknown) and freedom."""
    names = list(dict.fromkeys(workers))
    if len(names) < 2:
        return [None] * len(fits)
    of_worker = np.array([names.index(worker) for worker in workers])
    levels = np.array([fit.level for fit in fits])
    calls = np.array([fit.calls for fit in fits], dtype=float)
    share = calls / np.bincount(of_worker, calls)[of_worker]
    level_of_worker = np.bincount(of_worker, share * levels)
    squares = np.bincount(of_worker, [fit.squares for fit in fits])
    freedom = np.bincount(of_worker, [fit.freedom for fit in fits])
    known = freedom > 0
    # Whose calls do not tell how noisy it is counts like the others, but only where it is in the middle.
    pooled = squares.sum() / max(freedom.sum(), 1)
    noise = np.where(known, squares / np.maximum(freedom, 1), pooled)
    freedom = np.where(known, freedom, freedom.sum())
    variances = noise[of_worker] / calls * np.array([fit.widening for fit in fits]) ** 2

    order = np.argsort(level_of_worker, kind="stable")
    middle = order[(len(order) - 1) // 2 : len(order) // 2 + 1]
    median = float(level_of_worker[middle].mean())
    of_median = np.where(np.isin(of_worker, middle), share / len(middle), 0.0)
    found: list[tuple[float, float | None, int] | None] = []
    for run, level in enumerate(levels):
        distance = float(level) - median
        if not known[of_worker[run]]:
            found.append((distance, None, 0))
            continue
        own = np.zeros(len(fits))
        own[run] = 1.0
        # Two workers are both in the middle, and what they share cancels; of more, it is chance who is in the middle.
        parts = (own - of_median) ** 2 if len(names) == 2 else own + of_median**2
        found.append((distance, *_welch(np.bincount(of_worker, parts * variances), freedom)))
    return found


def _welch(variances: np.ndarray, freedom: np.ndarray) -> tuple[float, int]:
    """Standard error of a sum from the variances of its parts, and degrees of freedom by Welch-Satterthwaite."""
    counts = variances > 0
    total = float(variances.sum())
    if not counts.any():
        return 0.0, int(freedom.min())
    effective = total**2 / float((variances[counts] ** 2 / freedom[counts]).sum())
    return math.sqrt(total), max(1, int(effective + 1e-9))


def _relative(name: str, distance: float, error: float | None, freedom: int) -> dict[str, float]:
    """A distance of logarithms as a relative change, with the larger side of its 95 % interval."""
    change = math.expm1(_capped(distance))
    if error is None:
        return {name: change}
    reach = half_width_95(freedom + 1) * error
    return {name: change, f"{name}_ci95": math.exp(_capped(distance)) * math.expm1(min(reach, _LARGEST))}


def _capped(exponent: float) -> float:
    return min(max(exponent, -_LARGEST), _LARGEST)


# -- what marking costs -----------------------------------------------------------------------------------------------


def _overhead(answers: pd.DataFrame) -> dict[str, float | None]:
    """overhead, its half-width, and how likely so many pairs above MOST_OVERHEAD are by chance; of one run."""
    logs = np.log(answers["total_ms"])
    pairs = logs.groupby([answers["visit"], answers["pair"], answers["marked"].astype(bool)]).median().unstack()
    if not {True, False} <= set(pairs.columns):
        return {}
    ratios = (pairs[True] - pairs[False]).dropna()
    if ratios.empty:
        return {}
    median = float(ratios.median())
    alone = _independent_pairs(ratios, median)
    if alone < FEWEST_PAIRS:
        return {"overhead": math.expm1(median)}
    reach = Z95 / 2 / math.sqrt(alone)
    # Ranks are rounded up, as in the reference.
    low, high = np.quantile(ratios, [max(0.0, 0.5 - reach), min(1.0, 0.5 + reach)], method="inverted_cdf")
    half_width = max(math.expm1(high) - math.expm1(median), math.expm1(median) - math.expm1(low))
    # Sign test: were the overhead just what is allowed, half of the pairs would be above it.
    above = float((ratios > math.log1p(MOST_OVERHEAD)).mean())
    chance = 2 * NormalDist().cdf(-(2 * above - 1) * math.sqrt(alone))
    return {"overhead": math.expm1(median), "overhead_ci95": half_width, "chance": min(1.0, chance)}


def _independent_pairs(ratios: pd.Series, median: float) -> float:
    """How many pairs the pairs are worth: fewer where those of a call lie on the same side of the median."""
    above = pd.Series(np.sign(ratios.to_numpy() - median))
    calls = pd.Series(ratios.index.get_level_values("visit"))
    clustered = clustered_standard_error(above, calls)
    plain = clustered_standard_error(above, pd.Series(range(len(above))))
    if clustered is None or not plain:
        return float(calls.nunique()) if clustered is None else float(len(above))
    return len(above) / max(1.0, (clustered / plain) ** 2)


# -- findings ---------------------------------------------------------------------------------------------------------


def _unlikely(places: list[tuple[Any, ...]], chances: list[dict[str, float]]) -> list[set[str]]:
    """Per row: what is too unlikely to be chance, among all that is judged in its place."""
    judged: Counter[tuple[Any, ...]] = Counter()
    for place, chance in zip(places, chances, strict=True):
        judged[place] += len(chance)
    return [
        {name for name, p in chance.items() if p * judged[place] <= CHANCE}
        for place, chance in zip(places, chances, strict=True)
    ]


def _findings(row: Mapping[str, Any], unlikely: set[str]) -> list[str]:
    found = []
    bias, drift = row.get("bias", 0.0), row.get("drift_per_hour", 0.0)
    if "bias" in unlikely and abs(bias) > max(MOST_BIAS, row["bias_ci95"]):
        found.append("slow" if bias > 0 else "fast")
    if "drift" in unlikely and abs(drift) > max(MOST_DRIFT_PER_HOUR, row["drift_per_hour_ci95"]):
        hours = (row["last_at"] - row["first_at"]).total_seconds() / 3600
        if abs(math.expm1(_capped(math.log1p(drift) * hours))) > LEAST_CHANGE:
            found.append("drift")
    if (row.get("spread") or 0.0) > MOST_SPREAD:
        found.append("spread")
    if "overhead" in unlikely and row["overhead"] - row["overhead_ci95"] > MOST_OVERHEAD:
        found.append("overhead")
    return found


def _chance_of_t(distance: float, error: float | None, freedom: int) -> float:
    """Probability of a distance at least this large, either way, where there is none."""
    if not error:
        return 0.0 if distance else 1.0
    return student_t_chance(distance / error, freedom)


def _trends_frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    # Through Arrow, so that types and nulls are those of a result folder.
    declared = to_table("workers", [{name: row[name] for name in _COLUMNS if name in row} for row in rows])
    made: pd.DataFrame = declared.to_pandas()
    made["findings"] = pd.Series([list(found) for found in made["findings"]], index=made.index, dtype=object)
    for position, name in enumerate(_PLACE):
        made.insert(position, name, pd.Series([row[name] for row in rows], index=made.index, dtype=object))
    return made[_TRENDS]


# -- correction -------------------------------------------------------------------------------------------------------


def _lines(trends: pd.DataFrame, timing: str) -> pd.DataFrame:
    """One line per run and place: bias and slope in logarithms (0 where they do not count), and times in seconds."""
    of_timing = trends[trends["timing"] == timing]
    lines = _keyed(of_timing)
    for moment in ("first", "last"):
        lines[moment] = _seconds(of_timing, f"{moment}_at").to_numpy()
    if "mean_at" in of_timing:
        lines["mean"] = _seconds(of_timing, "mean_at").to_numpy()
    else:
        lines["mean"] = (lines["first"] + lines["last"]) / 2
    bias, interval = _floats(of_timing, "bias").to_numpy(), _floats(of_timing, "bias_ci95").to_numpy()
    lines["bias"] = np.log1p(np.where(np.abs(bias) > interval, bias, 0.0))
    drifts = np.array(["drift" in _list(found) for found in of_timing["findings"]], dtype=bool)
    lines["slope"] = np.log1p(np.where(drifts, _floats(of_timing, "drift_per_hour").to_numpy(), 0.0))
    # Null names nobody: rows without a worker, session or anchor are not each other's.
    return lines.dropna(subset=[*_ANCHOR, *_RUN])


# -- in words ---------------------------------------------------------------------------------------------------------


def _shares(trends: pd.DataFrame) -> list[float]:
    """Per row: the share of its timing in the answer of the anchor; of tpot_ms that of decode_ms, which it makes up."""
    keys = [*(name for name in _ANCHOR if name in trends), *_RUN]
    of_run = trends.groupby(keys, sort=False, dropna=False).ngroup().tolist() if len(trends) else []
    timings, took = trends["timing"].tolist(), trends["anchor_ms"].tolist()
    known = {(run, timing): ms for run, timing, ms in zip(of_run, timings, took, strict=True)}
    return [
        known.get((run, "decode_ms" if timing == "tpot_ms" else timing), math.inf) / known.get((run, "total_ms"), ms)
        for run, timing, ms in zip(of_run, timings, took, strict=True)
    ]


def _count(trends: pd.DataFrame, who: list[str]) -> list[int]:
    """Per row: how many workers, or runs, timed the same."""
    keys = [*(name for name in _ANCHOR if name in trends), "timing"]
    if trends.empty:
        return []
    of_whom = trends.groupby(who, sort=False, dropna=False).ngroup()
    counts = of_whom.groupby([trends[key] for key in keys], sort=False, dropna=False).transform("nunique")
    return [int(count) for count in counts]


def _who(row: Mapping[str, Any]) -> str:
    uuid = _none_if_null(row["device_uuid"])
    # The first group of digits tells the GPUs of a cluster apart.
    return str(row["worker"]) if uuid is None else f"{row['worker']} ({'-'.join(str(uuid).split('-')[:2])})"


def _where(row: Mapping[str, Any]) -> str:
    model = _none_if_null(row.get("model"))
    return row["timing"] if model is None else f"{row['timing']} of {model}"


def _percent(change: float, interval: float) -> str:
    digits = 1 if not interval < 0.0005 else 2
    shown = f"{100 * abs(change):.{digits}f} %"
    return shown if pd.isna(interval) else f"{shown} ± {100 * interval:.{digits}f}"


def _slow_or_fast(row: Mapping[str, Any], workers: int, runs: int) -> str:
    way, by = "slower" if row["bias"] > 0 else "faster", _percent(row["bias"], row["bias_ci95"])
    if workers == 1:
        since = f"{row['session_started_at']:%Y-%m-%d %H:%M}"
        return f"{_who(row)} was {by} {way} from {since} on than in the median of its {runs} runs in {_where(row)}"
    return f"{_who(row)} is {by} {way} than the median of {workers} workers in {_where(row)}"


def _drifting(row: Mapping[str, Any], workers: int, runs: int) -> str:
    drift = row["drift_per_hour"]
    way = "slower" if drift > 0 else "faster"
    hours = (row["last_at"] - row["first_at"]).total_seconds() / 3600
    seen = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"
    change = _percent(drift, row["drift_per_hour_ci95"])
    return f"{_who(row)} became {change} {way} per hour, over {seen}, in {_where(row)}"


def _unsteady(row: Mapping[str, Any], workers: int, runs: int) -> str:
    return (
        f"{_who(row)} is unsteady: {100 * row['spread']:.1f} % standard deviation from one anchor to the next in "
        f"{_where(row)}, more than {100 * MOST_SPREAD:g} %"
    )


def _costly(row: Mapping[str, Any], workers: int, runs: int) -> str:
    cost = _percent(row["overhead"], row["overhead_ci95"])
    model = _none_if_null(row.get("model"))
    answer = f"a {row['anchor_ms']:.3g} ms answer" + ("" if model is None else f" of {model}")
    return f"marking the stages costs {cost} of {answer} on {_who(row)}, more than {100 * MOST_OVERHEAD:g} %"


_WORDS = {"slow": _slow_or_fast, "fast": _slow_or_fast, "drift": _drifting, "spread": _unsteady, "overhead": _costly}
