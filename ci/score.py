"""How good the conformance suite is: do its cases reject every wrong backend, and no right one?

    python ci/score.py

Judges every backend of tests/mutants by the cases that must reject it, and every backend of
tests/rewrites by all cases that it can answer otherwise. Prints a table and two scores, and names
the mutants that survived and the rewrites that failed; exit code 1 if there are any. Two minutes
on two cores.
"""

import os
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
os.environ["OMP_NUM_THREADS"] = "1"  # before torch: the processes share the cores

import torch
from mutants import table as mutants
from mutants.rejecting import accept, control, rejection
from rewrites import table as rewrites
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from moge_hal.conformance.subject import Subject

WORKERS = os.cpu_count() or 1
OFFSETS = range(2)  # the list's own inputs, and others of the same shapes
MUTANTS_AT_ONCE = 25
CASES_AT_ONCE = 40
SHOWN = 30  # of all faults


@dataclass
class Part:
    """What some mutants or some cases came to."""

    group: str  # the file of the mutants, or the operation of the cases
    judged: int = 0
    faults: list[str] = field(default_factory=list)
    nearest: float = 0.0  # error/limit of the right backend that came nearest to its limit
    where: str = ""


def judge_mutants(start: int) -> list[Part]:
    """Some of the mutants, each by all of its cases."""
    torch.set_num_threads(1)
    parts = []
    for mutant in mutants.MUTANTS[start : start + MUTANTS_AT_ONCE]:
        part = Part(mutant.__module__.removeprefix("mutants."), 1)
        for case in mutants.cases_of(mutant):
            right = control(mutant)
            try:
                accept(right, case)
                reason = rejection(mutant, case)
            except Exception as error:  # by a slip of the mutant or its control; proves nothing
                part.faults.append(f"{mutant.__name__} or {right.__name__} in {case}: {error!r}")
            else:
                if reason is None:
                    part.faults.append(f"{mutant.__name__} survives {case}")
        parts.append(part)
    return parts


def judge_rewrites(start: int) -> list[Part]:
    """Some of the cases, each for all rewrites that it concerns."""
    torch.set_num_threads(1)
    found: dict[str, Part] = {}
    subjects = {rewrite: Subject(rewrite()) for rewrite in rewrites.REWRITES}
    for case, concerned in list(rewrites.cases(OFFSETS))[start : start + CASES_AT_ONCE]:
        part = found.setdefault(case.op, Part(case.op))
        for rewrite in concerned:
            part.judged += 1
            try:
                near = rewrites.nearness(subjects[rewrite], case)
            except Exception as error:  # a right backend raises nothing at all
                ratio = rewrites.ratio(error)
                part.faults.append(f"{rewrite.__name__} fails {case.id}: {error}{ratio}")
            else:
                if near > part.nearest:
                    part.nearest, part.where = near, f"{rewrite.__name__}, {case.id}"
    return list(found.values())


def run() -> tuple[list[Part], list[Part]]:
    """Everything, in other processes: what the mutants and what the rewrites came to."""
    work = [(judge_rewrites, i) for i in starts(len(list(rewrites.cases(OFFSETS))), CASES_AT_ONCE)]
    work += [(judge_mutants, i) for i in starts(len(mutants.MUTANTS), MUTANTS_AT_ONCE)]
    wrong: list[Part] = []
    right: list[Part] = []
    with ProcessPoolExecutor(WORKERS, get_context("spawn")) as pool, Progress() as progress:
        bar = progress.add_task("judging", total=len(work))
        jobs = {pool.submit(task, start): task for task, start in work}
        for job in as_completed(jobs):
            (wrong if jobs[job] is judge_mutants else right).extend(job.result())
            progress.advance(bar)
    return wrong, right


def starts(count: int, step: int) -> Iterable[int]:
    return range(0, count, step)


def merged(parts: Iterable[Part]) -> list[Part]:
    """One of each group, in the order of their names."""
    groups: dict[str, Part] = {}
    for part in parts:
        whole = groups.setdefault(part.group, Part(part.group))
        whole.judged += part.judged
        whole.faults += part.faults
        if part.nearest > whole.nearest:
            whole.nearest, whole.where = part.nearest, part.where
    return [groups[name] for name in sorted(groups)]


def report(wrong: list[Part], right: list[Part], console: Console) -> bool:
    """Prints all there is to say; True if there is no fault."""
    table = Table("mutants", "judged", "rejected")
    for part in merged(wrong):
        rejected = sum(not one.faults for one in wrong if one.group == part.group)
        table.add_row(part.group, str(part.judged), str(rejected))
    console.print(table)
    table = Table("rewrites", "cases", "failures", "nearest to its limit", "that of")
    for part in merged(right):
        near = f"{part.nearest:.2f}"
        by = part.where.partition(",")[0]
        table.add_row(part.group, f"{part.judged:,}", str(len(part.faults)), near, by)
    console.print(table)
    faults = [fault for part in [*merged(wrong), *merged(right)] for fault in part.faults]
    for fault in faults[:SHOWN]:
        console.print(fault, markup=False, highlight=False, soft_wrap=True)
    if len(faults) > SHOWN:
        console.print(f"and {len(faults) - SHOWN} more")
    rejected, count = sum(not part.faults for part in wrong), len(wrong)
    failures, cases = sum(len(part.faults) for part in right), sum(p.judged for p in right)
    nearest = max(right, key=lambda part: part.nearest, default=Part(""))
    console.print(f"mutants rejected {rejected} of {count} ({rejected / count:.0%})")
    near = f"nearest to its limit {nearest.nearest:.2f} ({nearest.where})"
    console.print(f"rewrites: {failures} failures in {cases:,} cases, {near}", soft_wrap=True)
    return not faults


if __name__ == "__main__":
    sys.exit(0 if report(*run(), Console()) else 1)
