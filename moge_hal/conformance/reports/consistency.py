"""What a report must be to be believed at all: whole, and free of contradictions.

No backend runs here, so this holds for a report from a chip that nobody here has. Whether what it
says is true is for `verify.py` to find out.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator

from moge_hal.conformance.cases import DTYPES, Case
from moge_hal.conformance.reports.provenance import suite_hash
from moge_hal.conformance.reports.report import Report, Reported
from moge_hal.conformance.result import WORDS, Outcome, Selection
from moge_hal.conformance.selection import select
from moge_hal.ops import NAMES
from moge_hal.registry import LEVELS, PROFILES


def faults(report: Report) -> list[str]:
    """A sentence for everything that is missing or contradictory; none if the report is sound."""
    ours = suite_hash()
    if report.suite.hash != ours:  # anything else said of it would be about another list
        at = report.git.commit if report.git and not report.git.dirty else ""
        commit = f" (commit {at})" if at else ""
        return [
            f"it was made by suite {report.suite.hash}, and this moge_hal has suite {ours}: "
            f"use the moge_hal that made it{commit}, or judge again"
        ]
    if part := _part(report.suite.selection):
        return [f"only a part of the suite was run ({part}): judge again without that"]
    cases = expected(report)
    return [
        *_totals(report, cases),
        *(fault for backend in report.backends for fault in _backend(report, backend, cases)),
    ]


def expected(report: Report) -> dict[str, Case]:
    """The cases of a whole report, by id."""
    chosen = Selection(seed_offset=report.suite.selection.seed_offset)
    return {case.id: case for case in select(chosen)}


def held(backend: Reported, case: Case) -> bool:
    """Whether the backend must answer for a case: it claims the profile and computes in the
    dtype."""
    return case.profile in backend.claims and _name(case) in backend.dtypes


def _part(selection: Selection) -> str:
    parts = [f"--filter '{glob}'" for glob in selection.filters]
    parts += [f"--profile {selection.profile}"] if selection.profile is not None else []
    parts += ["--quick"] if selection.quick else []
    return " ".join(parts)


def _totals(report: Report, cases: dict[str, Case]) -> Iterator[str]:
    if report.suite.cases != len(cases):
        yield f"it says that there are {report.suite.cases} cases, and the suite has {len(cases)}"
    if not report.backends:
        yield "it holds no backend that was judged"
    known = {backend.name for backend in report.backends}
    for name in dict.fromkeys(o.backend for o in report.outcomes if o.backend not in known):
        yield f"it holds outcomes of {name}, which is not among its backends"
    digests: dict[str, str] = {}
    differ = []
    for outcome in report.outcomes:
        inputs = outcome.id.rpartition("/")[0]
        if digests.setdefault(inputs, outcome.inputs) != outcome.inputs:
            differ.append(inputs)
    if differ:
        yield f"inputs with more than one digest: {_some(list(dict.fromkeys(differ)))}"


def _backend(report: Report, backend: Reported, cases: dict[str, Case]) -> Iterator[str]:
    name, outcomes = backend.name, report.of_backend(backend.name)
    if not outcomes:
        yield f"{name}: it is among the backends and has no outcomes"
        return
    yield from _claims(report, backend)
    times = Counter(outcome.id for outcome in outcomes)
    if missing := [id for id in cases if id not in times]:
        yield f"{name}: missing: {_some(missing)}"
    if unknown := [id for id in times if id not in cases]:
        yield f"{name}: not in the suite: {_some(unknown)}"
    if twice := [id for id, count in times.items() if count > 1]:
        yield f"{name}: more than once: {_some(twice)}"
    counts = Counter(outcome.outcome for outcome in outcomes)
    if backend.counts != {word: counts[word] for word in WORDS}:
        said = ", ".join(f"{count} {word}" for word, count in backend.counts.items())
        found = ", ".join(f"{counts[word]} {word}" for word in WORDS)
        yield f"{name}: it says {said}, and its outcomes are {found}"
    wrong = defaultdict(list)
    for outcome in outcomes:
        if outcome.id in cases:
            for fault in _outcome(backend, cases[outcome.id], outcome):
                wrong[fault].append(outcome.id)
    for fault, ids in wrong.items():
        yield f"{name}: {fault}: {_some(ids)}"


# What the chip of a backend that comes with moge_hal cannot be reached without: by its package, a
# distribution and how its version must not end (None: it must be there).
_NEEDS = {
    "moge_hal.backends.cuda": ("torch", "+cpu", "a torch that has no CUDA"),
    "moge_hal.backends.ascend": ("torch-npu", None, "no torch-npu"),
}


def _claims(report: Report, backend: Reported) -> Iterator[str]:
    """What a backend says of itself."""
    for kind, words, known in (
        ("level", [backend.level], LEVELS),
        ("profile", backend.claims, PROFILES),
    ):
        for word in words:
            if word not in known:
                yield f"{backend.name}: there is no {kind} {word!r}"
    modes = ("infer",) if backend.graph else ("infer", "train")
    wanted = [f"{dtype} {mode}" for dtype in backend.dtypes for mode in modes]
    if missing := [mode for mode in wanted if set(backend.operations.get(mode, {})) != set(NAMES)]:
        yield f"{backend.name}: it does not say who serves each operation in {_some(missing)}"
    if more := [mode for mode in backend.operations if mode not in wanted]:
        yield f"{backend.name}: it says who serves operations in {_some(more)}, which it has not"
    for package, (name, wrong, said) in _NEEDS.items():
        number = report.versions.get(name)
        lacks = number is None if wrong is None else (number or "").endswith(wrong)
        if backend.level == "real" and backend.kind.startswith(package) and lacks:
            yield f"{backend.name}: it says that it ran on its real chip, with {said}"


def _outcome(backend: Reported, case: Case, outcome: Outcome) -> Iterator[str]:
    """What is wrong with one outcome, to be said of all cases of which it is true."""
    error, limit, word = outcome.error, outcome.limit, outcome.outcome
    if min(error or 0, limit or 0) < 0:
        yield "with an error or a limit below 0"
    if word == "passed" and error is not None and (limit is None or error > limit):
        yield "passed with an error above its limit"
    if word == "passed" and not held(backend, case):
        yield "passed, which the backend neither claims nor computes in"
    if word == "passed" and not outcome.inputs:
        yield "passed without a digest of its inputs"
    if word != "passed" and not outcome.reason.strip():
        yield f"{word} without a reason"
    elif word == "skipped" and held(backend, case) and not _may_skip(backend, case, outcome.reason):
        yield f"skipped ({outcome.reason}), which the backend claims"
    # What can be captured is proved on tensors without data, wherever it is proved.
    seen = "simulated" if word == "passed" and case.profile == "capture" else backend.level
    if outcome.level != seen:
        yield f"at level {outcome.level}, which can only be {seen}"


def _may_skip(backend: Reported, case: Case, reason: str) -> bool:
    """Why a case may be skipped that the backend claims: a cache without slots that could be
    unwritten, and an operation that a graph backend refuses, with its own reason behind the name.
    """
    refused = backend.graph and case.profile == "core" and reason.startswith(f"{case.op}: ")
    return case.prop == "unwritten" or refused


def _name(case: Case) -> str:
    return str(DTYPES[case.dtype_name]).removeprefix("torch.")


def _some(ids: list[str]) -> str:
    """The first, and how many more."""
    return ids[0] if len(ids) == 1 else f"{ids[0]} and {len(ids) - 1} more"
