"""The pytest plugin: a test of every backend and case, what came of it, and the report."""

import traceback
from collections.abc import Generator
from typing import Any

import pytest

from moge_hal.conformance.cases import Case
from moge_hal.conformance.result import Outcome, Result
from moge_hal.conformance.subject import Subject
from moge_hal.conformance.verdict import Failure, Verdict


class ConformancePlugin:
    """One run. `outcomes` fills up as pytest goes."""

    def __init__(self, subjects: list[Subject], cases: list[Case]) -> None:
        self.subjects = subjects
        self.cases = cases
        self.outcomes: list[Outcome] = []

    def result(self) -> Result:
        return Result(tuple(subject.label for subject in self.subjects), tuple(self.outcomes))

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        # A case's inputs and oracle are the same for all backends, so they are judged side by side.
        tests = [
            pytest.param(subject, case, id=f"{subject.label}:{case.id}")
            for case in self.cases
            for subject in self.subjects
        ]
        metafunc.parametrize(("subject", "case"), tests)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if call.when == "call":
            assert isinstance(item, pytest.Function)
            self.outcomes.append(_outcome(item, report, call.excinfo))
        return report

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.write_line("")
        for line in self.result().report().splitlines():
            terminalreporter.write_line(line)


def _outcome(
    item: pytest.Function,
    report: pytest.TestReport,
    info: "pytest.ExceptionInfo[BaseException] | None",
) -> Outcome:
    params: dict[str, Any] = dict(item.callspec.params)
    subject, case = params["subject"], params["case"]
    if report.outcome == "passed":
        verdict = dict(item.user_properties)["verdict"]
        assert isinstance(verdict, Verdict)
        return Outcome.of(case.id, subject.label, "passed", verdict.error, verdict.limit)
    assert info is not None
    if report.outcome == "skipped":
        return Outcome.of(case.id, subject.label, "skipped", reason=str(info.value))
    if isinstance(info.value, Failure):
        failure = info.value
        return Outcome.of(
            case.id, subject.label, "failed", failure.error, failure.limit, failure.reason
        )
    last = traceback.extract_tb(info.tb)[-1]
    reason = f"raised {info.typename}: {info.value} ({last.filename}:{last.lineno})"
    return Outcome.of(case.id, subject.label, "failed", reason=reason)
