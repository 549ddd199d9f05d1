"""The limits are no tighter than they may be: no right backend fails, whatever the seed."""

import pytest
from rewrites import attention, experts, sums, whole

from moge_hal.backend import Backend
from moge_hal.conformance.cases import parse
from moge_hal.conformance.judging import judge
from moge_hal.conformance.subject import Subject

EXPERTS = "T7-D40-F24-E12-G3-K6"
ATTENTION = "B2-S9-H6-Hkv2-d8"

# A right backend, and cases that show how it differs; `SEED` is replaced.
ACCEPTED: list[tuple[type[Backend], str]] = [
    (experts.GatherBmm, f"experts/f32/{EXPERTS}-SEED/scale1/value"),
    (experts.GatherBmm, f"experts/bf16/{EXPERTS}-SEED/scale1/value"),
    (experts.WeightsEarly, f"experts/f32/{EXPERTS}-SEED/scale1/value"),
    (experts.WeightsEarly, f"experts/bf16/{EXPERTS}-SEED/scale1/value"),
    (experts.WeightsEarly, f"experts/f32/{EXPERTS}-SEED/scale1/gradients"),
    (experts.Float32Experts, f"experts/bf16/{EXPERTS}-SEED/scale30/value"),
    (experts.Float32Experts, f"experts/f16/{EXPERTS}-SEED/scale0.01/value"),
    (experts.Float32Experts, "swiglu_ffn/bf16/T7-D40-F24-SEED/scale1/value"),
    (experts.ArgmaxPasses, "route/f32/T17-E15-G3-K6-SEED/scale1/route.valid"),
    (experts.ArgmaxPasses, "route/f32/T17-E15-G3-K6-SEED/scale30/route.valid"),
    (experts.ArgmaxPasses, "route/f32/T17-E15-G3-K6-SEED/scale1/gradients"),
    (experts.LogSumExp, "route/f32/T17-E15-G3-K6-SEED/scale1/route.valid"),
    (experts.LogSumExp, "route/f32/T17-E15-G3-K6-SEED/scale30/route.valid"),
    (experts.LogSumExp, "route/f32/T17-E64-G8-K8-SEED/scale30/route.valid"),
    (experts.PowersOfTwo, "route/f32/T17-E15-G3-K6-SEED/scale1/route.valid"),
    (experts.PowersOfTwo, "route/f32/T17-E64-G8-K8-SEED/scale30/route.valid"),
    (sums.SequentialSums, "linear/f32/T7-I640-O24-SEED/scale1/value"),
    (sums.SequentialSums, "linear/bf16/T7-I96-O24-SEED/scale1/value"),
    (sums.SequentialSums, "swiglu_ffn/f32/T7-D96-F24-SEED/scale1/value"),
    (sums.SplitSums, "linear/f32/T7-I640-O24-SEED/scale1/value"),
    (sums.SplitSums, "linear/f32/T7-I40-O4-nobias-SEED/scale1/value"),
    (sums.SplitSums, "linear/f16/T7-I96-O24-SEED/scale1/value"),
    (sums.SplitSums, "linear/f32/T7-I40-O24-SEED/scale1/gradients"),
    (sums.SplitSums, "router_logits/bf16/T7-D96-E15-SEED/scale1/value"),
    (sums.FusedNorm, "rms_norm/f32/T7-D40-SEED/scale0.01/value"),
    (sums.FusedNorm, "rms_norm/bf16/T7-D40-SEED/scale1/value"),
    (sums.FusedNorm, "add_rms_norm/f32/T7-D40-SEED/scale1/gradients"),
    (sums.NormByDivision, "rms_norm/f32/T7-D40-SEED/scale1/value"),
    (sums.NormByDivision, "add_rms_norm/f16/T7-D40-SEED/scale30/value"),
    (attention.Sdpa, f"attention/f32/{ATTENTION}-SEED/scale1/value"),
    (attention.Sdpa, f"attention/f32/{ATTENTION}-SEED/scale30/value"),
    (attention.Sdpa, f"attention/bf16/{ATTENTION}-SEED/scale1/value"),
    (attention.Sdpa, f"attention/f32/{ATTENTION}-SEED/scale1/gradients"),
    (attention.Float32Attention, f"attention/bf16/{ATTENTION}-SEED/scale30/value"),
    (attention.Float32Attention, f"attention/f16/{ATTENTION}-SEED/scale0.01/value"),
    (attention.OnlineSoftmax, f"attention/f32/{ATTENTION}-SEED/scale30/value"),
    (attention.OnlineSoftmax, f"attention/bf16/{ATTENTION}-SEED/scale1/value"),
    (whole.AllInLoops, "model/f32/tiny-SEED/random/one-pass"),
    (whole.AllInParts, "model/f32/tiny-SEED/random/one-pass"),
]


def accept(rewrite: type[Backend], case: str, seeds: range) -> None:
    for seed in seeds:
        judge(Subject(rewrite()), parse(case.replace("SEED", f"seed{seed}")))


@pytest.mark.parametrize(("rewrite", "case"), ACCEPTED, ids=lambda v: getattr(v, "name", v))
def test_no_rewrite_fails(rewrite: type[Backend], case: str) -> None:
    accept(rewrite, case, range(50))


@pytest.mark.slow
@pytest.mark.parametrize(("rewrite", "case"), ACCEPTED, ids=lambda v: getattr(v, "name", v))
def test_no_rewrite_fails_over_a_thousand_seeds(rewrite: type[Backend], case: str) -> None:
    accept(rewrite, case, range(50, 1050))


def test_a_sum_of_5120_terms_may_be_a_loop() -> None:
    """A rule without n failed this at 3.4 times its limit."""
    accept(sums.SequentialSums, "linear/f32/T7-I5120-O24-SEED/scale1/value", range(5))
