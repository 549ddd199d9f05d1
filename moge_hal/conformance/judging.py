"""One case, one backend, one verdict."""

from moge_hal.conformance.cases import Case
from moge_hal.conformance.properties import (
    bitwise,
    caching,
    capture,
    gradients,
    operations,
    whole_model,
)
from moge_hal.conformance.subject import Subject
from moge_hal.conformance.verdict import Skip, Verdict

OPERATION_PROPERTIES = {
    **operations.PROPERTIES,
    **caching.PROPERTIES,
    "gradients": gradients.gradients,
    "bitwise": bitwise.bitwise,
    "no-sync": capture.no_sync,
}


def judge(subject: Subject, case: Case) -> Verdict:
    """Runs the property of the case.

    Raises `Failure` if the backend is wrong and `Skip` if the case does not apply to it. Whatever
    else a backend raises comes through as it is.
    """
    if case.dtype not in subject.backend.dtypes:
        able = ", ".join(str(dtype).removeprefix("torch.") for dtype in subject.backend.dtypes)
        raise Skip(f"computes in {able} only")
    if case.profile not in subject.backend.claims:
        raise Skip(f"does not claim the profile {case.profile}")
    table = whole_model.PROPERTIES if case.op == "model" else OPERATION_PROPERTIES
    return table[case.prop](subject, case)
