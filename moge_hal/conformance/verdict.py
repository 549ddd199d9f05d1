"""What a judgement can be: a verdict, a failure or a skip."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """A passed case: the error nearest to its limit, and that limit, if they were measured."""

    error: float | None = None
    limit: float | None = None
    level: str | None = None  # what it ran on, if that was not the backend's device (`levels.py`)


class Failure(AssertionError):
    """The backend is wrong; says how, and by how much if that was measured."""

    def __init__(self, reason: str, error: float | None = None, limit: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.error = error
        self.limit = limit


class Skip(Exception):
    """The case does not apply to this backend; says why. Never counted as a pass."""
