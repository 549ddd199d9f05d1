"""The judge of backends. `run(["cpu", "onnx"])` says what each of them computes, and how exactly.

cases.py                                   the list of cases; an id is a case
inputs.py                                  id -> inputs, the same everywhere
oracle.py                                  what is right, in float64
limits.py                                  how wrong a right answer may be
judge.py, routing.py                       outputs against the oracle; routes, by margin
subject.py                                 runs a backend as a model would
properties.py, caching.py, gradients.py    what every operation must keep
whole_model.py, forced.py, weights.py      what a whole model must keep
judging.py                                 one case, one backend, one verdict
runner.py, plugin.py, suite.py, result.py  pytest, the table, the exit code
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
