"""Which backends there are, which one runs, and why another does not.

Backends are found by entry point (group `moge_hal.backends`); the core imports none of them. A
backend that is not installed can be named `package.module:Class`. The environment is read here, in
one function, and nowhere else.
"""

import os
import re
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import torch

from moge_hal import ops
from moge_hal.backend import Backend, Probe
from moge_hal.errors import UserError, close_matches, refuse

GROUP = "moge_hal.backends"
AUTOMATIC = ("ascend", "cuda", "cpu")  # what `auto` tries, in order; never a graph backend
RESERVED = ("all", "auto", "default")  # words of a selection and of a report, and no names
PROFILES = ("core", "train", "capture", "bitwise")  # what a backend may claim
LEVELS = ("real", "simulated", "emulated")  # what its device may be


TABLE_FOLLOWS = "The backends here:"  # the line between the reasons and the table of an error


class BackendError(UserError):
    """A backend that was asked for cannot run; the message holds the table of all of them."""


class UnknownBackendError(BackendError):
    """A name that names nothing: a slip of the pen, which is not the fault of any backend."""


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


def installed() -> list[str]:
    """The names of all backends that are installed, whether they can run or not."""
    return sorted(_entry_points())


def table(rows: list[BackendInfo] | None = None) -> str:
    """The table that the doctor command, the error messages and the README show."""
    rows = backends() if rows is None else rows
    width = max([8, *(len(row.name) for row in rows)])
    lines = []
    for row in rows:
        word, rest = ("ok", row.probe.device) if row.probe.ok else ("no", _refusal(row.probe))
        lines.append(f"  {row.name:{width}} {word}   {rest}")
    return "\n".join(lines) or "  (none is installed: run `pip install .` in the repository)"


def get_backend(name: str | None = None) -> Backend:
    """The backend of that name, ready to run; None = what MOGE_HAL_BACKEND says, else `auto`.

    `auto` = ascend, cuda, cpu, the first that can run. `cuda:1` = that one or an error.
    `ascend,cuda` = the first of these that can run. `package.module:Class` = a class that is not
    installed. Raises `BackendError` with the reason and the fix for every backend, and
    `UnknownBackendError` if a name names nothing.
    """
    refusals = []
    for choice, points, index in _choices(name):
        try:
            backend = _load(points, index)
        except UnknownBackendError:
            raise
        except BackendError as error:
            refusals.append(str(error))
            continue
        probe = _probe(backend)
        if probe.ok:
            return backend
        refusals.append(f"backend {choice!r} cannot run: {_refusal(probe)}")
    raise BackendError("\n".join([*refusals, TABLE_FOLLOWS, table()]))


def find(name: str | None = None) -> Backend:
    """The backend of that one name, whether it can run here or not: its probe is not asked.

    Raises as `get_backend` does, and `UnknownBackendError` for `auto` and for a list.
    """
    choices = _choices(name)
    if len(choices) > 1:
        names = ", ".join(choice for choice, _, _ in choices)
        raise UnknownBackendError(f"name one backend: which of {names} can run is not asked here")
    _, points, index = choices[0]
    return _load(points, index)


def source_of(backend: Backend) -> str:
    """The distribution that a backend comes from, with its version, or its import path if it is not
    installed."""
    kind = _path(type(backend))
    for point in _entry_points().get(backend.name, []):
        if point.dist and _path(_import(point)) == kind:
            return f"{point.dist.name} {point.dist.version}"
    return kind


def name_fault(name: object) -> str | None:
    """What is wrong with the name of a backend, or None. Words follow one another with - or _, so
    that a list, an index or a path can be told from a name.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", name):
        return f"the name {name!r} must be lower-case letters and digits, in words joined by - or _"
    return f"the name {name!r} has a meaning of its own" if name in RESERVED else None


def check(backend: Backend) -> str | None:
    """What is wrong with a backend's static promises, or None: `name`, `dtypes`, `claims`."""
    # An unfinished class has no name of its own yet.
    if backend.name != Backend.name and (fault := name_fault(backend.name)):
        return fault
    dtypes: object = backend.dtypes
    if not isinstance(dtypes, tuple) or not dtypes:
        return f"its dtypes = {dtypes!r} must be a tuple of torch's types, as (torch.float32,)"
    for dtype in dtypes:
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            return f"its dtypes hold {dtype!r}, which is no floating-point type of torch"
    claims: object = backend.claims
    if not isinstance(claims, tuple) or not claims:
        return f"its claims = {claims!r} must be a tuple of profiles, as ('core',)"
    for claim in claims:
        if claim not in PROFILES:
            near = close_matches(str(claim), PROFILES)
            return f"it claims {claim!r}; the profiles are {', '.join(PROFILES)}.{near}"
    if claims.count("core") != 1 or len(set(claims)) != len(claims):
        return f"its claims = {claims!r} must hold 'core', and each profile once"
    return None


def _entry_points() -> dict[str, list[EntryPoint]]:
    """Entry points by backend name; more than one for a name is an error when it is used."""
    found = defaultdict(list)
    for point in entry_points(group=GROUP):  # of the first distribution of a name on sys.path
        found[point.name].append(point)
    return found


def _inspect(name: str, points: list[EntryPoint]) -> BackendInfo:
    source = ", ".join(_owners(points))
    try:
        backend = _load(points)
    except BackendError as error:
        owners = " or ".join(_owners(points))
        fix = f"uninstall {owners}." if len(points) > 1 else f"mend it, or uninstall {owners}."
        return BackendInfo(name, Probe(False, f"{error}", fix), source)
    return BackendInfo(name, _probe(backend), source, backend.graph)


def _probe(backend: Backend) -> Probe:
    # The contract forbids all of these faults, so they are the backend's and are reported as such.
    try:
        probe = backend.probe()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        fault = f"its probe raised {_one_line(error)}."
    else:
        if not isinstance(probe, Probe):
            fault = f"its probe returned {probe!r}, which is no Probe."
        elif probe.level not in LEVELS:
            fault = f"its probe says level {probe.level!r}; the levels are {', '.join(LEVELS)}."
        elif not (probe.ok or probe.reason):
            fault = "its probe says no, and gives no reason."
        else:
            return probe
    return Probe(False, fault, f"report it to the author of {_path(type(backend))}.")


def _refusal(probe: Probe) -> str:
    """Why not and what to do, in one line, whatever a driver's message looks like."""
    fix = f" Fix: {probe.fix}" if probe.fix else ""
    return " ".join(f"{probe.reason}{fix}".split())


Choice = tuple[str, list[EntryPoint], int | None]  # a name, who claims it, which device


def _choices(name: str | None) -> list[Choice]:
    """The backends that a name means, in order. All are parsed before the first is tried: a
    misspelt name is an error wherever it stands.
    """
    wanted, known = settings().backend if name is None else name, _entry_points()
    if not isinstance(wanted, str):
        refuse("backend", wanted, "must be a name, or, for `load`, a Backend")
    if wanted == "auto":
        choices = [n for n in AUTOMATIC if n in known]
    else:
        choices = [part.strip() for part in wanted.split(",") if part.strip()]
    if not choices:
        raise UnknownBackendError(f"no backend in {wanted!r}; there are:\n{table()}")
    if "auto" in choices and wanted != "auto":
        raise UnknownBackendError(
            f"backend {wanted!r}: auto stands alone, other names may be listed"
        )
    return [_parse(choice, known) for choice in choices]


def _parse(choice: str, known: Mapping[str, list[EntryPoint]]) -> Choice:
    """`cuda:1` -> its entry points and 1, `package.module:Class` -> one of its own and None."""
    base, colon, suffix = choice.partition(":")
    if base in known:
        if colon and not suffix.isdecimal():
            rule = f"name its device by a number, as in {base}:0"
            raise UnknownBackendError(f"backend {choice!r}: {rule}")
        return choice, known[base], int(suffix) if colon else None
    if suffix and not suffix.isdecimal():
        if not re.fullmatch(r"[\w.]+:[\w.]+", choice):
            rule = "a class is named as in package.module:Class"
            raise UnknownBackendError(f"backend {choice!r}: {rule}")
        return choice, [EntryPoint(choice, choice, GROUP)], None
    near = close_matches(base, known)
    raise UnknownBackendError(f"no backend {choice!r}.{near} There are:\n{table()}")


def _owners(points: list[EntryPoint]) -> list[str]:
    return sorted(p.dist.name if p.dist else p.value for p in points)


def _load(points: list[EntryPoint], index: int | None = None) -> Backend:
    """An instance that keeps its static promises. Raises `BackendError` with one sentence."""
    point = points[0]
    if len(points) > 1:
        owners = " and ".join(_owners(points))
        sentence = f"both claim the backend name {point.name!r}; uninstall one of them."
        raise BackendError(f"{owners} {sentence}")
    kind = _import(point)
    who = _who(point, _path(kind))
    try:
        backend = kind(index)
        fault = check(backend)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise BackendError(f"{who} cannot be created ({_one_line(error)}).") from error
    if fault is None and point.dist:
        fault = name_fault(point.name)
        if fault is None and backend.name != point.name:
            fault = f"its name is {backend.name!r}, but its entry point says {point.name!r}"
    if fault:
        raise BackendError(f"{who} breaks the contract: {fault}.")
    return backend


def _import(point: EntryPoint) -> type[Backend]:
    who = _who(point, point.value)
    try:
        found = point.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # anything may be raised; the others must still run
        sentence = f"{who} cannot be imported ({_one_line(error)})."
        if not point.dist and _names_nothing(point.value, error):
            raise UnknownBackendError(sentence) from error
        raise BackendError(sentence) from error
    if not (isinstance(found, type) and issubclass(found, Backend)):
        raise BackendError(f"{who} is not a subclass of moge_hal.Backend.")
    return found


def _names_nothing(path: str, error: BaseException) -> bool:
    """Whether there is no such module, or no such name in it; else something in it went wrong."""
    module = path.partition(":")[0]
    if isinstance(error, ModuleNotFoundError):
        return error.name is not None and f"{module}.".startswith(f"{error.name}.")
    return isinstance(error, AttributeError) and module in sys.modules


def _who(point: EntryPoint, path: str) -> str:
    return f"backend {path!r}" + (f" of {point.dist.name}" if point.dist else "")


def _path(kind: type[Backend]) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
