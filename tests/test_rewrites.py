"""The limits are no tighter than they may be: no right backend fails. `ci/score.py` judges all of
the list, and more; here are some cases of every rewrite, on other inputs."""

import pytest
from rewrites import sums
from rewrites.table import REWRITES, cases, nearness

from moge_hal.backend import Backend
from moge_hal.conformance.cases import Case, parse
from moge_hal.conformance.subject import Subject
from moge_hal.registry import check


def accept(rewrite: type[Backend], judged: list[Case]) -> None:
    subject = Subject(rewrite())
    for case in judged:
        nearness(subject, case)


@pytest.mark.parametrize("rewrite", REWRITES, ids=lambda rewrite: rewrite.__name__)
def test_no_rewrite_fails(rewrite: type[Backend]) -> None:
    """Every ninth of its cases, so that all dtypes, scales and most properties are among them."""
    own = [case for case, concerned in cases(range(2, 3)) if rewrite in concerned]
    accept(rewrite, own[::9])


@pytest.mark.slow
@pytest.mark.parametrize("rewrite", REWRITES, ids=lambda rewrite: rewrite.__name__)
def test_no_rewrite_fails_on_twenty_other_inputs(rewrite: type[Backend]) -> None:
    own = [case for case, concerned in cases(range(2, 22)) if rewrite in concerned]
    accept(rewrite, [case for case in own if case.op != "model" or case.sizes["seed"] < 8])


def test_there_is_a_rewrite_of_every_operation_and_every_profile() -> None:
    judged = [case for case, concerned in cases(range(2)) for _ in concerned]
    assert len(judged) > 10_000
    assert {case.dtype_name for case in judged} == {"f32", "bf16", "f16"}
    assert len({rewrite.name for rewrite in REWRITES}) == len(REWRITES)
    assert all(check(rewrite()) is None for rewrite in REWRITES)
    assert {"gradients", "train-step", "decode", "expert-parallel"} <= {c.prop for c in judged}


def test_a_sum_of_5120_terms_may_be_a_loop() -> None:
    """A rule without n failed this at 3.4 times its limit."""
    ids = [f"linear/f32/T7-I5120-O24-seed{seed}/scale1/value" for seed in range(5)]
    accept(sums.SequentialSums, [parse(text) for text in ids])
