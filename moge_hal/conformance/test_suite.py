"""The suite, as pytest sees it: one test, which the plugin multiplies by backends and cases.

pytest --pyargs moge_hal.conformance --moge-backend cpu,onnx --moge-filter 'experts/*'
"""

import pytest

from moge_hal.conformance.cases import Case
from moge_hal.conformance.judging import judge
from moge_hal.conformance.plugin import VERDICT
from moge_hal.conformance.subject import Subject
from moge_hal.conformance.verdict import Skip


def test_case(subject: Subject, case: Case, request: pytest.FixtureRequest) -> None:
    try:
        request.node.stash[VERDICT] = judge(subject, case)
    except Skip as skip:
        request.node.stash[VERDICT] = skip
        pytest.skip(str(skip))
