"""Run a sweep: `python -m orchestrator.run SPEC`. This file is the table of contents of everything that happens."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.block_choice import Unfinished, choices_so_far, choose_blocks
from orchestrator.plan import Plan, make_plan
from orchestrator.resolve import accelerators_wanted, planned_models, refuse_unavailable, resolve
from orchestrator.spec import SpecError, Sweep, load_sweep
from orchestrator.store import ResultStore, StoreError, read_finished, results_folder
from orchestrator.summary import (
    print_combinations,
    print_engines,
    print_failures,
    print_place,
    print_plan,
    print_questions,
    print_results,
    print_trust,
    print_vision_checks,
    print_warnings,
)
from workers.probes import local_accelerators

if TYPE_CHECKING:
    from orchestrator.record import Recorder
    from orchestrator.schedule import Scheduler
    from workers.tasks import Task

DONE, SOME_FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130
READER_GONE = 141  # what a shell reports of a program whose reader, such as `head`, has closed the pipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 all done, 1 something failed, 2 the sweep or the environment is wrong, 130 interrupted."""
    options = _parser().parse_args(arguments)
    try:
        sweep = load_sweep(options.spec)
        refuse_unavailable(sweep)
        root = results_folder(
            options.results or sweep.results,
            sweep.name,
            root=options.results_root,
            in_job="RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ,
        )
        print_place(root)
        if options.dry_run:
            return dry_run(sweep, root, options.address)
        return run(sweep, root, options.address, options.retry_failed, options.wait)
    except (SpecError, StoreError) as error:
        print(error, file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        print("interrupted before anything was measured", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the exit would complain once more
        return READER_GONE


def dry_run(sweep: Sweep, root: Path, address: str | None) -> int:
    """Show what a run would do, without torch, Ray, weights or network."""
    if sweep.hardware is None and (address or os.environ.get("RAY_ADDRESS")):
        print("note: a dry run asks no cluster, so this is the plan for this machine; name its devices under hardware")
    accelerators = accelerators_wanted(sweep, local_accelerators())
    cards, datasets = resolve(sweep, offline=True)
    models = planned_models(sweep, cards, accelerators)
    choices, open_questions = choices_so_far(sweep, models, datasets, root)
    plan = make_plan(sweep, models, datasets, accelerators, choices)
    done, failed = read_finished(root, [task.task_id for task in plan.tasks])
    for dataset in datasets:
        if dataset.not_here:
            print(f"note: {dataset.not_here}, so this run cannot tell what is done of it")
    print_questions(open_questions)
    print_plan(plan, accelerators, done, failed)
    print_combinations(plan)
    return DONE


def run(sweep: Sweep, root: Path, address: str | None, retry_failed: bool, wait_minutes: float = 0.0) -> int:
    """Measure what is not there yet, commit each result as it arrives, and show the table."""
    # Imported here: a dry run needs no Ray.
    import ray

    from orchestrator.cluster import ClusterError, connect, pools_for, wait_for_devices
    from orchestrator.interrupt import Interruption
    from orchestrator.schedule import Scheduler

    cards, datasets = resolve(sweep, offline=False)
    store = ResultStore.open(root, sweep.name)
    interruption = Interruption()
    try:
        cluster = connect(address)
        interruption.listen()
        cluster = wait_for_devices(sweep, cluster, 60 * wait_minutes, interruption)
        accelerators = accelerators_wanted(sweep, list(cluster.gpus))
        pools = pools_for(sweep, accelerators, cluster)
        print(f"cluster: {cluster.address} with {cluster}; dashboard {cluster.dashboard or 'off'}")
        print(f"workers: {', '.join(map(str, pools))}")
        models = planned_models(sweep, cards, accelerators)
        with Scheduler(pools, interruption, 60 * sweep.task_timeout_minutes) as scheduler:

            def measure(plan: Plan) -> Recorder:
                return _measure(sweep, plan, store, scheduler, retry_failed)

            def measure_blocks(tasks: Sequence[Task]) -> Recorder:
                recorder = measure(Plan.of_tasks(tasks))
                print_failures(recorder.failures(), recorder.failed_rows(), recorder.failed_samples())
                return recorder

            choices = choose_blocks(sweep, models, datasets, root, measure_blocks)
            plan = make_plan(sweep, models, datasets, accelerators, choices.by_model)
            if not plan.tasks and not choices.failed:
                what = "nothing to run, no model of the sweep can take any of the combinations"
                print_plan(plan, accelerators, (), ())
                raise SpecError([sweep.problem("knobs", what)])
            recorder = measure(plan)
        return _conclude(sweep, recorder, store, interrupted=interruption(), unresolved=choices.failed)
    except Unfinished as unfinished:
        print(f"{unfinished}; the same command goes on from there")
        print_place(store.root)
        return INTERRUPTED
    except ClusterError as error:
        print(error, file=sys.stderr)
        return WRONG
    finally:
        ray.shutdown()
        interruption.restore()
        store.close()


def _measure(sweep: Sweep, plan: Plan, store: ResultStore, scheduler: Scheduler, retry_failed: bool) -> Recorder:
    """Run what is not there yet of a plan, and commit each result as it arrives."""
    from orchestrator.progress import ProgressReport
    from orchestrator.record import Recorder

    recorder = Recorder(store, sweep, plan, retry_failed=retry_failed)
    recorder.note_run()
    recorder.catch_up()
    print_plan(plan, plan.accelerators, recorder.done, recorder.failed)
    print_warnings(store.warnings)
    with ProgressReport(len(plan.tasks), len(recorder.done), len(recorder.failed)) as progress:
        recorder.commit_all(scheduler.run(recorder.todo(), progress.heartbeat), progress.ended)
    return recorder


def _conclude(
    sweep: Sweep, recorder: Recorder, store: ResultStore, *, interrupted: bool, unresolved: bool = False
) -> int:
    workers = recorder.compare_workers(correct=not interrupted)
    results, failures = recorder.results(), recorder.failures()
    failed_rows, failed_samples = recorder.failed_rows(), recorder.failed_samples()
    print_warnings(store.warnings)
    if len(results):
        print_results(results)
        print_engines(results)
        print_trust(results, workers, recorder.anchor_failures)
    if sweep.knobs.vision_axis is not None:
        print_vision_checks(recorder.vision_rows())
    print_failures(failures, failed_rows, failed_samples)
    if interrupted:
        done, total = len(recorder.done), recorder.num_tasks
        print(f"interrupted: {done} of {total} tasks are done; the same command goes on from there")
    print_place(store.root)
    if interrupted:
        return INTERRUPTED
    return SOME_FAILED if unresolved or len(failures) or failed_rows or recorder.todo() else DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m orchestrator.run", description="Run a sweep of run-time knobs.")
    parser.add_argument("spec", help="sweep file (YAML)")
    parser.add_argument("--dry-run", action="store_true", help="show combinations, tasks and skips, run nothing")
    parser.add_argument("--results", metavar="FOLDER", help="where results go, instead of what the sweep says")
    parser.add_argument(
        "--results-root", metavar="FOLDER", help="what a relative results folder is relative to (default: here)"
    )
    parser.add_argument("--address", help="Ray cluster: HOST:PORT, ray://HOST:PORT, auto or local")
    parser.add_argument(
        "--wait",
        type=_minutes,
        default=0.0,
        metavar="MINUTES",
        help="wait for devices that the cluster lacks (default: 0)",
    )
    parser.add_argument("--retry-failed", action="store_true", help="run again what failed before")
    return parser


def _minutes(text: str) -> float:
    with suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number of minutes, not {text!r}")


if __name__ == "__main__":
    sys.exit(main())
