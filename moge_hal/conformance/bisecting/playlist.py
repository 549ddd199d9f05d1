"""What is played to find out whether a model is wrong: the suite's scenes, or a prompt."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from moge_hal.backend import Backend
from moge_hal.bind import bind
from moge_hal.config import Config
from moge_hal.conformance.inputs import integers
from moge_hal.conformance.properties.scenes import Scene, Text
from moge_hal.conformance.properties.whole_model import EMITTED, SCENES, scenes_of
from moge_hal.errors import UserError
from moge_hal.generate import tokens

NEW_TOKENS = 8  # that follow a prompt
_LAST = "long"  # the slowest
_SHORTEST = 3  # positions; a context of fewer cuts a scene off


def scenes(config: Config, weights: Mapping[str, Tensor], key: str = "") -> Iterator[Scene]:
    """Every scene of the suite that fits into the model's context; a cheap one first.

    key: of the suite's cases of this model, if it is one of its models; then the scenes are theirs.
    """
    for name in sorted(SCENES, key=_LAST.__eq__):
        for scene in scenes_of(name, config, key):
            if _SHORTEST <= scene.longest <= config.max_position_embeddings:
                yield scene
    if config.max_position_embeddings > 11 + EMITTED:
        ids = integers(f"{key}/generate/ids", 2, 11, low=0, high=config.vocab_size)
        prompts = [ids[0].tolist(), ids[1, :6].tolist()]
        yield _written(config, weights, "generate", prompts, EMITTED, 5)


def prompt_scene(config: Config, weights: Mapping[str, Tensor], prompt: Sequence[int]) -> Scene:
    """A prompt and the 8 tokens that the specification writes after it, whatever a backend would.

    Raises `UserError` if they do not fit into the context.
    """
    room = config.max_position_embeddings - NEW_TOKENS
    if not 0 < len(prompt) <= room:
        raise UserError(
            f"the prompt has {len(prompt)} tokens; it must have from 1 to {room}, so that "
            f"{NEW_TOKENS} more fit into the model's context"
        )
    return _written(config, weights, "prompt", [list(prompt)], NEW_TOKENS, len(prompt))


def _written(
    config: Config,
    weights: Mapping[str, Tensor],
    name: str,
    prompts: list[list[int]],
    count: int,
    chunk: int,
) -> Scene:
    """What `generate` does: prompts, padded on the left, in chunks; then the new tokens."""
    model = bind(config, weights, Backend(), dtype=torch.float32)
    found = tokens(model, prompts, max_new_tokens=count, chunk=chunk)
    new = [[token.id for token in step] for step in found]
    longest = max(map(len, prompts))
    rows = [
        [0] * (longest - len(p)) + p + list(n)
        for p, n in zip(prompts, zip(*new, strict=True), strict=True)
    ]
    column = torch.arange(longest + count)
    starts = torch.tensor([longest - len(prompt) for prompt in prompts])
    positions = (column - starts[:, None]).clamp(min=-1)
    sizes = [min(chunk, longest - start) for start in range(0, longest, chunk)] + [1] * count
    text = Text(torch.tensor(rows), positions)
    return Scene.of(name, text, sizes, len(column), last_only=True)
