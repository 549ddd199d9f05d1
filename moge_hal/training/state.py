"""The state of a training run in one safetensors file, from which a run goes on bit for bit.

Weights and AdamW's moments in float32, the step, and the identity of the run: whatever changes the
bits of what follows. Batches and the learning rate are functions of the step, so there is nothing
else to remember. The file is written beside and renamed: the one under the final name is always
whole, also after a kill in the middle of a save.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from moge_hal.errors import UserError
from moge_hal.files import write_file

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def save_state(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    step: int,
    identity: Mapping[str, Any],
) -> None:
    """Writes the state after `step` steps."""
    tensors = {f"weight.{name}": p.detach() for name, p in parameters.items()}
    for name, parameter in parameters.items():
        for moment in MOMENTS:
            tensors[f"adamw.{moment}.{name}"] = optimizer.state[parameter][moment].detach()
    meta = {"step": str(step), "identity": json.dumps(identity, sort_keys=True)}
    write_file(path, save({n: t.contiguous() for n, t in tensors.items()}, metadata=meta))


def load_state(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, Any],
) -> int:
    """Restores weights and moments in place and returns the step.

    Raises `UserError` if the file is damaged, or belongs to a run with another identity, naming
    what differs.
    """
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata()
            step: int = json.loads(meta["step"])
            _same_run(path, json.loads(meta["identity"]), json.loads(json.dumps(identity)))
            for name, parameter in parameters.items():
                parameter.data.copy_(file.get_tensor(f"weight.{name}"))
                optimizer.state[parameter] = {
                    moment: file.get_tensor(f"adamw.{moment}.{name}").to(parameter.device)
                    for moment in MOMENTS
                }
    except (SafetensorError, KeyError, TypeError, OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path} is no whole training state ({error}); remove its folder to start from the "
            f"beginning"
        ) from error
    return step


def _same_run(path: Path, saved: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    was, now = _leaves(saved), _leaves(asked)
    differ = [key for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key)]
    if differ:
        raise UserError(
            f"{path} belongs to a run with "
            + ", ".join(f"{key} = {was.get(key)!r}, not {now.get(key)!r}" for key in differ)
            + "; give the same options to go on with it, or another output folder"
        )


def _leaves(identity: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"recipe": {"seed": 1}} -> {"recipe.seed": 1}."""
    leaves: dict[str, Any] = {}
    for key, value in identity.items():
        leaves |= (
            _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return leaves
