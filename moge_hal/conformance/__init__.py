"""The judge of backends. `run(["cpu", "onnx"])` says what each of them computes, and how exactly.

cases.py                                   an id is a case
inputs.py, digest.py                       id -> inputs, the same everywhere
oracle.py                                  what is right, in float64
limits.py                                  how wrong a right answer may be
judge.py, routing.py                       outputs against the oracle; routes, by margin
subject.py                                 runs a backend as a model would
forced.py, weights.py                      the oracle on a backend's routes; the models judged whole
properties/                                what operations and whole models must keep
judging.py                                 one case, one backend, one verdict
listing.py, selection.py                   the list of cases, and which of them run
runner.py, session.py, plugin.py           a run, in pytest
result.py, deviations.py, levels.py        what came of it, what was expected, what it ran on
reports/, bisecting/, golden/              what follows from it; cases in files
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Names load on first use: pytest imports this package wherever moge_hal is installed, for its
# plugin, and most of its runs judge no backend.
if TYPE_CHECKING:
    from moge_hal.conformance.result import Outcome, Result
    from moge_hal.conformance.runner import list_cases, run

__all__ = ["Outcome", "Result", "list_cases", "run"]

_HOME = {"Outcome": "result", "Result": "result", "list_cases": "runner", "run": "runner"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
