"""Judges a mutant, and what is right where the mutant is wrong."""

from contextlib import AbstractContextManager, nullcontext

from moge_hal.backend import Backend
from moge_hal.conformance.cases import parse
from moge_hal.conformance.judging import judge
from moge_hal.conformance.subject import Subject
from moge_hal.conformance.verdict import Failure
from mutants import edges

_CONTROL = {
    edges.MUTANTS[wrong, op]: edges.MUTANTS[right, op]
    for wrong, right in (
        (edges.OneTokenOtherwise, edges.Wide),
        (edges.ReadOnTheHost, edges.Recordable),
    )
    for op in wrong.ops
} | {edges.ALL_OTHERWISE: edges.ALL_WIDE, edges.ALL_READ: edges.ALL_RECORDABLE}


def around(backend: type[Backend]) -> AbstractContextManager[object]:
    """What a mutant has to replace, while it is judged, that is no part of a backend."""
    found: AbstractContextManager[object] = getattr(backend, "around", nullcontext)()
    return found


def control(mutant: type[Backend]) -> type[Backend]:
    """What is right where the mutant is wrong."""
    if mutant in _CONTROL:
        return _CONTROL[mutant]
    return Backend


_accepted: set[tuple[str, str, str]] = set()


def accept(right: type[Backend], case: str) -> None:
    """Raises what `judge` raises; the same twice is judged once. A case that rejects what is right
    proves nothing by rejecting a mutant."""
    key = (right.__module__, right.__name__, case)
    if key not in _accepted:
        judge(Subject(right()), parse(case))
        _accepted.add(key)


def rejection(mutant: type[Backend], case: str) -> str | None:
    """Why the case rejects the mutant; None if it passes. Whatever is raised but `Failure` comes
    through, unless to raise is the mutant's fault."""
    try:
        with around(mutant):
            judge(Subject(mutant()), parse(case))
    except Failure as failure:
        return failure.reason
    except Exception as error:
        if not getattr(mutant, "raises", False):
            raise
        return f"raised {type(error).__name__}: {error}"
    return None
