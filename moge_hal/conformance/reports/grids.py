"""The tables of the page that have a cell for every kind of case: what was judged, how near to the
limit, and which implementation each operation got.

A cell's colour repeats what its text says; a link in it shows its cases in the table of all cases.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from html import escape
from string import ascii_lowercase

from moge_hal.conformance.cases import DTYPES, PROPERTIES
from moge_hal.conformance.reports.report import Reported
from moge_hal.conformance.result import Outcome, Word

MARKS: dict[Word, str] = {"passed": "✓", "failed": "✗", "deviates": "≈", "skipped": "○"}
THIN = "\u202f"  # a thin space that does not break
WORST_FIRST: tuple[Word, ...] = ("failed", "deviates", "skipped", "passed")

# Tables of operations and dtypes by property: of the operations, and of whole models.
PARTS = {
    "Operations": [op for op in PROPERTIES if op != "model"],
    "Whole models": ["model"],
}


def by_property(outcomes: Iterable[Outcome], cell: Callable[[list[Outcome]], str]) -> str:
    """Operation and dtype down, properties across; cell: what to write of a cell's outcomes, as a
    `td`."""
    cells = defaultdict(list)
    for outcome in outcomes:
        op, dtype, _, _, prop = outcome.id.split("/")
        cells[op, dtype, prop].append(outcome)
    tables = []
    for title, ops in PARTS.items():
        most_first = sorted(ops, key=lambda op: -len(PROPERTIES[op].split()))
        names = dict.fromkeys(name for op in most_first for name in PROPERTIES[op].split())
        across = [
            name for name in names if any((op, d, name) in cells for op in ops for d in DTYPES)
        ]
        heads = "".join(f'<th scope="col" class="up"><span>{name}</span></th>' for name in across)
        rows = []
        for op in ops:
            down = [d for d in DTYPES if any((op, d, name) in cells for name in across)]
            for i, dtype in enumerate(down):
                first = (
                    f'<th class="op" scope="rowgroup" rowspan="{len(down)}">{op}</th>'
                    if i == 0
                    else ""
                )
                found = (cells.get((op, dtype, name)) for name in across)
                tds = "".join(cell(held) if held else "<td></td>" for held in found)
                edge = ' class="edge"' if i == 0 else ""
                rows.append(f'<tr{edge}>{first}<th scope="row">{dtype}</th>{tds}</tr>')
        if rows:
            head = (
                f'<tr><th class="op" scope="col">{title}</th><th scope="col">dtype</th>{heads}</tr>'
            )
            tables.append(_scrolling(title, f"<thead>{head}</thead><tbody>{''.join(rows)}</tbody>"))
    return "".join(tables)


def counts(held: list[Outcome]) -> str:
    """A cell of the matrix: how many cases came to what."""
    found = Counter(outcome.outcome for outcome in held)
    worst = next(word for word in WORST_FIRST if found[word])
    text = " ".join(f"{MARKS[word]}{THIN}{found[word]}" for word in WORST_FIRST if found[word])
    said = ", ".join(f"{found[word]} {word}" for word in WORST_FIRST if found[word])
    return f'<td class="{worst}">{_link(held, text, said)}</td>'


def margins(held: list[Outcome]) -> str:
    """A cell of the heat map: the worst error in percent of its limit. held: with margins."""
    margin, worst = max((outcome.margin or 0.0, outcome.id) for outcome in held)
    return heat(margin, lambda text: _link(held, text, worst))


def heat(margin: float, wrap: Callable[[str], str] = str) -> str:
    """A cell coloured by a margin, in steps of 10 %."""
    if margin > 1:
        return f'<td class="failed">{wrap(MARKS["failed"] + THIN + percent(margin))}</td>'
    return f'<td class="h{min(9, int(margin * 10))}">{wrap(percent(margin))}</td>'


def percent(margin: float) -> str:
    """Without the sign: 0.124 -> 12; what is large is rounded further."""
    return f"{100 * margin:.0f}" if margin < 100 else f"{100 * margin:.0e}".replace("e+0", "e")


def _link(held: list[Outcome], text: str, hint: str) -> str:
    op, dtype, _, _, prop = held[0].id.split("/")
    which = f"{op}/{dtype}/*/{prop}"
    return (
        f'<a href="#cases" data-q="{escape(which)}" title="{escape(f"{which}: {hint}")}">{text}</a>'
    )


def by_shape(outcomes: Iterable[Outcome]) -> str:
    """Operation and shape down, dtype and scale across: the worst error of all properties."""
    worst: dict[tuple[str, str, str, str], float] = {}
    for outcome in outcomes:
        op, dtype, shape, scale, _ = outcome.id.split("/")
        if outcome.margin is not None:
            key = (op, shape, dtype, scale)
            worst[key] = max(worst.get(key, 0.0), outcome.margin)
    tables = []
    for title, ops in PARTS.items():
        keys = [key for key in worst if key[0] in ops]
        scales = dict.fromkeys(scale for *_, scale in keys)
        across = [(d, s) for d in DTYPES for s in scales if any(k[2:] == (d, s) for k in keys)]
        heads = "".join(
            f'<th scope="col">{dtype}<br><small>{escape(scale.removeprefix("scale"))}</small></th>'
            for dtype, scale in across
        )
        rows, before = [], ""
        for op, shape in dict.fromkeys(key[:2] for key in keys):
            found = (worst.get((op, shape, dtype, scale)) for dtype, scale in across)
            tds = "".join("<td></td>" if margin is None else heat(margin) for margin in found)
            edge, before = (' class="edge"' if op != before else ""), op
            down = f'<th class="op" scope="row">{op} <small>{escape(shape)}</small></th>'
            rows.append(f"<tr{edge}>{down}{tds}</tr>")
        if rows:
            head = f'<tr><th class="op" scope="col">{title}</th>{heads}</tr>'
            body = f"<thead>{head}</thead><tbody>{''.join(rows)}</tbody>"
            tables.append(_scrolling(f"{title} by shape", body))
    return "".join(tables)


def implementations(backend: Reported) -> str:
    """Operations down, dtype and mode across: who serves the operation. Reasons stand below, by
    letter."""
    reasons: dict[str, str] = {}  # to their letters
    across = list(backend.operations)
    ops = dict.fromkeys(op for serves in backend.operations.values() for op in serves)
    rows = []
    for op in ops:
        tds = []
        for mode in across:
            who, _, why = backend.operations[mode].get(op, "").partition(": ")
            letter = reasons.setdefault(why, _letter(len(reasons))) if why else ""
            kind = "default" if who == "default" else "own"
            tds.append(f'<td class="{kind}">{escape(who)}<sup>{letter}</sup></td>')
        rows.append(f'<tr><th scope="row">{escape(op)}</th>{"".join(tds)}</tr>')
    heads = "".join(
        f'<th scope="col">{"<br>".join(map(escape, mode.split(" ")))}</th>' for mode in across
    )
    head = f'<tr><th scope="col">operation</th>{heads}</tr>'
    notes = "".join(f"<li><b>{letter}</b> {escape(why)}</li>" for why, letter in reasons.items())
    body = f"<thead>{head}</thead><tbody>{''.join(rows)}</tbody>"
    table = _scrolling("Which implementation serves each operation", body, "who")
    return f'{table}<ul class="notes">{notes}</ul>'


def _letter(n: int) -> str:
    """a .. z, then aa, ba, and so on."""
    return ascii_lowercase[n % 26] + (_letter(n // 26 - 1) if n >= 26 else "")


def _scrolling(label: str, body: str, kind: str = "grid") -> str:
    """A table that scrolls in its own frame, with the keyboard too."""
    name = escape(label)
    table = f'<table class="{kind}"><caption class="hidden">{name}</caption>{body}</table>'
    return f'<div class="scroll" role="region" aria-label="{name}" tabindex="0">{table}</div>'
