"""The pytest plugin: options, a test of every backend and case, what came of it, and the report.

    pytest --pyargs moge_hal.conformance --moge-backend NAME

`moge-hal conformance` runs the same (`runner.py`). pytest loads this module wherever moge_hal is
installed, so nothing heavy is imported before the suite is asked for. What a case came to travels
as properties of pytest's own report, also from a worker of pytest-xdist to the process that
reports.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from moge_hal.conformance.result import Outcome, Result
    from moge_hal.conformance.session import Session
    from moge_hal.conformance.verdict import Skip, Verdict

SESSION: pytest.StashKey[Session] = pytest.StashKey()
VERDICT: pytest.StashKey[Verdict | Skip] = pytest.StashKey()
_FIELD = "moge_hal."  # what the names of an outcome's properties begin with


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("moge_hal", "moge_hal's conformance suite")

    def option(name: str, help: str, **more: Any) -> None:
        group.addoption(f"--moge-{name}", help=help, **more)

    option("backend", "backends to judge, separated by commas")
    option("filter", "a glob on case ids; repeatable", action="append", default=[])
    option("profile", "core, train, capture or bitwise alone")
    option("quick", "a few cases of every kind", action="store_true")
    option("seed-offset", "other inputs for the same shapes", type=int, default=0)
    option("simulate", "judge a backend's code on the CPU", action="store_true")
    option("deviations", "a TOML file of known deviations")
    option("report", "a folder to write report.json, junit.xml and report.html into")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        return  # a worker's reports go to the process that started it
    # The mark of pytest-xdist, which need not be here.
    config.addinivalue_line("markers", "xdist_group: which worker a case goes to")
    reporter = Reporter(config)
    if config.getoption("moge_report"):
        from moge_hal.errors import UserError

        try:
            reporter.folder = folder_for(config.getoption("moge_report"))
        except UserError as error:
            raise pytest.UsageError(str(error)) from None
    config.pluginmanager.register(reporter, "moge_hal_reporter")


def folder_for(path: str | Path) -> Path:
    """The report's folder, made now: a long run must not end with a place that is no folder."""
    from moge_hal.errors import UserError

    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the report folder {path} cannot be made: {error.strerror}") from None
    return Path(path).resolve()


def session_of(config: pytest.Config) -> Session:
    """The run, made from the options when the suite is first collected."""
    if SESSION not in config.stash:
        from moge_hal.conformance.session import Options, Session
        from moge_hal.errors import UserError

        try:
            config.stash[SESSION] = Session(Options.of(config.option))
        except UserError as error:
            raise pytest.UsageError(str(error)) from None
    return config.stash[SESSION]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__.rpartition(".")[2] == "test_suite" and {"subject", "case"} <= set(
        metafunc.fixturenames
    ):
        metafunc.parametrize(("subject", "case"), session_of(metafunc.config).tests())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    callspec = getattr(item, "callspec", None)
    if call.when != "call" or callspec is None or SESSION not in item.config.stash:
        return (yield)
    verdict = item.stash.get(VERDICT, None) or (call.excinfo and call.excinfo.value)
    if verdict is None or isinstance(verdict, KeyboardInterrupt):
        return (yield)
    outcome = item.config.stash[SESSION].outcome(
        callspec.params["subject"], callspec.params["case"], verdict, call.duration
    )
    item.user_properties += [(_FIELD + name, value) for name, value in asdict(outcome).items()]
    report = yield
    # A listed deviation is what pytest calls an expected failure, and one that passes is a failure.
    if outcome.outcome == "deviates":
        report.outcome, report.wasxfail = "skipped", outcome.reason
    elif outcome.outcome == "failed" and report.outcome == "passed":
        report.outcome, report.longrepr = "failed", outcome.reason
    return report


class Reporter:
    """Collects outcomes in the process that reports, and tells and writes what came of them."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.folder: Path | None = None  # to write the report into
        self.outcomes: list[Outcome] = []
        self.not_collected: list[str] = []  # why; the suite itself is broken then
        self.broken: list[str] = []  # what ended the run before its time
        self.unwritten = ""  # why there is no report
        self.started = time.time()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.not_collected.append(report.longreprtext)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found: dict[str, Any] = {
            name.removeprefix(_FIELD): value
            for name, value in report.user_properties
            if name.startswith(_FIELD)
        }
        if report.when == "call" and found:
            from moge_hal.conformance.result import Outcome

            self.outcomes.append(Outcome(**found))
        elif str(report.when) == "???" and report.failed:  # so xdist says that a worker died
            self._killed(report.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not self.outcomes:
            return
        if self.result().exit_code and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if self.folder is not None:
            self._write(self.folder)
        if self.unwritten and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _killed(self, test: str) -> None:
        """The process that judged a case died, and the run ends."""
        for outcome in session_of(self.config).killed(test):
            self.outcomes.append(outcome)
            self.broken.append(
                f"{outcome.id} killed its process on {outcome.backend}, and the run ends there"
            )

    def _write(self, folder: Path) -> None:
        from moge_hal.conformance.reports import junit, report
        from moge_hal.errors import UserError
        from moge_hal.files import write_file

        if not self.complete:
            cases = f"{len(self.outcomes)} of {session_of(self.config).size} cases were judged"
            self.unwritten = f"no report was written into {folder}: only {cases}"
            return
        result = self.result()
        try:
            report.write(folder, result, self.started, time.time() - self.started)
            write_file(folder / "junit.xml", junit.render(result))
        except UserError as error:
            self.unwritten = f"the report could not be written: {error}"

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.outcomes:
            return
        where = f"report.html, report.json and junit.xml lie in {self.folder}"
        last = self.unwritten or (where if self.folder else "")
        for line in ["", *self.result().report().splitlines(), *([last] if last else [])]:
            terminalreporter.write_line(line)

    @property
    def complete(self) -> bool:
        """Whether every case was judged on every backend."""
        return len(self.outcomes) == session_of(self.config).size

    def result(self) -> Result:
        """What is known so far."""
        return session_of(self.config).result(self.outcomes, self.broken)
