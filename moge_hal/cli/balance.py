"""The point of MoGE, shown on real text: the load of every device, beside a conventional router.

Text goes through the model; each layer's (token, expert) rows are counted on the device that owns
the expert when 1, 2, .. G devices own equal shares of whole groups. A conventional top-k of the
same k is taken from the same router logits, so nothing differs but the rule.
"""

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from moge_hal import ops
from moge_hal.backend import Backend
from moge_hal.bind import bind
from moge_hal.errors import UserError
from moge_hal.files import write_file
from moge_hal.router import RouteSpec, device_load, imbalance_score
from moge_hal.runtime import Model

CALL = 64  # tokens that devices exchange at once, as in a decoding step of 64 rows


@dataclass(frozen=True)
class Balance:
    """How evenly one router loads a number of devices."""

    router: str  # "MoGE" or "top-k"
    devices: int
    load: list[float]  # each device's rows over the mean, over the whole text and all layers
    busiest: float  # the busiest device's rows over the mean, mean over layers and calls
    score: float  # the paper's imbalance score, mean over layers and calls
    worst: float  # its largest value in any layer and call


def measure(model: Model, ids: Sequence[int]) -> list[Balance]:
    """Routes ids through the model, in windows of its context, and returns a line a router and
    number of devices. Raises `UserError` for fewer than 64 tokens, or a model that was opened
    without its weights.
    """
    config = model.config
    if not model.weights:
        raise UserError(
            "the model was opened without its weights, so its router cannot be compared; "
            "give the folder that it was exported from"
        )
    if len(ids) < CALL:
        raise UserError(f"the text has {len(ids)} tokens; balance needs at least {CALL}")
    routed: dict[str, list[Tensor]] = {"MoGE": [], "top-k": []}
    plain = RouteSpec(groups=1, k=config.num_experts_per_tok)
    # In mode "train" a step returns the router logits too.
    watched = bind(config, model.weights, Backend(), "train").run_step
    window = min(config.max_position_embeddings, 512) // CALL * CALL
    if window == 0:
        raise UserError(f"balance needs a context of at least {CALL} tokens")
    for start in range(0, len(ids) // CALL * CALL, window):
        row = torch.tensor([ids[start : start + window]])
        row = row[:, : row.shape[1] // CALL * CALL]
        positions = torch.arange(row.shape[1])[None]
        routed["MoGE"].append(model.step(row, positions, None, last_only=True).routes.cpu())
        with torch.no_grad():
            logits = watched(row, positions, None, last_only=True).router_logits
        assert logits is not None  # asked for by mode "train"
        routed["top-k"].append(torch.stack([ops.route(layer, plain)[0] for layer in logits]))
    counts = [n for n in range(1, config.num_groups + 1) if config.num_groups % n == 0]
    calls = {
        router: torch.cat(routes, 1).unflatten(1, (-1, CALL)) for router, routes in routed.items()
    }  # [L, calls, CALL, K]
    return [
        _balance(router, n, ids_, config.num_experts)
        for n in counts
        for router, ids_ in calls.items()
    ]


def _balance(router: str, devices: int, calls: Tensor, experts: int) -> Balance:
    load = device_load(calls, experts, devices).double()  # [L, calls, devices]
    total = load.sum((0, 1))
    score = imbalance_score(calls, experts, devices)
    return Balance(
        router=router,
        devices=devices,
        load=(total / total.mean()).tolist(),
        busiest=(load.amax(-1) / load.mean(-1)).mean().item(),
        score=score.mean().item(),
        worst=score.max().item(),
    )


def table(rows: Sequence[Balance], tokens: int) -> Table:
    """For a terminal: what `measure` found out about so many tokens."""
    shown = Table(
        title=f"{tokens // CALL * CALL} tokens of real text, in calls of {CALL}",
        caption="busiest: rows of the busiest device over the mean; score: the imbalance "
        "score, (most - fewest rows) / tokens; both are means over layers and calls. "
        "load: rows of each device over the mean, whole text.",
        title_justify="left",
        caption_justify="left",
    )
    for column in ("devices", "router", "busiest", "score", "worst score", "load"):
        justify: Any = "left" if column in ("router", "load") else "right"
        shown.add_column(column, justify=justify)
    for row in rows:
        shown.add_row(
            str(row.devices),
            row.router,
            f"{row.busiest:.3f}",
            f"{row.score:.3f}",
            f"{row.worst:.3f}",
            " ".join(f"{share:.2f}" for share in row.load),
        )
    return shown


def as_json(rows: Sequence[Balance]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def draw(rows: Sequence[Balance], path: Path) -> None:
    """A picture (PNG): every device's load for the most devices, and the imbalance score for every
    number of them.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    most = max(row.devices for row in rows)
    counts = sorted({row.devices for row in rows} - {1}) or [1]  # one device is no news
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for shift, router, colour in ((-0.2, "MoGE", "#1b7f79"), (0.2, "top-k", "#d1495b")):
        line = [row for row in rows if row.router == router and row.devices in counts]
        last = next(row for row in line if row.devices == most)
        places = [device + shift for device in range(most)]
        left.bar(places, last.load, 0.38, color=colour, label=router)
        places = [place + shift for place in range(len(line))]
        above = [row.worst - row.score for row in line]
        right.bar(places, [row.score for row in line], 0.38, color=colour, label=router)
        right.errorbar(
            places,
            [row.score for row in line],
            yerr=([0.0] * len(line), above),
            fmt="none",
            ecolor="0.3",
            capsize=4,
        )
        for place, row in zip(places, line, strict=True):
            label = f"mean {row.score:.3g}\nworst {row.worst:.3g}"
            right.text(place, row.worst, label, ha="center", va="bottom", fontsize=9)
    left.axhline(1, color="0.3", linewidth=0.8)
    left.set_xticks(range(most))
    left.set_ylim(0, 1.25 * max(max(row.load) for row in rows))
    left.set(xlabel="device", ylabel="rows / mean")
    left.set_title(f"Rows of each of {most} devices, whole text", loc="left")
    right.set_xticks(range(len(counts)), [f"{devices} devices" for devices in counts])
    right.set_ylim(0, 1.4 * max([row.worst for row in rows if row.worst > 0], default=1.0))
    right.set_ylabel("(most rows - fewest rows) / tokens")
    right.set_title(f"Imbalance score in calls of {CALL} tokens", loc="left")
    for axes in (left, right):
        axes.legend(frameon=False, loc="upper left", ncols=2)
        axes.spines[["top", "right"]].set_visible(False)
    image = io.BytesIO()
    figure.savefig(image, dpi=150, format="png")
    pyplot.close(figure)
    write_file(path, image.getvalue())
