"""The log of a training run, one JSON object a validation, and its picture.

The file is rewritten whole every time, so that a kill leaves no half line.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moge_hal.errors import UserError
from moge_hal.files import write_file

Record = dict[str, Any]


def read_log(path: Path, step: int) -> list[Record]:
    """The records up to `step`: what a killed run logged after its last saved state, it will log
    again. Raises `UserError` if the file is damaged.
    """
    if not path.exists():
        return []
    try:
        records = [json.loads(line) for line in path.read_bytes().splitlines()]
        return [record for record in records if record["step"] <= step]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it, the run needs it not") from error


def write_log(path: Path, records: Sequence[Record]) -> None:
    """Writes all records, each with step, loss, train_loss (nats a token) and bits_per_byte."""
    write_file(path, "".join(json.dumps(record) + "\n" for record in records).encode())


def draw_log(path: Path, records: Sequence[Record]) -> None:
    """A picture (PNG): the loss on training and on held-out text over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [record["step"] for record in records]
    last = records[-1]
    per_nat = last["bits_per_byte"] / last["loss"]  # the same in every record: one text
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, colour, label in (
        ("train_loss", "#d9a441", "training text"),
        ("loss", "#1b7f79", "held-out text"),
    ):
        values = [record[name] for record in records]
        axes.plot(steps, values, color=colour, label=label, marker="o", markersize=3)
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.set_xlim(left=0)
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    axes.set_title(f"{last['bits_per_byte']:.3f} bits per byte of held-out text", loc="left")
    bits = axes.secondary_yaxis(
        "right", functions=(lambda nats: nats * per_nat, lambda bits: bits / per_nat)
    )
    bits.set_ylabel("bits per byte, held-out text")
    bits.spines["right"].set_visible(False)
    image = io.BytesIO()
    figure.savefig(image, dpi=110, format="png")
    pyplot.close(figure)
    write_file(path, image.getvalue())
