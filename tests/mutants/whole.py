"""Models whose steps, not their operations, have a fault."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moge_hal.backend import Backend, StepOut
from moge_hal.model import Transformer


class Wrapped(Backend):
    """A right model; a mutant changes what goes into its step, or what comes out."""

    def change(self, run: Any, ids: Tensor, positions: Tensor, cache: Any, last: bool) -> StepOut:
        out: StepOut = run(ids, positions, cache, last)
        return out

    def compile(self, step: Any, example: tuple[Any, ...], dynamic: Any) -> Any:
        if not isinstance(step, Transformer):
            return step

        def run(ids: Tensor, positions: Tensor, cache: Any, last_only: bool = False) -> StepOut:
            return self.change(step, ids, positions, cache, last_only)

        return run


class FirstInsteadOfLast(Wrapped):
    """Asked for the last position's logits, gives the first one's."""

    name = "first-instead-of-last"

    def change(self, run: Any, ids: Tensor, positions: Tensor, cache: Any, last: bool) -> StepOut:
        out = super().change(run, ids, positions, cache, False)
        return out._replace(logits=out.logits[:, :1]) if last else out


class LastOfTheFirstRow(Wrapped):
    """Asked for the last position's logits, gives all rows those of the first."""

    name = "last-of-the-first-row"

    def change(self, run: Any, ids: Tensor, positions: Tensor, cache: Any, last: bool) -> StepOut:
        out = super().change(run, ids, positions, cache, last)
        return out._replace(logits=out.logits[:1].expand_as(out.logits)) if last else out


class LastIgnored(Wrapped):
    """Gives all positions' logits whatever it is asked for."""

    name = "last-ignored"

    def change(self, run: Any, ids: Tensor, positions: Tensor, cache: Any, last: bool) -> StepOut:
        return super().change(run, ids, positions, cache, False)


class LogitsNarrow(Wrapped):
    """Logits are returned in bfloat16."""

    name = "logits-narrow"

    def change(self, run: Any, ids: Tensor, positions: Tensor, cache: Any, last: bool) -> StepOut:
        out = super().change(run, ids, positions, cache, last)
        return out._replace(logits=out.logits.bfloat16())


class LogitsRounded(Wrapped):
    """Logits were bfloat16 on their way."""

    name = "logits-rounded"

    def change(self, run: Any, ids: Tensor, positions: Tensor, cache: Any, last: bool) -> StepOut:
        out = super().change(run, ids, positions, cache, last)
        return out._replace(logits=out.logits.bfloat16().float())


class LogitsInOneBuffer(Wrapped):
    """Logits lie in a buffer that the next step of the same size writes over."""

    name = "logits-in-one-buffer"

    def __init__(self, index: int | None = None) -> None:
        super().__init__(index)
        self.buffers: dict[Any, Tensor] = {}

    def change(self, run: Any, ids: Tensor, positions: Tensor, cache: Any, last: bool) -> StepOut:
        out = super().change(run, ids, positions, cache, last)
        buffer = self.buffers.setdefault(out.logits.shape, out.logits)
        return out._replace(logits=buffer.copy_(out.logits))


class RoutesBatchLast(Wrapped):
    """Routes are reported position by position instead of row by row."""

    name = "routes-batch-last"

    def change(self, run: Any, ids: Tensor, positions: Tensor, cache: Any, last: bool) -> StepOut:
        out = super().change(run, ids, positions, cache, last)
        turned = out.routes.unflatten(1, tuple(ids.shape)).transpose(1, 2).flatten(1, 2)
        return out._replace(routes=turned)


class RoutesOfLayerZero(Wrapped):
    """The first layer's routes are reported for all layers."""

    name = "routes-of-layer-zero"

    def change(self, run: Any, ids: Tensor, positions: Tensor, cache: Any, last: bool) -> StepOut:
        out = super().change(run, ids, positions, cache, last)
        return out._replace(routes=out.routes[:1].expand_as(out.routes))


class RoutesOfSixtyFourBits(Wrapped):
    """Routes are reported in 64 bits."""

    name = "routes-of-64-bits"

    def change(self, run: Any, ids: Tensor, positions: Tensor, cache: Any, last: bool) -> StepOut:
        out = super().change(run, ids, positions, cache, last)
        return out._replace(routes=out.routes.long())


class PositionsIgnored(Wrapped):
    """Counts the steps' columns itself instead of reading the positions."""

    name = "positions-ignored"
    seen = 0

    def change(self, run: Any, ids: Tensor, positions: Tensor, cache: Any, last: bool) -> StepOut:
        self.seen = 0 if cache is None or bool((positions == 0).any()) else self.seen
        counted = torch.arange(self.seen, self.seen + ids.shape[1]).expand_as(positions)
        self.seen += ids.shape[1]
        return super().change(run, ids, counted.contiguous(), cache, last)


class PositionsOfRowZero(Wrapped):
    """All rows have the positions of the first one."""

    name = "all-rows-like-the-first"

    def change(self, run: Any, ids: Tensor, positions: Tensor, cache: Any, last: bool) -> StepOut:
        return super().change(
            run, ids, positions[:1].expand_as(positions).contiguous(), cache, last
        )


class OnePositionForAll(Wrapped):
    """In a step of one token, all rows have the position of the longest."""

    name = "one-position-for-all"

    def change(self, run: Any, ids: Tensor, positions: Tensor, cache: Any, last: bool) -> StepOut:
        if positions.shape[1] == 1:
            positions = positions.amax(0, keepdim=True).expand_as(positions).contiguous()
        return super().change(run, ids, positions, cache, last)


class PaddingIsPositionZero(Wrapped):
    """Padding is given position 0 and so takes the first slot."""

    name = "padding-is-position-zero"

    def change(self, run: Any, ids: Tensor, positions: Tensor, cache: Any, last: bool) -> StepOut:
        return super().change(run, ids, positions.clamp(min=0), cache, last)


class PositionsOverwritten(Wrapped):
    """Gives padding a position where the caller's positions lie."""

    name = "positions-overwritten"

    def change(self, run: Any, ids: Tensor, positions: Tensor, cache: Any, last: bool) -> StepOut:
        out = super().change(run, ids, positions, cache, last)
        positions.clamp_(min=0)
        return out


class IdsOverwritten(Wrapped):
    """Uses the caller's ids as scratch memory."""

    name = "ids-overwritten"

    def change(self, run: Any, ids: Tensor, positions: Tensor, cache: Any, last: bool) -> StepOut:
        out = super().change(run, ids, positions, cache, last)
        ids.zero_()
        return out


class RowsInBlocks(Wrapped):
    """A batch is run in blocks of sixteen rows; of the next block, the routes are those of the
    first.
    """

    name = "rows-in-blocks"

    def change(self, run: Any, ids: Tensor, positions: Tensor, cache: Any, last: bool) -> StepOut:
        out = super().change(run, ids, positions, cache, last)
        rows = torch.arange(len(ids)) % 16
        shaped = out.routes.unflatten(1, tuple(ids.shape))
        return out._replace(routes=shaped[:, rows].flatten(1, 2))


class Altered(Backend):
    """A mutant changes the model itself before it runs."""

    def alter(self, model: Transformer) -> None:
        pass

    def compile(self, step: Any, example: tuple[Any, ...], dynamic: Any) -> Any:
        if isinstance(step, Transformer):
            self.alter(step)
        return step


class FinalNormForgotten(Altered):
    """The last norm has no weight."""

    name = "final-norm-forgotten"

    def alter(self, model: Transformer) -> None:
        model.norm.weight = nn.Parameter(torch.ones_like(model.norm.weight), requires_grad=False)


class RouterScaleOfLayerZero(Altered):
    """All layers have the router_scale of the first."""

    name = "router-scale-of-layer-zero"

    def alter(self, model: Transformer) -> None:
        layers: Any = list(model.layers)
        for layer in layers[1:]:
            layer.mlp.router_scale = layers[0].mlp.router_scale


class NormsSwapped(Altered):
    """The two norms of a layer have changed places."""

    name = "norms-swapped"

    def alter(self, model: Transformer) -> None:
        layers: Any = list(model.layers)
        for layer in layers:
            one, other = layer.input_layernorm, layer.post_attention_layernorm
            layer.input_layernorm, layer.post_attention_layernorm = other, one


class KeysAndValuesSwapped(Altered):
    """A fused projection is cut in the order q, v, k."""

    name = "keys-and-values-swapped"

    def alter(self, model: Transformer) -> None:
        layers: Any = list(model.layers)
        for layer in layers:
            attention = layer.self_attn
            attention.k_proj, attention.v_proj = attention.v_proj, attention.k_proj


class HeadIsTied(Altered):
    """The output projection uses the embeddings, as models with tied ones do."""

    name = "head-is-tied"

    def alter(self, model: Transformer) -> None:
        model.lm_head.weight = model.embed_tokens.weight


class EpsilonOfTheConfig(Altered):
    """The model's epsilon is 1e-6 whatever the configuration says."""

    name = "epsilon-of-the-config"

    def alter(self, model: Transformer) -> None:
        model.config = replace(model.config, rms_norm_eps=1e-6)
