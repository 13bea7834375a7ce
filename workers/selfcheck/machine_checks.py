"""What a machine says of itself while it is measured on: clock, heat, others, settings; see `answer_checks`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from workers.nvml import HW_POWER_BRAKE, HW_SLOWDOWN, HW_THERMAL, SW_THERMAL
from workers.selfcheck.answer_checks import DISTURBED_SHARE, Check, Verdict, check, count, percent
from workers.selfcheck.figures import Figures
from workers.validity import CLOCK_DROP, CPU_SHARE, OWN_UNCOUNTED_BYTES, THERMAL_SHARE, Reason

# Of the clock events those that no setting asks for.
_PROTECTION = frozenset({SW_THERMAL, HW_THERMAL, HW_SLOWDOWN, HW_POWER_BRAKE})


def clock(figures: Figures) -> Check:
    whose = "the GPU's processors" if figures.on_gpu else "the CPU's cores (mean)"
    limit = f"falls by at most {percent(CLOCK_DROP)}"
    if figures.clock_mhz is None:
        return Check("clock", f"the clock of {whose} cannot be read", limit, Verdict.NOT_TOLD)
    low, high = figures.clock_mhz
    held = f"; held at times by {', '.join(figures.clock_events)}" if figures.clock_events else ""
    across = f"{low:.0f} MHz" if round(low) == round(high) else f"{low:.0f} to {high:.0f} MHz"
    value = f"{whose} ran at {across} around answers (medians of groups){held}"
    remedy = (
        "lock it (nvidia-smi --lock-gpu-clocks=MHZ), and see heat and settings"
        if figures.on_gpu
        else "set the governor to performance (cpupower frequency-set -g performance), and see heat and load by others"
    )
    return check("clock", value, limit, high > 0 and low < (1 - CLOCK_DROP) * high, remedy)


def heat(figures: Figures) -> Check:
    """A power limit that holds is shown, and judged by the clocks: times under it are the card's own."""
    limit = f"slowed by heat at most {percent(THERMAL_SHARE)} of the time"
    parts = []
    if figures.temperature_c is not None:
        parts.append("{:.0f} °C at the start, {:.0f} °C at the end".format(*figures.temperature_c))
    slowed, capped = figures.thermally_slowed_s, figures.power_capped_s
    if slowed is not None:
        parts.append(f"slowed by heat for {slowed:.1f} s of {figures.seconds:.0f} s")
    if capped is not None:
        parts.append(f"held by the power limit for {capped:.1f} s")
    if figures.throttlings is not None:
        parts.append(f"the kernel counted {count(figures.throttlings, 'slowdown')} by heat")
    named = _PROTECTION.intersection(figures.clock_events or ())
    if named:
        parts.append(f"the driver named {', '.join(sorted(named))}")
    if slowed is None and figures.throttlings is None and figures.clock_events is None:
        return Check("heat", ", ".join(parts) or "no sensor and no counter can be read", limit, Verdict.NOT_TOLD)
    bad = (slowed or 0.0) > THERMAL_SHARE * figures.seconds or bool(figures.throttlings) or bool(named)
    remedy = (
        "it runs too hot, or its supply protects itself: look at fans, air, neighbours and cables, or lower clock or "
        "power limit for good"
    )
    return check("heat", ", ".join(parts) or "never slowed by heat", limit, bad, remedy)


def others(figures: Figures) -> Check:
    needed = min(float(figures.threads_needed), figures.cores)
    most = figures.cores - needed + CPU_SHARE * needed
    parts, remedies = [], []
    limit = f"at most {most:.1f} cores"
    if figures.cores_others is not None:
        parts.append(
            f"others keep {figures.cores_others:.2f} of {figures.cores:g} cores busy, {needed:g} "
            f"{'is' if needed == 1 else 'are'} needed here"
        )
        if figures.cores_others > most:
            remedies.append(
                "others compute on this machine's cores: stop them (top shows which; a virtual machine's neighbours do "
                "not show), or use fewer threads (OMP_NUM_THREADS)"
            )
    if figures.on_gpu:
        limit += ", nobody on the GPU"
        if figures.foreign_processes is None:
            parts.append("who else is on the GPU is not told")
        else:
            parts.append(f"{count(figures.foreign_processes, 'other process', 'es')} on the GPU")
        if figures.foreign_processes:
            remedies.append("another process computes on the GPU: nvidia-smi shows which; stop it or take another GPU")
        elif (figures.other_memory_bytes or 0) > OWN_UNCOUNTED_BYTES:
            gib = (figures.other_memory_bytes or 0) / 1024**3
            parts.append(f"{gib:.1f} GiB of its memory in use beyond this process's tensors")
            remedies.append("somebody holds memory of the GPU, maybe in another container: ask, or take another GPU")
    told = figures.cores_others is not None and not (figures.on_gpu and figures.foreign_processes is None)
    if not told and not remedies:
        return Check("load by others", ", ".join(parts) or "the machine does not tell", limit, Verdict.NOT_TOLD)
    return check("load by others", ", ".join(parts), limit, bool(remedies), "; ".join(remedies))


_OF_A_REASON = {
    Reason.THERMAL_THROTTLE: "see heat",
    Reason.HARDWARE_SLOWDOWN: "the GPU's own protection slows it: power supply, cables, cooling",
    Reason.POWER_CAP: "the power limit sets in during answers: raise it, or lock a lower clock",
    Reason.CLOCK_DROP: "see clock",
    Reason.LIMITS_CHANGED: "somebody changes power limit or clocks while you measure",
    Reason.FOREIGN_PROCESS: "see load by others",
    Reason.CPU_BUSY: "see load by others",
}


def invalid_answers(figures: Figures) -> Check:
    found = sorted(figures.reasons.items(), key=lambda item: -item[1])
    named = f" ({', '.join(f'{reason} {count}' for reason, count in found)})" if found else ""
    value = f"{figures.invalid} of {count(figures.answers, 'answer')} would not count in a sweep{named}"
    remedy = "; ".join(dict.fromkeys(f"{_OF_A_REASON[Reason(reason)]}" for reason, _ in found))
    limit = f"at most {percent(DISTURBED_SHARE)} of them"
    return check("invalid answers", value, limit, figures.invalid > DISTURBED_SHARE * figures.answers, remedy)


def settings(figures: Figures, environment: Mapping[str, Any]) -> Check:
    """What whoever runs the machine can set; the value lists what is known, the remedies what is not as it should."""
    parts = [
        f"niceness {figures.niceness}",
        f"{count(environment['threads'], 'thread')} on {count(_usable(environment), 'core')}",
        *(f"governor {name}" for name in [environment["cpu_governor"]] if name is not None),
        *(
            f"{words} {'on' if environment[key] else 'off'}"
            for key, words in (("persistence_mode", "persistence mode"), ("ecc", "ECC"), ("mig", "MIG"))
            if environment[key] is not None
        ),
    ]
    remedies = list(_set_wrongly(figures, environment))
    return check("settings", ", ".join(parts), "as recommended", bool(remedies), "; ".join(remedies))


def _set_wrongly(figures: Figures, environment: Mapping[str, Any]) -> Iterator[str]:
    if figures.niceness > 0:
        yield f"this process has niceness {figures.niceness}, so others go first: start it without nice"
    if environment["threads"] > _usable(environment):
        yield (
            f"{environment['threads']} threads have to share {_usable(environment):g} cores: set "
            f"OMP_NUM_THREADS={max(1, int(_usable(environment)))}"
        )
    if environment["cpu_governor"] not in (None, "performance"):
        yield (
            f"the CPU's governor is {environment['cpu_governor']}, which changes clocks as it sees fit: cpupower "
            "frequency-set -g performance"
        )
    if environment["persistence_mode"] is False:
        yield "persistence mode is off, so the first call pays for waking the GPU: nvidia-smi -pm 1"
    limit, default = environment["power_limit_w"], environment["default_power_limit_w"]
    if limit is not None and default is not None and limit < default:
        yield f"the power limit is {limit:.0f} W, by default {default:.0f} W: nvidia-smi -pl {default:.0f}"
    if environment["mig"]:
        yield "the GPU is split into slices (MIG), whose neighbours share power and clocks: measure on a whole one"


def _usable(environment: Mapping[str, Any]) -> float:
    cores = float(environment["cpu_usable_cores"] or 1)
    return cores if environment["cpu_quota"] is None else min(cores, environment["cpu_quota"])
