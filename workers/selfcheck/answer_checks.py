"""What is good enough to measure on: figures of repeated answers to checks, each with its limit and its remedy.

Nothing is measured here, see `workers.selfcheck`; `machine_checks` judges what a machine says of itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from workers.selfcheck.figures import ERROR_LIMIT, Figures

# Marks may add this share: half a millisecond to an answer of 100 ms.
OVERHEAD_LIMIT = 0.005
# One answer in twenty may be disturbed: a sweep marks it invalid and leaves it out.
DISTURBED_SHARE = 0.05
# Answers that a sweep times per combination at most if nothing else is said: 64 samples, 10 times each.
ANSWERS_OF_A_SWEEP = 640
# Calls that a sweep discards before it times (`latency: {warmup: 1}`).
WARM_UP = 1
# Two of them per answer of 100 ms make a sweep a fifth longer.
SNAPSHOT_LIMIT_MS = 10.0
# Beyond so many answers their number says no more.
MANY = 100_000
# Where later calls scatter by more than this, nothing can be said of the first ones.
TOO_SCATTERED = 0.25
# The standard deviation of 8 values is larger than this many times the true one in 2 of 100 cases.
BY_CHANCE = 1.5
# The clocks of device and host are quartz, good to about 0.01 %.
TIMERS_LIMIT = 0.001


class Verdict(StrEnum):
    """OK: within the limit. DOUBTFUL: beyond it. NOT_TOLD: the machine does not say, or noise hides the answer."""

    OK = "ok"
    DOUBTFUL = "doubtful"
    NOT_TOLD = "not told"


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        value: what was found, with unit and interval.
        limit: what would still be ok.
        remedy: what to do, in plain words, where there is something to do.
    """

    name: str
    value: str
    limit: str
    verdict: Verdict
    remedy: str | None = None


def verdict(checks: Sequence[Check]) -> str:
    """All checks in words."""
    doubtful = [each.name for each in checks if each.verdict is Verdict.DOUBTFUL]
    not_told = [each.name for each in checks if each.verdict is Verdict.NOT_TOLD]
    untold = f" Not told: {', '.join(not_told)}." if not_told else ""
    if not doubtful:
        as_far = ", as far as it tells" if not_told else ""
        return f"nothing is doubtful{as_far}: this machine, as it is now, is fit to measure on.{untold}"
    return (
        f"doubtful in {len(doubtful)} of {len(checks)} checks ({', '.join(doubtful)}): take times from this machine, "
        f"as it is now, with care; the lines with -> say what to do.{untold}"
    )


# -- what measuring does to the measured ------------------------------------------------------------------------------


def overhead(figures: Figures) -> Check:
    """Three outcomes, because an interval that holds the limit says neither."""
    found, half_width = figures.overhead, figures.overhead_half_width
    judged = against(found, half_width, OVERHEAD_LIMIT, one_sided=True)
    value = (
        f"marking the stages adds {signed(found, half_width)} to an answer of {figures.answer_ms:.1f} ms "
        f"({figures.pairs} pairs)"
    )
    return Check(
        "overhead",
        value,
        f"at most {percent(OVERHEAD_LIMIT)}",
        judged,
        {
            Verdict.DOUBTFUL: "the times of a sweep are that much too long here; time longer answers, or rely on "
            "differences between combinations, which marks leave alone",
            Verdict.NOT_TOLD: "the interval holds the limit: measure longer (--seconds) or on a quieter machine",
        }.get(judged),
    )


def residual(figures: Figures) -> Check:
    """On a GPU two clocks have to agree for it; on a CPU it says only that total encloses the stages."""
    bad = figures.residual_mean > ERROR_LIMIT or figures.residual_excess > DISTURBED_SHARE
    value = (
        f"{percent(figures.residual_mean)} of an answer is in no stage on average, at the most "
        f"{percent(figures.residual_largest)}{'' if figures.on_gpu else ' (by one clock)'}"
    )
    remedy = (
        "the stages do not add up to the total: the host is interrupted around answers, see load by others, or the "
        "device's clock and the host's disagree, see timers"
        if figures.on_gpu
        else "the stages do not add up to the total: the process is interrupted around answers, see load by others"
    )
    return check("residual", value, f"mean at most {percent(ERROR_LIMIT)}", bad, remedy)


def timers(figures: Figures) -> Check:
    limit = f"at most {percent(TIMERS_LIMIT)}"
    if figures.timers_differ is None:
        return Check("timers", "the device's clock could not be compared with the host's", limit, Verdict.NOT_TOLD)
    value = f"the GPU's clock runs {figures.timers_differ * 100:+.3f} % against the host's"
    remedy = (
        "stages (GPU's clock) and totals (host's) are on different scales: see the host's clock source "
        "(/sys/devices/system/clocksource) and its time synchronisation"
    )
    return check("timers", value, limit, abs(figures.timers_differ) > TIMERS_LIMIT, remedy)


def snapshot(figures: Figures) -> Check:
    value = f"asking the machine for its conditions takes {figures.snapshot_ms:.2f} ms, twice per answer, untimed"
    remedy = "sweeps last longer for it, times stay right: turn persistence mode on, stop monitors that poll the driver"
    limit = f"at most {SNAPSHOT_LIMIT_MS:.0f} ms"
    return check("snapshot", value, limit, figures.snapshot_ms > SNAPSHOT_LIMIT_MS, remedy)


def engine(figures: Figures) -> Check:
    value = f"answers were decoded by {figures.engine}: {figures.engine_note}"
    return check("engine", value, "as asked for", True, "all figures are of that engine; a sweep would do the same")


# -- what repeating shows ---------------------------------------------------------------------------------------------


def noise(figures: Figures) -> Check:
    limit = f"at most {ANSWERS_OF_A_SWEEP}"
    if not figures.noise:
        return Check("noise", "too few answers", limit, Verdict.NOT_TOLD, "measure longer: --seconds")
    each_time = ", ".join(
        f"{percent(each.spread)} of {each.name} ({each.median_ms:.{1 if each.median_ms >= 10 else 2}f} ms)"
        for each in figures.noise
    )
    worst = max(figures.noise, key=lambda each: each.repeats_needed)
    value = (
        f"the middle half of the repeats spans {each_time}; to know each median to ±{percent(ERROR_LIMIT)} takes "
        f"{'' if worst.repeats_needed <= MANY else 'over '}{count(min(worst.repeats_needed, MANY), 'answer')}"
    )
    remedy = (
        "see load by others, clock and settings for what disturbs; else raise samples or repeats under latency in the "
        f"sweep, which times {ANSWERS_OF_A_SWEEP} answers per combination if nothing is said"
    )
    return check("noise", value, limit, worst.repeats_needed > ANSWERS_OF_A_SWEEP, remedy)


def warm_up(figures: Figures) -> Check:
    slow, discarded = figures.slow_calls, figures.discarded_calls
    value = (
        f"the first call took {figures.first_ms:.0f} ms, later ones {figures.settled_ms:.0f} ms; {slow} of "
        f"{figures.calls} calls came before it settled"
    )
    limit = f"at most {discarded}, as a sweep discards"
    if figures.settled_within > TOO_SCATTERED:
        remedy = (
            f"later calls scatter by {percent(figures.settled_within)}: find what disturbs first, see load by others"
        )
        return Check("warm-up", value, limit, Verdict.NOT_TOLD, remedy)
    remedy = (
        f"write latency: {{warmup: {slow - discarded + WARM_UP}}} into the sweep, so that it discards as many; where "
        "load by others is doubtful, that may be all there is to it"
    )
    return check("warm-up", value, limit, slow > discarded, remedy)


def anchor(figures: Figures) -> Check:
    medians = figures.group_medians_ms
    limit = f"at most {percent(ERROR_LIMIT)}"
    if len(medians) < 3:
        return Check("anchor", "too few answers to make groups", limit, Verdict.NOT_TOLD, "measure longer: --seconds")
    value = (
        f"the same answer in {len(medians)} groups over {figures.seconds:.0f} s: medians {min(medians):.1f} to "
        f"{max(medians):.1f} ms, spread {percent(figures.spread)}"
    )
    remedy = (
        "the machine is not the same from one moment to the next: see drift, clock and load by others; compare only "
        "what one sweep has timed in turns"
    )
    if ERROR_LIMIT < figures.spread <= BY_CHANCE * figures.spread_by_noise:
        remedy = "noise alone spreads groups of so few answers as much: measure longer (--seconds)"
        return Check("anchor", value, limit, Verdict.NOT_TOLD, remedy)
    return check("anchor", value, limit, figures.spread > ERROR_LIMIT, remedy)


def drift(figures: Figures) -> Check:
    """Judged by the change over the check; per hour it is an extrapolation from a minute, and shown as one."""
    limit = f"±{percent(ERROR_LIMIT)} over the check"
    hours = figures.seconds / 3600
    change, half_width = figures.slope_per_hour * hours, figures.slope_half_width * hours
    if not math.isfinite(half_width):
        return Check("drift", "too few groups for a line", limit, Verdict.NOT_TOLD, "measure longer: --seconds")
    judged = against(change, half_width, ERROR_LIMIT)
    # A per cent over the check is many per hour, of which no digit behind the point is known.
    per_hour = f"{figures.slope_per_hour * 100:+.0f} ± {figures.slope_half_width * 100:.0f} %/h"
    value = f"the time of an answer changed by {signed(change, half_width)} in {figures.seconds:.0f} s ({per_hour})"
    return Check(
        "drift",
        value,
        limit,
        judged,
        {
            Verdict.DOUBTFUL: "still warming up or slowing down: let it run loaded for some minutes, then check again; "
            "see clock, heat and load by others",
            Verdict.NOT_TOLD: "too noisy to see a drift of that size: measure longer (--seconds)",
        }.get(judged),
    )


# -- words ------------------------------------------------------------------------------------------------------------


def check(name: str, value: str, limit: str, bad: bool, remedy: str) -> Check:
    """A check with two outcomes; the remedy goes with the bad one."""
    return Check(name, value, limit, Verdict.DOUBTFUL if bad else Verdict.OK, remedy if bad else None)


def against(found: float, half_width: float, limit: float, *, one_sided: bool = False) -> Verdict:
    """Whether an interval is all within a limit, all beyond it, or says neither; one-sided where less is better."""
    size = found if one_sided else abs(found)
    if size + half_width <= limit:
        return Verdict.OK
    return Verdict.DOUBTFUL if size - half_width > limit else Verdict.NOT_TOLD


def percent(share: float) -> str:
    """With as many digits as say something: 12 %, 3.4 %, 0.05 %."""
    value = 100 * share
    digits = 0 if abs(value) >= 9.95 or value == round(value) else 1 if abs(value) >= 0.095 else 2
    return f"{value:.{digits}f} %"


def signed(share: float, half_width: float) -> str:
    """With the digits that its interval leaves: +0.11 ± 0.59 %, -2.3 ± 9.0 %."""
    if not math.isfinite(half_width):
        return f"{100 * share:+.1f} %"
    digits = 2 if half_width < 0.01 else 1 if half_width < 0.1 else 0
    return f"{100 * share:+.{digits}f} ± {100 * half_width:.{digits}f} %"


def count(number: float, word: str, ending: str = "s") -> str:
    """3 calls, 1 call, 2.5 cores, 12,000 answers."""
    return f"{format(number, ',' if isinstance(number, int) else 'g')} {word}{'' if number == 1 else ending}"
