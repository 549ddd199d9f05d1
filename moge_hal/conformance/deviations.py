"""Known deviations: a TOML file in which a backend's author lists the cases that it fails, and why.

    [[deviation]]
    case = "experts/bf16/T[!0]*/value"            # a glob on case ids, as for --filter
    backend = "mychip"                            # may be left out where one backend is judged
    reason = "accumulates in bfloat16 until firmware 3"

A listed case that fails "deviates", which is no failure of the run; a listed case that passes is
one. So the file never says more than the truth: whatever was mended must be taken out of it.
"""

import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from moge_hal.conformance.result import Outcome, Selection
from moge_hal.conformance.selection import select
from moge_hal.errors import UserError, close_matches
from moge_hal.registry import installed

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

KEYS = ("case", "backend", "reason")


@dataclass(frozen=True)
class Deviation:
    """One entry: the cases that a glob matches, on one backend or on the only one."""

    place: str  # which file and which entry of it, for a sentence
    case: str
    reason: str
    backend: str | None = None

    def covers(self, backend: str, case_id: str) -> bool:
        """backend: as it was asked for; an entry for `cuda` is one for `cuda:1` too."""
        name, _, index = backend.rpartition(":")
        named = self.backend in (None, backend, name if index.isdecimal() else backend)
        # It is one of the shape, whatever the inputs (`--seed-offset`).
        ids = (case_id, re.sub(r"-seed\d+/", "/", case_id))
        return named and any(fnmatchcase(id, self.case) for id in ids)


@dataclass(frozen=True)
class Deviations:
    """The entries of a file, in its order."""

    entries: tuple[Deviation, ...] = ()

    @staticmethod
    def read(path: str | Path) -> "Deviations":
        """Raises `UserError` for a file that cannot be read or says something else than entries."""
        try:
            data = tomllib.loads(Path(path).read_text("utf-8"))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text, as TOML must be: {error}") from None
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{path} is not TOML: {error}") from None
        _known(data, ("deviation",), str(path))
        tables = data.get("deviation", [])
        if not isinstance(tables, list):
            raise UserError(f"{path}: every deviation must begin with the line [[deviation]]")
        places = [f"{path}, deviation {n + 1}" for n in range(len(tables))]
        entries = [_entry(table, place) for table, place in zip(tables, places, strict=True)]
        seen: dict[tuple[str, str | None], str] = {}
        for entry in entries:
            first = seen.setdefault((entry.case, entry.backend), entry.place)
            if first != entry.place:
                raise UserError(f"{entry.place} says the same as {first}: take one of them out")
        return Deviations(tuple(entries))

    def check(self, backends: Sequence[str]) -> None:
        """Before a run of these backends: raises `UserError` for an entry that matches no case of
        the list or misspells a backend, or that could mean any one of several.
        """
        for entry in self.entries:
            if entry.backend is None and len(backends) > 1:
                names = " or ".join(f'backend = "{name}"' for name in backends)
                raise UserError(f"{entry.place} must say whose it is: add {names}")
            near = close_matches(entry.backend or "", backends)
            if near and entry.backend not in {*backends, *installed()}:
                raise UserError(f"{entry.place}: there is no backend {entry.backend!r}.{near}")
            try:
                select(Selection(filters=[entry.case]))
            except UserError as error:
                raise UserError(f"{entry.place}: {error}") from None

    def match(self, backend: str, case_id: str) -> Deviation | None:
        """The first entry for this case on this backend."""
        return next((entry for entry in self.entries if entry.covers(backend, case_id)), None)

    def unused(self, outcomes: Iterable[Outcome]) -> list[str]:
        """After a run: a sentence, which makes the run a failure, for every entry whose cases were
        all skipped. An entry whose cases or whose backend were not asked for is none of this run's
        business.
        """
        skipped: dict[Deviation, list[Outcome]] = defaultdict(list)
        judged = set()
        for outcome in outcomes:
            for entry in self.entries:
                if not entry.covers(outcome.backend, outcome.id):
                    continue
                if outcome.outcome == "skipped":
                    skipped[entry].append(outcome)
                else:
                    judged.add(entry)
        return [
            f"{entry.place}: every case of {entry.case!r} was skipped on {its[0].backend} "
            f"({its[0].reason}): take it out"
            for entry, its in skipped.items()
            if entry not in judged
        ]


def _entry(table: object, place: str) -> Deviation:
    if not isinstance(table, dict):
        raise UserError(f"{place} must be a table, that is, begin with the line [[deviation]]")
    _known(table, KEYS, place)
    for key in ("case", "reason"):
        if key not in table:
            raise UserError(f'{place} has no {key}: add {key} = "..."')
    for key, value in table.items():
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{place}: {key} = {value!r} must be text, and not empty")
    return Deviation(place, table["case"], " ".join(table["reason"].split()), table.get("backend"))


def _known(table: Mapping[str, Any], names: Sequence[str], place: str) -> None:
    for key in table:
        if key not in names:
            there_are = ", ".join(names)
            near = close_matches(key, names)
            raise UserError(f"{place}: no key {key!r}; there is {there_are}.{near}")
