"""The transformer, written once against the operations of a backend. Nothing here knows which chip
it is on.

Pre-norm decoder of Pangu Pro MoE: grouped-query attention with biases on q, k, v and o, half-split
rotary embedding, and in every layer a mixture of grouped experts beside a shared expert. Modules
hold the weights under the released names (gate and up projections fused, experts stacked); `roles`
tells a backend what each weight is for when it may pack it.
"""

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from moge_hal.backend import Backend, StepOut
from moge_hal.config import Config
from moge_hal.ops import up
from moge_hal.rotary import RotaryTables


class Weights(nn.Module):
    """A module that holds weights and says which argument of which operation each of them is."""

    roles: ClassVar[dict[str, str]] = {}

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            # One element seen as the whole shape: a skeleton of any size costs no memory.
            self.register_parameter(name, nn.Parameter(torch.zeros(()).expand(shape)))


class Norm(Weights):
    roles: ClassVar = {"weight": "rms_norm.w"}
    weight: Tensor


class Linear(Weights):
    roles: ClassVar = {"weight": "linear.w", "bias": "linear.b"}
    weight: Tensor
    bias: Tensor


class Embedding(Weights):
    roles: ClassVar = {"weight": "embed.w"}
    weight: Tensor


class Gate(Weights):
    roles: ClassVar = {"weight": "router_logits.w"}
    weight: Tensor


class SharedExpert(Weights):
    roles: ClassVar = {"gate_up": "swiglu_ffn.gate_up", "down": "swiglu_ffn.down"}
    gate_up: Tensor
    down: Tensor


class Experts(Weights):
    roles: ClassVar = {"gate_up": "experts.gate_up", "down": "experts.down"}
    gate_up: Tensor
    down: Tensor


class Attention(nn.Module):
    """x [T, D] of B sequences -> [T, D]."""

    def __init__(self, config: Config, backend: Backend) -> None:
        super().__init__()
        self.backend = backend
        self.head_dim = d = config.head_dim
        hidden = config.hidden_size
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = Linear(weight=(heads * d, hidden), bias=(heads * d,))
        self.k_proj = Linear(weight=(kv_heads * d, hidden), bias=(kv_heads * d,))
        self.v_proj = Linear(weight=(kv_heads * d, hidden), bias=(kv_heads * d,))
        self.o_proj = Linear(weight=(hidden, heads * d), bias=(hidden,))

    def forward(
        self, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, cache: Any
    ) -> tuple[Tensor, Any]:
        q, k, v = (
            y.view(*positions.shape, y.shape[-1] // self.head_dim, self.head_dim)
            for y in (
                self.backend.linear(x, p.weight, p.bias)
                for p in (self.q_proj, self.k_proj, self.v_proj)
            )
        )
        q, k = self.backend.rotary(q, k, cos, sin)
        mixed, cache = self.backend.attention(q, k, v, cache, positions)
        rows = mixed.reshape(-1, mixed.shape[-2] * mixed.shape[-1])
        return self.backend.linear(rows, self.o_proj.weight, self.o_proj.bias), cache


class GroupedExperts(Weights):
    """x [T, D] -> [T, D], ids [T, K], router logits [T, E]: routed experts plus the shared one,
    which has no gate.
    """

    roles: ClassVar = {"router_scale": "route.scale"}
    router_scale: Tensor

    def __init__(self, config: Config, backend: Backend) -> None:
        experts, hidden = config.num_experts, config.hidden_size
        routed, shared = config.moe_intermediate_size, config.shared_expert_intermediate_size
        super().__init__(router_scale=(experts,))
        self.backend = backend
        self.spec = config.route
        self.gate = Gate(weight=(experts, hidden))
        self.experts = Experts(
            gate_up=(experts, 2 * routed, hidden), down=(experts, hidden, routed)
        )
        self.shared_expert = SharedExpert(gate_up=(2 * shared, hidden), down=(hidden, shared))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.training:
            # Training may run under autocast, which narrows products; the router's stay float32,
            # whatever a backend makes of them.
            with torch.autocast(x.device.type, enabled=False):
                logits = self.backend.router_logits(x, self.gate.weight)
        else:
            logits = self.backend.router_logits(x, self.gate.weight)
        ids, weights = self.backend.route(logits, self.spec, self.router_scale)
        routed = self.backend.experts(x, self.experts.gate_up, self.experts.down, ids, weights)
        shared = self.backend.swiglu_ffn(x, self.shared_expert.gate_up, self.shared_expert.down)
        return routed + shared, ids, logits


class Layer(nn.Module):
    def __init__(self, config: Config, backend: Backend) -> None:
        super().__init__()
        self.input_layernorm = Norm(weight=(config.hidden_size,))
        self.self_attn = Attention(config, backend)
        self.post_attention_layernorm = Norm(weight=(config.hidden_size,))
        self.mlp = GroupedExperts(config, backend)


class Transformer(nn.Module):
    """A `Step`: ids and positions [B, S], cache -> logits, cache, routes."""

    def __init__(self, config: Config, backend: Backend, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        self.embed_tokens = Embedding(weight=(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(Layer(config, backend) for _ in range(config.num_hidden_layers))
        self.norm = Norm(weight=(config.hidden_size,))
        self.lm_head = Linear(weight=(config.vocab_size, config.hidden_size))
        exact = torch.promote_types(dtype, torch.float32)
        self.rotary = RotaryTables(
            config.head_dim, config.rope_theta, config.max_position_embeddings, exact
        )

    def forward(
        self, ids: Tensor, positions: Tensor, cache: Any, last_only: bool = False
    ) -> StepOut:
        run, eps = self.backend, self.config.rms_norm_eps
        cos, sin = self.rotary(positions)
        residual = run.embed(ids.reshape(-1), self.embed_tokens.weight)  # [T, D]
        layers = cast(list[Layer], list(self.layers))  # nn.ModuleList says Module
        x = run.rms_norm(residual, layers[0].input_layernorm.weight, eps)
        caches, routes, router_logits = [], [], []
        # Each norm is fused with the addition before it, so the one after a layer belongs to the
        # next layer, or is the last.
        following = [layer.input_layernorm for layer in layers[1:]] + [self.norm]
        for i, (layer, next_norm) in enumerate(zip(layers, following, strict=True)):
            held = None if cache is None else cache.layers[i]
            x, held = layer.self_attn(x, positions, cos, sin, held)
            norm = layer.post_attention_layernorm
            x, residual = run.add_rms_norm(x, residual, norm.weight, eps)
            x, ids_i, logits_i = layer.mlp(x)
            x, residual = run.add_rms_norm(x, residual, next_norm.weight, eps)
            caches.append(held)
            routes.append(ids_i)
            router_logits.append(logits_i)
        x = x.view(*ids.shape, x.shape[-1])
        if last_only:
            x = x[:, -1:]
        logits = up(run.linear(x.reshape(-1, x.shape[-1]), self.lm_head.weight))
        return StepOut(
            logits.view(*x.shape[:2], logits.shape[-1]),
            None if cache is None else cache.with_layers(caches),
            torch.stack(routes),
            torch.stack(router_logits) if self.training else None,
        )


def skeleton(config: Config) -> Transformer:
    """The model's structure on the default backend, weights not filled in and without memory of
    their own.
    """
    return Transformer(config, Backend(), torch.float32)
