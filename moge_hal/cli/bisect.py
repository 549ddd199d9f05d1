"""The command `bisect`: from a model that is wrong to the operation that is wrong in it."""

import json
from pathlib import Path
from typing import Annotated

import typer

from moge_hal.cli.app import BackendOption, JsonOption, app, example, progress


@app.command(epilog=example("moge-hal bisect --backend my_chip:MyChip"))
def bisect(
    backend: BackendOption = None,
    model: Annotated[
        Path | None,
        typer.Option(
            help="A model's folder; left out, the suite's small models and the shipped one."
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="Judge this prompt and 8 tokens after it, not the suite's scenes."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Where to save inputs that fail; left out, bisect-OPERATION.npz here."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Find the first layer and operation where a backend makes a whole model wrong. Exit code 1:
    it does."""
    from moge_hal.conformance.bisecting.bisect import bisect as run
    from moge_hal.registry import get_backend, settings

    judged = get_backend(backend)
    asked = backend or settings().backend
    label = judged.name if asked == "auto" or "," in asked else asked
    with progress() as bar:
        task = bar.add_task("bisect", total=None)

        def show(stage: str) -> None:
            bar.update(task, description=stage)

        found = run(judged, label, model, prompt, out, show)
    print(json.dumps(found.data(), indent=2) if as_json else found.report())
    raise typer.Exit(0 if found.finding is None else 1)
