"""The table of what runs where, in Markdown, from reports: `moge-hal matrix A.json B.json`.

Nobody types it. It holds no time and no version, so a machine that judges the same backends with
the same suite writes the same table, and CI can compare it with the one in the README.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from moge_hal.conformance.cases import DTYPES, PROPERTIES, parse
from moge_hal.conformance.reports.consistency import faults, held
from moge_hal.conformance.reports.report import Report, Reported, read
from moge_hal.conformance.result import Outcome
from moge_hal.errors import UserError

BEGIN, END = "<!-- moge-hal matrix -->", "<!-- end of moge-hal matrix -->"

PROFILES = {
    "train": "gradients (profile train)",
    "capture": "can be captured (profile capture)",
    "bitwise": "same bits in any batch (profile bitwise)",
}
LEVELS = {
    "real": "the chip that the backend is for",
    "simulated": "another device that computes in its place",
    "emulated": "its own software on an emulated driver",
}
_SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def matrix(paths: Sequence[str | Path]) -> str:
    """The table of these reports.

    Raises `UserError` for a file that is no whole and sound report of this suite, and for a backend
    that is there twice at one level.
    """
    if not paths:
        raise UserError("no report was named: give one or more files report.json")
    columns: dict[tuple[str, str], tuple[Report, Reported, str | Path]] = {}
    for path in paths:
        report = read(path)
        _require_sound(path, report)
        for backend in report.backends:
            key = backend.kind, backend.level
            if key in columns:
                raise UserError(
                    f"{backend.name} ({backend.level}) is in {columns[key][2]} and in {path}: "
                    f"give one report of it"
                )
            columns[key] = report, backend, path
    return _Table([(report, backend) for report, backend, _ in columns.values()]).text(paths)


def in_readme(text: str, table: str) -> str:
    """The text with the table between its two markers, instead of what is there.

    Raises `UserError` unless both markers are there once, in their order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or text.count(BEGIN) + text.count(END) != 2:
        raise UserError(f"the text must hold {BEGIN} and behind it {END}, each once")
    return f"{before}{BEGIN}\n\n{table.strip()}\n\n{END}{after}"


def _require_sound(path: str | Path, report: Report) -> None:
    if found := faults(report):
        raise UserError(f"{path} cannot be in the table: {found[0]}")
    if report.suite.selection.seed_offset:
        raise UserError(f"{path} cannot be in the table: it has other inputs (--seed-offset)")


class _Table:
    def __init__(self, columns: list[tuple[Report, Reported]]) -> None:
        self.columns = columns
        self.notes: dict[str, int] = {}  # sentences to their numbers

    def text(self, paths: Sequence[str | Path]) -> str:
        heads = [f"{backend.name} ({backend.level})" for _, backend in self.columns]
        rows = [["operation", *map(_plain, heads)], ["---"] * (len(heads) + 1)]
        for op in PROPERTIES:
            name = "whole models" if op == "model" else f"`{op}`"
            rows.append([name, *(self._cell(*column, "core", op) for column in self.columns)])
        for profile, name in PROFILES.items():
            rows.append([name, *(self._cell(*column, profile) for column in self.columns)])
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([*lines, "", *self._legend(paths)])

    def _cell(self, report: Report, backend: Reported, profile: str, op: str = "") -> str:
        """What came of the cases of a profile, and of an operation: dtypes of which all passed, how
        many cases that were, and what else there is to say."""
        if profile not in backend.claims:
            return "not claimed"
        by_dtype = defaultdict(list)
        for outcome in report.of_backend(backend.name):
            case = parse(outcome.id)
            if case.profile == profile and op in ("", case.op) and held(backend, case):
                by_dtype[case.dtype_name].append(outcome)
        whole, passed, total, other = [], 0, 0, []
        for dtype in [name for name in DTYPES if name in by_dtype]:
            found = Counter(outcome.outcome for outcome in by_dtype[dtype])
            if found["failed"]:
                failed = f"{found['failed']} of {sum(found.values())} failed"
                other.append(f"**{dtype}: {failed}**")
            elif not found["passed"]:
                other.append(f"{dtype}: none passed{self._marks(by_dtype[dtype])}")
            else:
                whole.append(f"{dtype}{self._marks(by_dtype[dtype])}")
                passed, total = passed + found["passed"], total + sum(found.values())
        count = f"{passed}" if passed == total else f"{passed} of {total}"
        parts = [f"{' '.join(whole)} · {count}"] if whole else []
        levels = {o.level for held in by_dtype.values() for o in held if o.outcome == "passed"}
        said = f" ({', '.join(sorted(levels))})" if levels - {backend.level} else ""
        return f"{', '.join([*parts, *other]) or 'no dtype'}{said}"

    def _marks(self, outcomes: list[Outcome]) -> str:
        """Numbers of the notes that say which of the cases did not pass, and why."""
        why = Counter((o.outcome, o.reason) for o in outcomes if o.outcome != "passed")
        marks = []
        for word, reason in why:
            sentence = f"{'known deviation' if word == 'deviates' else word}: {_plain(reason)}"
            number = self.notes.setdefault(sentence, len(self.notes) + 1)
            marks.append(str(number).translate(_SUPERSCRIPT))
        return "⁺".join(marks)

    def _legend(self, paths: Sequence[str | Path]) -> list[str]:
        used = [level for level in LEVELS if any(b.level == level for _, b in self.columns)]
        levels = "; ".join(f"{level}: {LEVELS[level]}" for level in used)
        refused = sorted({name for report, _ in self.columns for name in report.refused})
        notes = [
            f"{str(number).translate(_SUPERSCRIPT)} {sentence}<br>"
            for sentence, number in self.notes.items()
        ]
        names = " ".join(Path(path).as_posix() for path in paths)
        return [
            *notes,
            "A dtype stands where none of its cases failed; the number says how many passed, and a "
            f"note what else there was. In brackets what they ran on; {levels}.",
            *([f"Could not be judged: {', '.join(map(_plain, refused))}."] if refused else []),
            "",
            f"Written by `moge-hal matrix {names}`, from the reports of "
            f"{self.columns[0][0].suite.cases:,} cases a backend.",
        ]


def _plain(text: str) -> str:
    """Text that Markdown takes as it is, in one cell: no markup, and no link made of an address."""
    for sign in "\\`*_[]<>|&~$@#":
        text = text.replace(sign, f"\\{sign}")
    text = re.sub(r"(?i)(www)\.", r"\1\\.", text.replace("://", ":\\/\\/"))
    return " ".join(text.split())
