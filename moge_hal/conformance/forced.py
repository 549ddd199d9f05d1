"""The judgement of a whole model: the oracle follows the backend's routes.

A model is judged in two parts, since one near-tie in a router flips an expert and then every number
behind it, in a model that is right. (a) The float64 oracle is FORCED to the backend's routes, and
the logits of every position stay within the limit of a whole model (`limits.py`), p from plain
torch in the model's dtype on the same routes; in float32 never more than 4e-5. (b) Every route
is k experts of every group, and the oracle's router logit of each is within m of the k-th best of
its group; m = twice what the same rule allows for the router's logits, for they are off on both
sides of a comparison.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moge_hal.backend import StepOut
from moge_hal.bind import bind
from moge_hal.config import Config
from moge_hal.conformance.limits import limit, worst_row
from moge_hal.conformance.oracle import Follow, FollowPermuted
from moge_hal.conformance.routing import check_structure
from moge_hal.conformance.verdict import Failure, Verdict
from moge_hal.runtime import Model

CAP = {torch.float32: 4e-5}  # of a whole model, whatever p says


@dataclass(frozen=True)
class Transcript:
    """What a backend did with a batch, however it was cut into steps."""

    ids: Tensor  # [B, S]
    positions: Tensor  # [B, S], -1 = padding
    logits: Tensor  # [B, S, V]; zeros where nobody asked for them
    shown: Tensor  # [B, S] bool: where somebody did
    routes: Tensor  # [L, B, S, K]

    def then(self, later: "Transcript") -> "Transcript":
        """This one, and what the same rows did next."""
        return Transcript(
            torch.cat([self.ids, later.ids], 1),
            torch.cat([self.positions, later.positions], 1),
            torch.cat([self.logits, later.logits], 1),
            torch.cat([self.shown, later.shown], 1),
            torch.cat([self.routes, later.routes], 2),
        )


def transcribe(
    model: Model, ids: Tensor, positions: Tensor, out: StepOut, last_only: bool
) -> Transcript:
    """What one step did with ids and positions [B, S]; a `Failure` if its outputs have another form
    than theirs."""
    config, (batch, length) = model.config, ids.shape
    asked = slice(-1, None) if last_only else slice(None)
    shown = torch.zeros(batch, length, dtype=torch.bool)
    shown[:, asked] = True
    form = (batch, 1 if last_only else length, config.vocab_size)
    _check_form("logits", out.logits, torch.float32, form)
    routed = (config.num_hidden_layers, batch * length, config.num_experts_per_tok)
    _check_form("routes", out.routes, torch.int32, routed)
    logits = torch.zeros(batch, length, config.vocab_size)
    logits[:, asked] = out.logits.cpu()
    return Transcript(ids, positions, logits, shown, out.routes.cpu().unflatten(1, (batch, length)))


def _check_form(name: str, has: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if has.shape != shape or has.dtype != dtype:
        found = f"{list(has.shape)} {has.dtype}"
        raise Failure(f"the {name} of a step are {found}, must be {list(shape)} {dtype}")


class Oracle:
    """The specification on somebody else's routes: in float64, and its peers in the model's dtype.

    weights: of that dtype, in float64 too.
    """

    def __init__(
        self, config: Config, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
    ) -> None:
        self.config = config
        self.dtype = dtype
        self._models: list[tuple[Follow, Model]] = []
        for backend, kind in (
            (Follow(), torch.float64),
            (Follow(), dtype),
            (FollowPermuted("whole model"), dtype),
        ):
            model = bind(config, weights, backend, dtype=kind)
            bound = model.backend
            assert isinstance(bound, Follow)
            self._models.append((bound, model))

    def check(self, got: Transcript) -> Verdict:
        """Both parts of the judgement; raises `Failure`."""
        return self.check_tokens(got, got.ids[:, :0])

    def check_tokens(self, got: Transcript, emitted: Tensor) -> Verdict:
        """The same, and of a greedy text whose last tokens are emitted [B, N], one at a time: each
        is within the limit of the best one, with the oracle forced to the text before it."""
        real = got.positions >= 0
        if not bool(got.logits.isfinite().all()):
            what = "a real" if not bool(got.logits[real].isfinite().all()) else "a padding"
            raise Failure(f"the logits of {what} token are not finite")
        config = self.config
        for layer, ids in enumerate(got.routes):
            check_structure(ids[real], config.route, config.num_experts, f"layer {layer}: ")
        routes = got.routes.flatten(1, 2)
        (logits, router), *peers = [self._follow(*model, got, routes) for model in self._models]
        n = max(*(config.sizes[letter] for letter in ("D", "F", "Fs")), got.ids.shape[1])
        self._check_routes(got, real, router, [peer[1] for peer in peers])
        judged = real & got.shown
        p = max(worst_row(peer[0][real], logits[real]) for peer in peers)
        factor = 3.0 if self.dtype == torch.float32 else 4.0
        rule = limit(p, self.dtype, n, factor, config.num_hidden_layers)
        allowed = min(rule, CAP.get(self.dtype, math.inf))
        error = worst_row(got.logits[judged], logits[judged])
        if error > allowed:
            raise Failure("logits are wrong at the worst position", error, allowed)
        count = emitted.shape[1]
        if count:
            behind = logits[:, -count:]
            lag = behind.amax(-1) - behind.gather(-1, emitted[..., None])[..., 0]
            lag = lag / behind.abs().amax(-1)
            if bool((lag > 2 * allowed).any()):
                raise Failure("a token was emitted that is not the best", float(lag.max()), allowed)
        return Verdict(error, allowed)

    def _follow(
        self, backend: Follow, model: Model, got: Transcript, routes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One pass without a cache -> logits [B, S, V], router logits [L, B*S, E]."""
        backend.follow(list(routes))
        out = model.step(got.ids, got.positions, None)  # whole rows at once
        return out.logits.clone(), torch.stack(backend.router)

    def _check_routes(
        self, got: Transcript, real: Tensor, router: Tensor, by_peer: list[Tensor]
    ) -> None:
        config = self.config
        groups, each = config.num_groups, config.num_experts_per_tok // config.num_groups
        for layer, logits in enumerate(router):
            here = logits[real.flatten()]
            p = max(worst_row(peer[layer][real.flatten()], here) for peer in by_peer)
            # A router's logits are float32 in every dtype; what they are made of is not.
            off = limit(p, self.dtype, config.hidden_size, layers=layer + 1) * here.abs().amax(-1)
            grouped = here.view(len(here), groups, -1)
            best = grouped.topk(each, -1).values[..., -1].repeat_interleave(each, 1)
            gap = (best - here.gather(1, got.routes[layer][real].long())).amax(-1)
            if bool((gap > 2 * off).any()):
                worst = int((gap / off).argmax())
                reason = f"layer {layer}: an expert is not among the best of its group"
                raise Failure(reason, float(gap[worst]), float(2 * off[worst]))
