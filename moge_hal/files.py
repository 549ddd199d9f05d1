"""Files and folders that appear whole or not at all: written beside, flushed, then renamed."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from moge_hal.errors import UserError

SLOW = 2**28  # bytes that take more than a moment to read or to write: from here on a bar is shown


def write_file(path: str | Path, data: bytes) -> None:
    """Writes or replaces a file, folders that lead to it included.

    Raises `UserError` if that is impossible; what was there is then untouched.
    """
    with _beside(Path(path).resolve()) as beside:
        beside.write_bytes(data)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill. It takes its place at `path` when the block ends; if the block fails,
    nothing is left.

    `path` must be free or an empty folder, in a place that can be written to: else `UserError`,
    before the block runs. An `OSError` in the block (a full disk) becomes a `UserError` too.
    """
    target = Path(path).resolve()
    with _beside(target) as beside:
        if target.is_dir():
            if any(target.iterdir()):
                raise UserError(f"{target} is not empty: give a new folder")
            if os.path.ismount(target) or target == Path.cwd():
                raise UserError(f"{target} is in use and cannot be replaced: give a folder in it")
        elif target.exists():
            raise UserError(f"{target} is a file: give a new folder")
        beside.mkdir()
        yield beside


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A free name near `target`, on the same disk; what the block puts there becomes `target`."""
    # Folders that lead to the target are made last, so that a failure leaves none of them either.
    # The root has no parents; whoever asks for it is told that it is not empty.
    nearest = next(folder for folder in (*target.parents, target) if folder.exists())
    beside = nearest / f".{target.name}.{uuid4().hex[:8]}"
    try:
        yield beside
        for part in (*beside.rglob("*"), beside):
            _flush(part)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside.replace(target)
        _flush(target.parent)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{target} cannot be written ({reason}); nothing was changed") from error
    finally:
        if beside.is_dir():
            shutil.rmtree(beside, ignore_errors=True)
        else:
            with suppress(OSError):  # the error to report is the one above
                beside.unlink()


def _flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk: a rename may overtake them."""
    folder = path.is_dir()
    if folder and os.name == "nt":  # where a folder cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr over `total` bytes, unless it is quick or unseen.

    Gives the function to call with the number of bytes that were done since.
    """
    console = Console(stderr=True)
    columns = TextColumn(title), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    hidden = total < SLOW or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.advance(task, done)
