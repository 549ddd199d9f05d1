"""The inputs of a case: from the name of a tensor to its values, the same bits on every platform.

A tensor's name (the case's id without its property, and the argument) is hashed to the key of
numpy's Philox, a counter-based generator whose raw 64-bit words are part of its definition. Sums of
four 16-bit pieces of a word, times a power of two, are nearly normal and exact in float32; only
additions, multiplications and divisions follow, which IEEE 754 rounds alike everywhere, and no
library function that a platform may compute otherwise.
"""

from dataclasses import replace
from functools import lru_cache
from hashlib import blake2b
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moge_hal.conformance.cases import Case

Args = dict[str, Any]  # an operation's arguments in their order, by the names of `ops.py`

# Arguments with an axis of tokens (or of rows of a batch) in front, and those of them that a NaN
# may be put into.
PER_TOKEN = {"ids", "x", "residual", "q", "k", "v", "cos", "sin", "positions", "logits", "weights"}
ACTIVATIONS = {"x", "residual", "q", "k", "v", "logits"}


def words(name: str, count: int) -> npt.NDArray[np.uint64]:
    """`count` words of 64 random bits."""
    key = int.from_bytes(blake2b(name.encode(), digest_size=16).digest(), "little")
    found: npt.NDArray[np.uint64] = np.random.Philox(key=key).random_raw(count)
    return found


def normal(name: str, *shape: int, scale: float = 1.0) -> Tensor:
    """Nearly normal, standard deviation 1.15 * scale, at most 4 * scale; float64 [shape]."""
    pieces = words(name, prod(shape)).view(np.uint16).astype(np.int64).reshape(-1, 4)
    centred = pieces.sum(1) - 131070  # four times the mean of 0 .. 65535
    return torch.from_numpy(centred * 2.0**-15 * scale).reshape(shape)


def uniform(name: str, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Even over (low, high]; float64 [shape]."""
    steps = (words(name, prod(shape)) >> np.uint64(40)).astype(np.float64) + 1
    return torch.from_numpy(low + (high - low) * (steps * 2.0**-24)).reshape(shape)


def integers(name: str, *shape: int, low: int, high: int) -> Tensor:
    """Even over low .. high - 1; int64 [shape]."""
    found = (words(name, prod(shape)) % np.uint64(high - low)).astype(np.int64) + low
    return torch.from_numpy(found).reshape(shape)


def signs(name: str, *shape: int) -> Tensor:
    """-1 or 1; float64 [shape]."""
    return (2 * integers(name, *shape, low=0, high=2) - 1).double()


def order(name: str, count: int) -> Tensor:
    """A permutation of 0 .. count - 1; int64."""
    return torch.from_numpy(np.argsort(words(name, count), kind="stable"))


def fan(inputs: int) -> float:
    """About 1/sqrt(inputs), as a power of two: a sum of so many products keeps the inputs' size."""
    return 2.0 ** -(inputs.bit_length() // 2)


def draw(case: Case) -> Args:
    """The operation's arguments, contiguous on the host. Shared between calls: read them only."""
    return _drawn(replace(case, prop=""))


@lru_cache(maxsize=16)
def _drawn(case: Case) -> Args:
    return _DRAW[case.op](case)


def _float(case: Case, name: str, *shape: int, scale: float = 1.0) -> Tensor:
    return normal(f"{case.key}/{name}", *shape, scale=scale).to(case.dtype)


def _embed(case: Case) -> Args:
    s = case.sizes
    ids = integers(f"{case.key}/ids", s["T"], low=0, high=s["V"])
    return {"ids": ids, "w": _float(case, "w", s["V"], s["D"], scale=case.scale)}


def _linear(case: Case) -> Args:
    s = case.sizes
    return {
        "x": _float(case, "x", s["T"], s["I"], scale=case.scale),
        "w": _float(case, "w", s["O"], s["I"], scale=fan(s["I"])),
        "b": None if "nobias" in case.words else _float(case, "b", s["O"]),
    }


def _rms_norm(case: Case) -> Args:
    s = case.sizes
    x = _float(case, "x", s["T"], s["D"], scale=case.scale)
    return {"x": x, "w": _float(case, "w", s["D"]), "eps": _epsilon(case)}


def _add_rms_norm(case: Case) -> Args:
    s = case.sizes
    x = _float(case, "x", s["T"], s["D"], scale=case.scale)
    residual = _float(case, "residual", s["T"], s["D"], scale=case.scale)
    return {"x": x, "residual": residual, "w": _float(case, "w", s["D"]), "eps": _epsilon(case)}


def _epsilon(case: Case) -> float:
    return float(f"1e-{case.sizes.get('eps', 5)}")


def _rotary(case: Case) -> Args:
    s = case.sizes
    # Points of the unit circle without a cosine: ((1 - t^2)/(1 + t^2), 2t/(1 + t^2)).
    t = normal(f"{case.key}/t", s["B"], s["S"], s["d"] // 2)
    return {
        "q": _float(case, "q", s["B"], s["S"], s["H"], s["d"], scale=case.scale),
        "k": _float(case, "k", s["B"], s["S"], s["Hkv"], s["d"], scale=case.scale),
        "cos": ((1 - t * t) / (1 + t * t)).float(),
        "sin": (2 * t / (1 + t * t)).float(),
    }


def _attention(case: Case) -> Args:
    s = case.sizes
    # The queries' scale takes the softmax from flat to sharp, up to 4. Beyond, a score's own
    # rounding decides between near-ties and the error of a right kernel is a matter of luck (1 in
    # 100 failed at 30), so the rest is the values'.
    sharp = min(case.scale, 4.0)
    if "large" in case.words:
        return _large(case)
    return {
        "q": _float(case, "q", s["B"], s["S"], s["H"], s["d"], scale=sharp),
        "k": _float(case, "k", s["B"], s["S"], s["Hkv"], s["d"]),
        "v": _float(case, "v", s["B"], s["S"], s["Hkv"], s["d"], scale=case.scale / sharp),
        "cache": None,
        "positions": torch.arange(s["S"]).repeat(s["B"], 1),
    }


def _large(case: Case) -> Args:
    """Scores of tens of thousands, all exact, and far enough apart that the softmax is exactly 1 at
    the largest key: whoever can hold them is right to the last bit."""
    s = case.sizes
    sign = signs(f"{case.key}/signs", s["d"])
    sizes = 8.0 + 2.0 * order(f"{case.key}/order", s["S"])
    keys = (sizes[:, None, None] * sign).expand(s["B"], -1, s["Hkv"], -1)
    rows = 1 - 2 * (torch.arange(s["B"]) % 2)  # in every second row the scores are negative
    queries = 32 * rows[:, None, None, None] * sign.expand(s["B"], s["S"], s["H"], -1)
    return {
        "q": queries.to(case.dtype),
        "k": keys.to(case.dtype).contiguous(),
        "v": _float(case, "v", s["B"], s["S"], s["Hkv"], s["d"], scale=case.scale),
        "cache": None,
        "positions": torch.arange(s["S"]).repeat(s["B"], 1),
    }


def _swiglu_ffn(case: Case) -> Args:
    s = case.sizes
    return {
        "x": _float(case, "x", s["T"], s["D"], scale=case.scale),
        "gate_up": _float(case, "gate_up", 2 * s["F"], s["D"], scale=fan(s["D"])),
        "down": _float(case, "down", s["D"], s["F"], scale=fan(s["F"])),
    }


def _router_logits(case: Case) -> Args:
    s = case.sizes
    return {
        "x": _float(case, "x", s["T"], s["D"], scale=case.scale),
        "w": _float(case, "w", s["E"], s["D"], scale=fan(s["D"])),
    }


def _route(case: Case) -> Args:
    s = case.sizes
    biased = "limit" in s or "sigmoid" in case.words
    scale = uniform(f"{case.key}/scale", s["E"], low=0.5, high=2.0).float()
    scale *= signs(f"{case.key}/sign", s["E"]).float()  # nothing says that a scale is positive
    bias = normal(f"{case.key}/bias", s["E"], scale=0.25).float()
    return {
        "logits": normal(f"{case.key}/logits", s["T"], s["E"], scale=case.scale).float(),
        "spec": case.spec,
        "scale": None if biased or case.words & {"noscale", "renorm"} else scale,
        "bias": bias if biased else None,
    }


def _experts(case: Case) -> Args:
    s = case.sizes
    tokens, groups, each = s["T"], s["G"], s["E"] // s["G"]
    lots = torch.from_numpy(
        np.argsort(
            words(f"{case.key}/ids", tokens * s["E"]).reshape(tokens, groups, each), kind="stable"
        )
    )
    ids = lots[..., : s["K"] // groups] + torch.arange(0, s["E"], each)[:, None]
    if "crowded" in case.words:
        ids = ids[:1].expand_as(ids)
    weights = uniform(f"{case.key}/weights", tokens, s["K"])
    weights *= signs(f"{case.key}/sign", tokens, s["K"])  # router_scale may make them negative
    if "cancel" in case.words:
        return _cancel(case, ids.reshape(tokens, s["K"]).int())
    return {
        "x": _float(case, "x", tokens, s["D"], scale=case.scale),
        "gate_up": _float(case, "gate_up", s["E"], 2 * s["F"], s["D"], scale=fan(s["D"])),
        "down": _float(case, "down", s["E"], s["D"], s["F"], scale=fan(s["F"])),
        "ids": ids.reshape(tokens, s["K"]).int(),
        "weights": weights.float(),
        "first": 0,
    }


def _cancel(case: Case, ids: torch.Tensor) -> Args:
    """Equal experts whose weights are 1, -1 and small powers of two, all of it exact in every dtype
    and order. Whoever adds up a token's experts in bfloat16 loses the small ones."""
    s = case.sizes
    width, inner = s["D"], s["F"]
    x = integers(f"{case.key}/x", s["T"], width, low=-1, high=2)
    x[:, 0] = 1
    gate = torch.zeros(inner, width)
    gate[:, 0] = 32.0  # silu(32) is 32 in every dtype
    up = integers(f"{case.key}/up", inner, width, low=-1, high=2).float()
    down = integers(f"{case.key}/down", width, inner, low=-1, high=2)
    small = [2.0**-7] * (s["K"] - 2)
    weights = torch.tensor([1.0, *small[:2], -1.0, *small[2:]]).repeat(s["T"], 1)
    return {
        "x": x.to(case.dtype),
        "gate_up": torch.cat([gate, up]).to(case.dtype).repeat(s["E"], 1, 1),
        "down": down.to(case.dtype).repeat(s["E"], 1, 1),
        "ids": ids,
        "weights": weights,
        "first": 0,
    }


_DRAW = {
    "embed": _embed,
    "linear": _linear,
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "rotary": _rotary,
    "attention": _attention,
    "swiglu_ffn": _swiglu_ffn,
    "router_logits": _router_logits,
    "route": _route,
    "experts": _experts,
}
