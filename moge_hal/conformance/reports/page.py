"""report.html: the report as one page that needs nothing else, neither a network nor fonts.

Everything but the table of all cases is there without JavaScript, which filters and sorts that
table.
"""

import json
import math
import re
from base64 import b64encode
from collections import defaultdict
from collections.abc import Iterable
from hashlib import sha256
from html import escape
from pathlib import Path

from moge_hal.conformance.reports import grids
from moge_hal.conformance.reports.grids import MARKS, WORST_FIRST
from moge_hal.conformance.reports.report import Report, Reported
from moge_hal.conformance.result import WORDS, Outcome, Selection, Word
from moge_hal.conformance.selection import select

LISTED = 10  # of the slowest, and of those next to their limits
_SAID: dict[Word, str] = {
    "failed": "failed",
    "passed": "passed",
    "deviates": "deviating as listed",
    "skipped": "skipped",
}
_HERE = Path(__file__).parent
# Our own script alone runs, whatever else may have come into the page.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{}'"


def render(report: Report) -> str:
    """The page, as HTML."""
    names = ", ".join([backend.name for backend in report.backends] or ["no backend"])
    links = "".join(
        f'<a href="#b{i}">{_mark(_good(report, backend))} {escape(backend.name)}</a>'
        for i, backend in enumerate(report.backends)
    )
    style, script = (f"\n{(_HERE / f'page.{kind}').read_text('utf-8')}" for kind in ("css", "js"))
    policy = _POLICY.format(b64encode(sha256(script.encode()).digest()).decode())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>Conformance of {escape(names)}</title>
<style>{style}</style>
</head>
<body>
<nav aria-label="Parts of the report"><a href="#top">Overview</a>{links}\
<a href="#cases">All cases</a></nav>
<main id="top">
{_overview(report)}
{"".join(_backend(report, backend, i) for i, backend in enumerate(report.backends))}
{_all_cases(report)}
</main>
<script type="application/json" id="data">{_data(report)}</script>
<script>{script}</script>
</body>
</html>
"""


def verdict(report: Report, backend: Reported) -> str:
    """One line: whether it passed, and what that is said of."""
    found = backend.counts
    where = _selected(report.suite.selection, _judged(report, backend))
    parts = [f"{found[word]:,} {said}" for word, said in _SAID.items() if found[word]]
    if not found["passed"]:
        parts.insert(0, "nothing passed")
    return f"{'passes' if _good(report, backend) else 'fails'}: {', '.join(parts)} of {where}"


def _good(report: Report, backend: Reported) -> bool:
    counts, selection = backend.counts, report.suite.selection
    whole = _judged(report, backend) == _expected(selection) == sum(counts.values())
    return whole and counts["passed"] > 0 and not counts["failed"] and not report.broken


def _judged(report: Report, backend: Reported) -> int:
    """How many cases of the backend there are outcomes of."""
    return len({outcome.id for outcome in report.of_backend(backend.name)})


def _expected(selection: Selection) -> int:
    """How many cases the selection has, whether they were judged or not."""
    return len(select(selection))


def _mark(good: bool) -> str:
    word: Word = "passed" if good else "failed"
    return f'<span class="{word}">{MARKS[word]}</span>'


def _name(backend: Reported) -> str:
    """It may be as long as package.module:Class."""
    return re.sub(r"([.:])", r"\1<wbr>", escape(backend.name))


def _selected(selection: Selection, count: int) -> str:
    """What so many cases are: all of a selection, or fewer than there should be."""
    words = ["quick"] if selection.quick else []
    words += [f"profile {selection.profile}"] if selection.profile else []
    words += [f"filter {glob}" for glob in selection.filters]
    words += [f"seed offset {selection.seed_offset}"] if selection.seed_offset else []
    chosen = f" that were selected ({', '.join(words)})" if words else " of the suite"
    if (expected := _expected(selection)) != count:
        return f"{count:,} cases, INCOMPLETE: there are {expected:,} cases{chosen}"
    return f"{count:,} cases{chosen}" if words else f"all {count:,} cases{chosen}"


def _overview(report: Report) -> str:
    cards = "".join(_card(report, backend, i) for i, backend in enumerate(report.backends))
    said = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(reason)}</dd>"
        for name, reason in report.refused.items()
    )
    refused = f'<h3>Not judged</h3><div class="panel"><dl>{said}</dl></div>' if said else ""
    faults = "".join(f'<p class="why">{escape(sentence)}</p>' for sentence in report.broken)
    broken = f'<h3>What else is wrong</h3><div class="fault">{faults}</div>' if faults else ""
    return f"""<h1>Conformance report</h1>
<p class="soft">What each backend computes, judged against the specification in float64 by suite
<code>{escape(report.suite.hash)}</code>.</p>
<div class="cards">{cards}</div>
{broken}{refused}
<details class="panel"><summary>How this report was made</summary>
<dl>{_origin(report)}</dl></details>
"""


def _card(report: Report, backend: Reported, i: int) -> str:
    good, total = _good(report, backend), max(1, sum(backend.counts.values()))
    used = [word for word in _SAID if backend.counts[word]]
    bar = "".join(
        f'<i class="{word}" style="width:{100 * backend.counts[word] / total:.2f}%"></i>'
        for word in used
    )
    counts = "".join(
        f"<li>{MARKS[word]} <b>{backend.counts[word]:,}</b> {_SAID[word]}</li>" for word in used
    )
    kind: Word = "passed" if good else "failed"
    level = "real device" if backend.level == "real" else backend.level
    return f"""<article class="card {"good" if good else "bad"}">
<div class="line"><h2><a href="#b{i}">{_name(backend)}</a></h2>
<span class="tag {escape(backend.level)}">{escape(level)}</span></div>
<p class="soft">{escape(backend.device)}</p>
<p class="verdict {kind}">{MARKS[kind]} {escape(verdict(report, backend))}</p>
<div class="bar" aria-hidden="true">{bar}</div><ul class="counts">{counts}</ul>
<p class="soft">claims {escape(", ".join(backend.claims))}</p>
</article>"""


def _origin(report: Report) -> str:
    git, machine = report.git, report.machine
    facts = {
        "Cases": _selected(report.suite.selection, report.suite.cases),
        "Suite": report.suite.hash,
        "Started": report.started.replace("T", " ").replace("+00:00", " UTC"),
        "Took": f"{report.seconds:,.0f} s",
        "Commit": f"{git.commit}{', with changes' if git.dirty else ''}" if git else "no checkout",
        "Machine": f"{machine.platform}; {machine.processor}; {machine.threads} threads",
        "Versions": ", ".join(f"{name} {number}" for name, number in report.versions.items()),
        **{
            f"Backend {b.name}": f"{b.kind}, from {b.source}; computes in {', '.join(b.dtypes)}"
            for b in report.backends
        },
    }
    return "".join(f"<dt>{escape(name)}</dt><dd>{escape(it)}</dd>" for name, it in facts.items())


def _backend(report: Report, backend: Reported, i: int) -> str:
    outcomes = report.of_backend(backend.name)
    steps = "".join(f'<i class="h{n}">{10 * n + 5}</i>' for n in range(0, 10, 3))
    keys = "".join(
        f'<span><i class="{word}">{MARKS[word]}</i>{word}</span>' for word in reversed(WORST_FIRST)
    )
    measured = [outcome for outcome in outcomes if outcome.margin is not None]
    nearest = [
        (f"{100 * (o.margin or 0):.1f} %", o)
        for o in sorted(measured, key=lambda o: -(o.margin or 0))[:LISTED]
    ]
    slowest = [
        (f"{o.seconds:.2f} s", o) for o in sorted(outcomes, key=lambda o: -o.seconds)[:LISTED]
    ]
    return f"""<section id="b{i}" data-b="{escape(backend.name)}">
<h2>{_name(backend)}</h2>
<p class="soft">{escape(backend.device)}. {_mark(_good(report, backend))}
{escape(verdict(report, backend))}.</p>
{_faults(outcomes)}
<h3>What was judged</h3>
<p class="soft">Number of cases by operation, dtype and property. A cell shows its cases.</p>
<p class="scale">{keys}</p>
{grids.by_property(outcomes, grids.counts)}
<h3>How near to the limit</h3>
<p class="soft">The worst error in percent of the limit that was measured for the same inputs; above
100 a case fails.</p>
<p class="scale"><span>{steps} % of the limit</span>
<span><i class="failed">{MARKS["failed"]}{grids.THIN}120</i> above it: failed</span></p>
{grids.by_property(measured, grids.margins)}
<details><summary>By shape and scale</summary>{grids.by_shape(outcomes)}</details>
<h3>Who serves each operation</h3>
{grids.implementations(backend)}
<div class="two">
<div><h3>Nearest to their limits</h3>{_list(nearest)}</div>
<div><h3>Slowest</h3>{_list(slowest)}</div>
</div>
{_reasons(outcomes, "deviates", "Known deviations")}
{_reasons(outcomes, "skipped", "Skipped")}
</section>
"""


def _faults(outcomes: Iterable[Outcome]) -> str:
    """Failures by operation and property: the worst in full, of the others the ids."""
    groups = defaultdict(list)
    for outcome in outcomes:
        if outcome.outcome == "failed":
            op, *_, prop = outcome.id.split("/")
            groups[op, prop].append(outcome)
    told = []
    for (op, prop), failed in groups.items():
        # A failure without a number, such as an exception, is worse than any number.
        worst = max(failed, key=lambda o: math.inf if o.margin is None else o.margin)
        size, rest = "", ""
        if worst.error is not None and worst.limit is not None:
            size = f'<div class="soft">error {worst.error:.2g}, limit {worst.limit:.2g}</div>'
        if len(failed) > 1:
            which = escape(f"{op}/*/{prop}")
            link = f'<a href="#cases" data-q="{which}" data-o="failed">'
            rest = f"{link}all {len(failed):,} of {which}</a>"
        told.append(
            f'<div class="fault"><div class="line"><span class="id">{escape(worst.id)}</span>{rest}'
            f'</div><div class="why">{escape(worst.reason)}</div>{size}'
            f'<div class="replay"><pre>{escape(worst.replay)}</pre></div></div>'
        )
    return f"<h3>Failures, the worst of each kind</h3>{''.join(told)}" if told else ""


def _list(lines: Iterable[tuple[str, Outcome]]) -> str:
    items = "".join(
        f'<li><span class="id">{escape(o.id)}</span><b>{value}</b></li>' for value, o in lines
    )
    return f'<ul class="list">{items}</ul>'


def _reasons(outcomes: Iterable[Outcome], word: Word, title: str) -> str:
    """Outcomes of one word by their reason."""
    why = defaultdict(list)
    for outcome in outcomes:
        if outcome.outcome == word:
            why[outcome.reason].append(outcome.id)
    if not why:
        return ""
    lines = []
    for reason, ids in sorted(why.items(), key=lambda item: -len(item[1])):
        listed = "<br>".join(escape(i) for i in ids[:200])
        more = f"<br>and {len(ids) - 200:,} more" if len(ids) > 200 else ""
        lines.append(
            f"<li><details><summary>{len(ids):,}: {escape(reason)}</summary>"
            f'<p class="id soft">{listed}{more}</p></details></li>'
        )
    return f'<h3>{title}</h3><ul class="reasons">{"".join(lines)}</ul>'


def _all_cases(report: Report) -> str:
    names = "".join(f"<option>{escape(b.name)}</option>" for b in report.backends)
    words = "".join(f"<option>{word}</option>" for word in WORDS)
    columns = {
        "id": "case",
        "backend": "backend",
        "outcome": "outcome",
        "error": "error",
        "limit": "limit",
        "margin": "% of limit",
        "seconds": "ms",
    }
    heads = "".join(
        f'<th scope="col" data-key="{key}"{_numeric(key)}>'
        f'<button type="button">{title}</button></th>'
        for key, title in columns.items()
    )
    return f"""<section id="cases">
<h2>All cases</h2>
<noscript><p>This table needs JavaScript; report.json holds what it shows.</p></noscript>
<div class="controls">
<label class="wide">Words of the case or the reason, or a glob<input id="query" type="search"
 placeholder="experts/bf16/*/value" autocomplete="off" spellcheck="false"></label>
<label>Backend<select id="backend"><option value="">all</option>{names}</select></label>
<label>Outcome<select id="outcome"><option value="">all</option>{words}</select></label>
<button type="button" id="clear">Clear</button></div>
<p class="soft" id="found" role="status"></p>
<div class="scroll" role="region" aria-label="All cases" tabindex="0">
<table id="all"><caption class="hidden">All cases</caption>
<thead><tr>{heads}<th scope="col"><span class="hidden">replay</span></th></tr></thead>
<tbody></tbody></table></div>
<button type="button" id="more" hidden>Show more</button>
</section>"""


def _numeric(key: str) -> str:
    return ' class="number"' if key in ("error", "limit", "margin", "seconds") else ""


def _data(report: Report) -> str:
    """All outcomes for the script: what repeats is said once, numbers to three digits."""
    ids, reasons, levels, commands = (dict[str, int]() for _ in range(4))
    place = {backend.name: i for i, backend in enumerate(report.backends)}
    rows = [
        [
            place[o.backend],
            ids.setdefault(o.id, len(ids)),
            WORDS.index(o.outcome),
            _rounded(o.error),
            _rounded(o.limit),
            _rounded(o.seconds),
            reasons.setdefault(o.reason, len(reasons)),
            levels.setdefault(o.level, len(levels)),
            commands.setdefault(o.replay.replace(o.id, "{id}"), len(commands)),
        ]
        for o in report.outcomes
        if o.backend in place
    ]
    found = {
        "backends": list(place),
        "words": WORDS,
        "marks": [MARKS[word] for word in WORDS],
        "ids": list(ids),
        "reasons": list(reasons),
        "levels": list(levels),
        "commands": list(commands),
        "rows": rows,
    }
    # Inside a script element HTML ends at the first </script, whatever quotes it stands in.
    return json.dumps(found, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")
