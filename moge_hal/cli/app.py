"""What all commands share: the application, its options, its entry point.

A mistake of the user's is one sentence on stderr and exit code 2, never a stack trace. What a
command was asked for goes to stdout, everything else to stderr.
"""

import io
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from moge_hal.errors import UserError

app = typer.Typer(
    name="moge-hal",
    help="Run, train, export and judge Mixture-of-Grouped-Experts models on the chip you have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

ModelOption = Annotated[
    Path | None,
    typer.Option("--model", help="A model's folder; left out, the model that comes with moge_hal."),
]
BackendOption = Annotated[
    str | None,
    typer.Option("--backend", help="As MOGE_HAL_BACKEND: a name, name:index, a,b or auto."),
]
DtypeOption = Annotated[
    str | None, typer.Option("--dtype", help="Type to compute in; float32 if left out.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable, on stdout.")]


def main() -> None:
    """The entry point: runs the command and turns a `UserError` into a sentence and exit code 2.

    typer itself sees to Ctrl-C and to a reader of our output that goes away, as `head` does.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack a letter that a model writes
    sys.path.append(os.getcwd())  # where the author of a backend `package.module:Class` works
    try:
        app()
    except UserError as error:
        print(f"moge-hal: {error}", file=sys.stderr)
        sys.exit(2)


def example(line: str) -> str:
    """The epilogue of a command's --help."""
    return f"Example: [bold]{line}[/bold]"


def note(text: str) -> None:
    """Something to know that is not what was asked for."""
    print(text, file=sys.stderr)


def progress() -> Any:
    """A bar for long work, on stderr, if that is a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,  # what it leads to is told after it, be it a result or an error
        disable=not console.is_terminal,
    )
