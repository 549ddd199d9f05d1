"""The page that shows a report: it says what the report says, and no text of it is markup."""

import json
import re
from base64 import b64encode
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from reports import changed, judged, whole, with_outcomes

from moge_hal.conformance.reports import page, provenance
from moge_hal.conformance.reports.report import Report
from moge_hal.conformance.result import Outcome, Selection, Word

VALUE = "linear/f32/T17-I40-O56/scale1/value"
PAGE = Path(page.__file__)


@pytest.fixture(scope="module")
def report() -> Report:
    """Of the whole suite, on two backends."""
    return whole(judged(), judged("other", level="simulated", claims=["core"], dtypes=["float32"]))


class Reader(HTMLParser):
    """Checks that elements are closed in the order in which they were opened; keeps what it saw."""

    VOID = ("meta", "br", "input")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]
        if tag not in (*self.VOID, "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def data_of(html: str) -> dict[str, Any]:
    found = re.search(r'id="data">(.*?)</script>', html, re.DOTALL)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_the_page_is_whole_and_needs_nothing_else(report: Report) -> None:
    html = page.render(report)
    seen = Reader(html)
    assert len(set(seen.ids)) == len(seen.ids)
    assert all(link[0] == "#" and link[1:] in seen.ids for link in seen.links) and seen.links
    assert "://" not in html and "url(" not in html and "@import" not in html
    script = PAGE.with_suffix(".js").read_text("utf-8")
    assert set(re.findall(r'\$\("(\w+)"\)', script)) <= set(seen.ids)
    rows = data_of(html)["rows"]
    assert len(rows) == len(report.outcomes) > 2000


def test_the_page_of_many_backends_stays_small() -> None:
    many = [judged(f"package{i}.module:Backend", dtypes=["float32"] if i else ["bfloat16"])
            for i in range(6)]  # fmt: skip
    assert len(page.render(whole(*many)).encode()) < 1_500_000


def test_the_page_shows_every_case_in_its_cell(report: Report) -> None:
    html = page.render(report)
    section = html.partition('id="b0"')[2].partition("</section>")[0]
    for dtype in ("f32", "bf16", "f16"):
        which = f"linear/{dtype}/*/value"
        count = sum(
            o.backend == "null" and o.id.startswith(f"linear/{dtype}/") and o.id.endswith("/value")
            for o in report.outcomes
        )
        assert f'data-q="{which}" title="{which}: {count} passed">✓\u202f{count}<' in section
    assert "✓\u202f1<" in section and "○\u202f1<" in section  # others passed, bitwise is skipped
    assert ">25</a>" in section  # 2.5e-7 of 1e-6, in percent


def test_the_page_tells_failures_deviations_and_refusals(report: Report) -> None:
    failing = changed(
        report, VALUE, outcome="failed", error=3e-4, limit=1e-6, reason="wrong in its worst row"
    )
    failing = changed(
        failing,
        "embed/f32/T17-V259-D40/scale1/value",
        outcome="deviates",
        reason="until firmware 3",
    )
    failing = replace(failing, refused={"ascend": "no torch-npu"}, broken=["line 3 was not met"])
    html = page.render(failing)
    Reader(html)
    replay = f"moge-hal conformance --backend null --filter &#x27;{VALUE}&#x27;"
    for part in ("wrong in its worst row", "error 0.0003, limit 1e-06", replay, "until firmware 3",
                 "no torch-npu", "line 3 was not met", "✗\u202f3e4<"):  # fmt: skip
        assert part in html, part
    null = failing.backends[0]
    assert page.verdict(failing, null).startswith("fails: 1 failed, ")
    commands = {outcome.replay.replace(outcome.id, "{id}") for outcome in failing.outcomes}
    assert set(data_of(html)["commands"]) == commands


def test_the_headline_says_what_it_is_said_of(report: Report) -> None:
    total = report.suite.cases
    null, other = report.backends
    passed, skipped = null.counts["passed"], null.counts["skipped"]
    said = page.verdict(report, null)
    assert (
        said == f"passes: {passed:,} passed, {skipped} skipped of all {total:,} cases of the suite"
    )
    assert "simulated" in page.render(report) and other.level == "simulated"
    part = whole(selection=Selection(["linear/f32/T1-*/value"]))
    assert page.verdict(part, part.backends[0]).endswith(
        "3 cases that were selected (filter linear/f32/T1-*/value)"
    )
    none = with_outcomes(
        part, [Outcome(o.id, "null", "skipped", reason="x") for o in part.outcomes]
    )
    assert page.verdict(none, none.backends[0]).startswith("fails: nothing passed")


def test_what_was_cut_short_is_no_whole_run(report: Report) -> None:
    total = report.suite.cases
    for part in (
        with_outcomes(report, report.outcomes[:-2]),  # the last case of both
        with_outcomes(whole(), [o for o in whole().outcomes if o.id != VALUE]),
        with_outcomes(
            whole(), [o if o.id != VALUE else whole().outcomes[0] for o in whole().outcomes]
        ),
    ):
        cut = replace(part, suite=replace(part.suite, cases=total - 1))
        said = page.verdict(cut, cut.backends[0])
        assert said.startswith("fails: ")
        assert said.endswith(
            f" of {total - 1:,} cases, INCOMPLETE: there are {total:,} cases of the suite"
        )
        html = page.render(cut)
        assert "all cases of" not in html and f"all {total - 1:,} cases" not in html
        assert html.count("INCOMPLETE") >= 3 and "passes: " not in html
    selected = whole(selection=Selection(["linear/f32/T1-*/value"]))
    cut = with_outcomes(selected, selected.outcomes[1:])
    assert page.verdict(cut, cut.backends[0]).endswith(
        " passed of 2 cases, INCOMPLETE: there are 3 cases that were selected "
        "(filter linear/f32/T1-*/value)"
    )


EVIL = "\"'></script></style><script>alert(1)</script><img src=x onerror=alert(2)><!--"


def test_no_text_is_markup() -> None:
    """Every text of a report, wherever the page shows it; the names of cases, too."""
    selection = Selection(["linear/f32/T1-*/value"])  # three cases
    report = whole(
        judged(
            f"x:{EVIL}",
            kind=EVIL,
            device=EVIL,
            source=EVIL,
            level=EVIL,
            claims=["core", EVIL],
            dtypes=["float32", EVIL],
            operations={f"{EVIL} infer": {EVIL: f"{EVIL}: {EVIL}"}},
        ),
        selection=selection,
    )
    words: tuple[Word, ...] = ("failed", "failed", "skipped")
    report = with_outcomes(
        report,
        [replace(o, outcome=word, reason=EVIL, level=EVIL, inputs=EVIL)
         for o, word in zip(report.outcomes, words, strict=True)],
    )  # fmt: skip
    for place in range(5):  # in each part of a case's name
        named = [part.split("/") for part in ("linear/f32/T1-I2-O2/scale1/value",) * 3]
        for parts in named:
            parts[place] = EVIL.replace("/", "")
        renamed = [replace(o, id="/".join(parts), error=3.0, limit=1.0)
                   for o, parts in zip(report.outcomes, named, strict=True)]  # fmt: skip
        forged = replace(
            with_outcomes(report, renamed),
            suite=replace(report.suite, hash=EVIL),
            versions={EVIL: EVIL},
            git=provenance.Git(EVIL, True),
            machine=provenance.Machine(EVIL, EVIL, 1),
            started=EVIL,
            refused={EVIL: EVIL},
            broken=[EVIL],
        )
        html = page.render(forged)
        seen = Reader(html)
        assert seen.tags.count("script") == 2 and "img" not in seen.tags
        assert EVIL not in html and "<!--" not in html
        assert EVIL in data_of(html)["reasons"]


def test_no_script_runs_but_the_page_s_own(report: Report) -> None:
    html = page.render(report)
    (own,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = b64encode(sha256(own.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'\"" in html and own.strip().endswith("show();")


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(scheme: str) -> None:
    """Contrast of at least 4.5 (WCAG 2.1, 1.4.3), in both schemes."""
    css = PAGE.with_suffix(".css").read_text("utf-8")
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6});", part))
                   for part in re.findall(r":root \{(.*?)\}", css, re.DOTALL))  # fmt: skip
    assert light.keys() == dark.keys()
    colours = light if scheme == "light" else dark
    words = ("passed", "failed", "deviates", "skipped")
    pairs = [(f"{word}-ink", word) for word in words]
    pairs += [(f"{word}-ink", "panel") for word in ("passed", "failed")]
    pairs += [(ink, ground) for ink in ("ink", "soft", "link") for ground in ("panel", "ground")]
    pairs += [("ink", "heat")]
    for ink, ground in pairs:
        dim, bright = sorted((luminance(colours[ink]), luminance(colours[ground])))
        assert (bright + 0.05) / (dim + 0.05) >= 4.5, (ink, ground)
