"""Which backends there are, which one runs, and why another does not.

Backends are found by entry point (group `moge_hal.backends`); the core imports none of them. A
backend that is not installed can be named `package.module:Class`. The environment is read here, in
one function, and nowhere else.
"""

import os
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from moge_hal import ops
from moge_hal.backend import Backend, Probe
from moge_hal.errors import UserError, close_matches, refuse

GROUP = "moge_hal.backends"
AUTOMATIC = ("ascend", "cuda", "cpu")  # what `auto` tries, in order; never a graph backend


class BackendError(UserError):
    """A backend that was asked for cannot run; the message holds the table of all of them."""


@dataclass(frozen=True)
class Settings:
    """What the environment says."""

    backend: str  # MOGE_HAL_BACKEND: auto, name, name:index, a,b (ordered) or package.module:Class
    overrides: Mapping[str, str]  # MOGE_HAL_OPS: operation=default, separated by commas
    strict: bool  # MOGE_HAL_STRICT=1: an operation that falls back to its default is an error
    cache: Path  # MOGE_HAL_CACHE: where exports of plain checkpoints are kept


def settings() -> Settings:
    """Reads MOGE_HAL_BACKEND, MOGE_HAL_OPS, MOGE_HAL_STRICT and MOGE_HAL_CACHE."""
    strict = os.environ.get("MOGE_HAL_STRICT", "0")
    if strict not in ("", "0", "1"):
        raise UserError(f"MOGE_HAL_STRICT = {strict!r} must be 0 or 1")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Settings(
        backend=os.environ.get("MOGE_HAL_BACKEND") or "auto",
        overrides=parse_overrides(os.environ.get("MOGE_HAL_OPS", "")),
        strict=strict == "1",
        cache=Path(os.environ.get("MOGE_HAL_CACHE") or home / "moge_hal"),
    )


def parse_overrides(text: str) -> dict[str, str]:
    """`experts=default,linear=default` -> a dict; raises `UserError` for what is unknown."""
    chosen = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        op, _, choice = part.partition("=")
        if op not in ops.NAMES:
            names, near = ", ".join(ops.NAMES), close_matches(op, ops.NAMES)
            raise UserError(f"MOGE_HAL_OPS: no operation {op!r}; there are {names}.{near}")
        if choice != "default":
            raise UserError(f"MOGE_HAL_OPS: {part!r} must read {op}=default")
        chosen[op] = choice
    return chosen


@dataclass(frozen=True)
class BackendInfo:
    """One line of the doctor's table."""

    name: str
    probe: Probe
    source: str  # the distribution or the import path that it comes from
    graph: bool = False


def backends() -> list[BackendInfo]:
    """Every backend that is installed, probed here and now, in order of name."""
    return [_inspect(name, points) for name, points in sorted(_entry_points().items())]


def table(rows: list[BackendInfo] | None = None) -> str:
    """The table that the doctor command, the error messages and the README show."""
    lines = []
    for row in backends() if rows is None else rows:
        if row.probe.ok:
            lines.append(f"  {row.name:8} ok   {row.probe.device}")
        else:
            lines.append(f"  {row.name:8} no   {_refusal(row.probe)}")
    return "\n".join(lines) or "  (none is installed: run `pip install .` in the repository)"


def get_backend(name: str | None = None) -> Backend:
    """The backend of that name, ready to run; None = what MOGE_HAL_BACKEND says, else `auto`.

    `auto` = ascend, cuda, cpu, the first that can run. `cuda:1` = that one or an error.
    `ascend,cuda` = the first of these that can run. `package.module:Class` = a class that is not
    installed. Raises `BackendError` with the reason and the fix for every backend.
    """
    wanted, known = settings().backend if name is None else name, _entry_points()
    if not isinstance(wanted, str):
        refuse("backend", wanted, "must be a name, or, for `load`, a Backend")
    if wanted == "auto":
        choices = [n for n in AUTOMATIC if n in known]
    else:
        choices = [part.strip() for part in wanted.split(",") if part.strip()]
    if not choices:
        raise BackendError(f"no backend in {wanted!r}; there are:\n{table()}")
    if "auto" in choices and wanted != "auto":
        raise BackendError(f"backend {wanted!r}: auto stands alone, other names may be listed")
    refusals = []
    # All are parsed before the first is tried: a misspelt name is an error wherever it stands.
    for choice, (path, index) in [(c, _parse(c, known)) for c in choices]:
        try:
            backend = _load(path, known[path], index) if path in known else _instance(_import(path))
        except BackendError as error:
            refusals.append(str(error))
            continue
        probe = _probe(backend)
        if probe.ok:
            return backend
        refusals.append(f"backend {choice!r} cannot run: {_refusal(probe)}")
    raise BackendError("\n".join([*refusals, "The backends here:", table()]))


def _entry_points() -> dict[str, list[EntryPoint]]:
    """Entry points by backend name; more than one for a name is an error when it is used."""
    found = defaultdict(list)
    for point in entry_points(group=GROUP):  # of the first distribution of a name on sys.path
        found[point.name].append(point)
    return found


def _inspect(name: str, points: list[EntryPoint]) -> BackendInfo:
    source = ", ".join(_claims(points))
    try:
        backend = _load(name, points)
    except BackendError as error:
        return BackendInfo(name, Probe(False, f"{error}", "uninstall or mend it."), source)
    return BackendInfo(name, _probe(backend), source, backend.graph)


def _probe(backend: Backend) -> Probe:
    # The contract forbids both faults, so they are the backend's and are reported as such.
    try:
        probe = backend.probe()
    except Exception as error:
        fault = f"its probe raised {type(error).__name__}: {error}."
    else:
        if isinstance(probe, Probe):
            return probe
        fault = f"its probe returned {probe!r}, which is no Probe."
    kind = type(backend)
    return Probe(False, fault, f"report it to the author of {kind.__module__}:{kind.__qualname__}.")


def _refusal(probe: Probe) -> str:
    """Why not and what to do, in one line, whatever a driver's message looks like."""
    return " ".join(f"{probe.reason} Fix: {probe.fix}".split())


def _parse(choice: str, known: Mapping[str, list[EntryPoint]]) -> tuple[str, int | None]:
    """`cuda:1` -> ("cuda", 1), `package.module:Class` -> itself and None; raises for neither."""
    base, colon, suffix = choice.partition(":")
    if base in known:
        if colon and not suffix.isdecimal():
            raise BackendError(f"backend {choice!r}: name its device by a number, as in {base}:0")
        return base, int(suffix) if colon else None
    if suffix and not suffix.isdecimal():
        if not re.fullmatch(r"[\w.]+:[\w.]+", choice):
            raise BackendError(f"backend {choice!r}: a class is named as in package.module:Class")
        return choice, None
    near = close_matches(base, known)
    raise BackendError(f"no backend {choice!r}.{near} There are:\n{table()}")


def _claims(points: list[EntryPoint]) -> list[str]:
    return sorted(p.dist.name if p.dist else p.value for p in points)


def _load(name: str, points: list[EntryPoint], index: int | None = None) -> Backend:
    if len(points) > 1:
        claims = " and ".join(_claims(points))
        raise BackendError(f"{claims} both claim the backend name {name!r}; uninstall one of them.")
    return _instance(_import(points[0].value), index)


def _import(path: str) -> type[Backend]:
    try:
        found = EntryPoint(path, path, GROUP).load()
    except Exception as error:  # a backend may raise anything at import; the others must still run
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise BackendError(f"backend {path!r} cannot be imported ({reason}).") from error
    if not (isinstance(found, type) and issubclass(found, Backend)):
        raise BackendError(f"backend {path!r} is not a subclass of moge_hal.Backend.")
    return found


def _instance(kind: type[Backend], index: int | None = None) -> Backend:
    try:
        return kind(index)
    except Exception as error:
        path = f"{kind.__module__}:{kind.__qualname__}"
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise BackendError(f"backend {path!r} cannot be created ({reason}).") from error
