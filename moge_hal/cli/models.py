"""Commands about models: backends, generate, train, export, balance."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

# What needs torch is imported by the command that needs it, so that --help is there at once.
from moge_hal.cli.app import (
    BackendOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    app,
    example,
    note,
    progress,
)
from moge_hal.errors import UserError, refuse


@app.command(epilog=example("moge-hal backends"))
def backends(as_json: JsonOption = False) -> None:
    """List every backend that is installed: whether it can run here, on what, or why not."""
    from moge_hal import registry

    rows = registry.backends()
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print(registry.table(rows))


@app.command(epilog=example('moge-hal generate "It is a truth" --max-new-tokens 80 --seed 1'))
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="One or more prompts.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="Read one prompt from a file, - for standard input.")
    ] = None,
    model: ModelOption = None,
    backend: BackendOption = None,
    dtype: DtypeOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 = greedy.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the likeliest p of mass.")] = 0.95,
    seed: Annotated[int, typer.Option(help="The same seed writes the same text.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End at this text; repeatable.")] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Say which implementation runs each operation.")
    ] = False,
) -> None:
    """Write text that follows the prompts, which are printed with it."""
    from moge_hal.loading import load

    texts = _prompts(prompts, prompt_file)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "stop": tuple(stop or ()),
    }
    loaded = load(model, backend, dtype)
    if report:
        note(loaded.report())
    if len(texts) == 1:
        stream = loaded.stream(texts[0], **options)
        piece = next(stream, None)  # what is wrong with the prompt shows before it is printed
        print(texts[0], end="", flush=True)
        while piece is not None:
            print(piece.text, end="", flush=True)
            piece = next(stream, None)
        print()
    else:
        for text, completion in zip(texts, loaded.generate(texts, **options), strict=True):
            print(f"{text}{completion}\n")


def _prompts(prompts: list[str] | None, prompt_file: Path | None) -> list[str]:
    if (prompts is None) == (prompt_file is None):
        raise UserError('give a prompt, as in `moge-hal generate "Call me"`, or --prompt-file')
    if prompts is not None:
        return prompts
    assert prompt_file is not None
    try:
        data = sys.stdin.buffer.read() if str(prompt_file) == "-" else prompt_file.read_bytes()
        return [data.decode("utf-8")]
    except UnicodeDecodeError as error:
        raise UserError(
            f"the prompt in {prompt_file} is not UTF-8 at byte {error.start}; convert it"
        ) from error
    except OSError as error:
        raise UserError(f"the prompt {prompt_file} cannot be read: {error.strerror}") from error


@app.command(epilog=example("moge-hal export exported --model my-model"))
def export(
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    model: ModelOption = None,
    routes: Annotated[
        bool, typer.Option("--routes", help="Add the experts of every token as a last output.")
    ] = False,
) -> None:
    """Write a model as ONNX, with configuration and tokenizer, checked against torch."""
    from moge_hal.export import to_onnx
    from moge_hal.loading import shipped_model

    with progress() as bars:
        bar = bars.add_task("export", total=None)

        def show(stage: str) -> None:
            bars.update(bar, description=stage)

        to_onnx(model or shipped_model(), out, routes=routes, progress=show)
    note(f"{out}: the export equals the model; {out / 'README.md'} says how to run it")


@app.command(epilog=example("moge-hal train my-run --corpus my-texts --steps 2000"))
def train(
    out: Annotated[Path, typer.Argument(help="A new folder, or that of a run to go on with.")],
    corpus: Annotated[
        Path | None, typer.Option(help="A .txt, .jsonl(.xz) or folder; left out, the novels.")
    ] = None,
    preset: Annotated[str, typer.Option(help="Which sizes the model has.")] = "novels",
    steps: Annotated[int, typer.Option(help="Updates in all.")] = 5000,
    rows: Annotated[int, typer.Option(help="Rows a step.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens a row.")] = 512,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 4e-3,
    warmup: Annotated[
        int | None, typer.Option(help="Steps until the peak; left out, 100 or a tenth of all.")
    ] = None,
    aux: Annotated[
        float | None, typer.Option(help="Weight of the load-balancing loss; None = the preset's.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the first weights and of the batches.")] = 1,
    threads: Annotated[
        int, typer.Option(help="They shape the last bits, so a run keeps them.")
    ] = 1,
    validate_every: Annotated[
        int, typer.Option(help="Validate and save every so many steps.")
    ] = 200,
    backend: BackendOption = None,
) -> None:
    """Pre-train a model from text. Interrupted, the same command goes on, bit for bit."""
    import torch

    from moge_hal.config import preset as named
    from moge_hal.loading import shipped_model
    from moge_hal.registry import get_backend
    from moge_hal.training.bpe import LEAST
    from moge_hal.training.train import Recipe, Validation
    from moge_hal.training.train import train as run

    most = 4 * (os.cpu_count() or 1)
    if not 1 <= threads <= most:
        refuse("--threads", threads, f"must be from 1 to {most}, four a processor of this machine")
    if not 0 < rate < float("inf"):
        refuse("--rate", rate, "must be a number above 0")
    if aux is not None and not 0 <= aux < float("inf"):
        refuse("--aux", aux, "must be a number of at least 0")
    torch.set_num_threads(threads)
    config = named(preset) if aux is None else named(preset, router_aux_loss_coef=aux)
    if config.vocab_size < LEAST:
        rule = f"has a vocabulary of {config.vocab_size}, but text needs at least {LEAST} tokens"
        refuse("--preset", preset, f"{rule}: choose another preset, such as novels")
    recipe = Recipe(
        steps=steps,
        rows=rows,
        length=length,
        peak=rate,
        warmup=min(100, steps // 10) if warmup is None else warmup,
        seed=seed,
    )
    with progress() as bars:
        bar = bars.add_task("reading the corpus", total=steps)

        def show(step: int, loss: float, validation: Validation | None) -> None:
            bars.update(bar, completed=step, description=f"loss {loss:.3f}")
            if validation is not None:
                bars.console.print(
                    f"step {step}: {validation.bits_per_byte:.4f} bits per byte held out, "
                    f"experts' load {validation.idlest:.2f} .. {validation.busiest:.2f} of the mean"
                )

        validation = run(
            out,
            config,
            recipe,
            get_backend(backend),
            corpus or shipped_model() / "corpus.jsonl.xz",
            validate_every=validate_every,
            observe=show,
        )
    note(
        f"{out / 'model'}: {validation.bits_per_byte:.4f} bits per byte of held-out text; "
        f'try: moge-hal generate --model {out / "model"} "Once"'
    )


@app.command("balance", epilog=example("moge-hal balance --picture balance.png"))
def show_balance(
    model: ModelOption = None,
    text: Annotated[
        Path | None, typer.Option(help="Text to route; left out, held-out text of the novels.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw a PNG here.")] = None,
    backend: BackendOption = None,
    as_json: JsonOption = False,
) -> None:
    """Route real text and show every device's load: MoGE beside a conventional top-k."""
    from rich.console import Console

    from moge_hal.cli.balance import as_json as rows_as_json
    from moge_hal.cli.balance import draw, measure, table
    from moge_hal.loading import load, shipped_model
    from moge_hal.training.data import read_corpus, split

    if picture is not None and picture.suffix.lower() != ".png":
        raise UserError(f"the picture {picture} must be named .png, the only format")
    loaded = load(model, backend)
    if loaded.tokenizer is None:
        raise UserError(f"{model} has no tokenizer; balance needs one to read text")
    if text is None:
        documents = split(read_corpus(shipped_model() / "corpus.jsonl.xz"))[1]
    else:
        documents = read_corpus(text)
    ids = loaded.tokenizer.encode("\n".join(d.text for d in documents)[:40_000])
    rows = measure(loaded, ids)
    if as_json:
        print(json.dumps(rows_as_json(rows), indent=2))
    else:
        Console().print(table(rows, len(ids)))
    if picture is not None:
        draw(rows, picture)
