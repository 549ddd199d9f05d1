"""The suite, as pytest sees it: one test, which the plugin multiplies by backends and cases.

moge-hal conformance --backend cpu,onnx --filter 'experts/*'
"""

from collections.abc import Callable

import pytest

from moge_hal.conformance.cases import Case
from moge_hal.conformance.judging import judge
from moge_hal.conformance.subject import Subject
from moge_hal.conformance.verdict import Skip


def test_case(subject: Subject, case: Case, record_property: Callable[[str, object], None]) -> None:
    try:
        record_property("verdict", judge(subject, case))
    except Skip as skip:
        pytest.skip(str(skip))
