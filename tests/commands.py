"""The command line as tests call it: in this process, by `main`, as the installed script does."""

import io
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from training import write_novel

from moge_hal import cli

TRAIN = ["--steps", "4", "--rows", "2", "--length", "32", "--warmup", "1", "--validate-every", "2"]
PYTHON = [sys.executable, "-m", "moge_hal"]


class Result(NamedTuple):
    code: int
    out: str
    err: str


def run(*argv: object, stdin: bytes = b"", encoding: str = "utf-8") -> Result:
    """`moge-hal argv` in this process, on a terminal of that encoding."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["moge-hal", *map(str, argv)])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8"))
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        with pytest.raises(SystemExit) as ended:
            cli.main()
    texts = []
    for stream in (out, err):
        stream.seek(0)
        texts.append(stream.read())
    return Result(int(ended.value.code or 0), *texts)


def refused(result: Result, *parts: str) -> None:
    """Exit code 2 and one sentence on stderr that says all of `parts`."""
    assert result.code == 2, result
    assert result.out == ""
    assert result.err.startswith("moge-hal: ") and result.err.count("\n") == 1, result.err
    for part in parts:
        assert part in result.err


def train(folder: Path) -> tuple[Path, Path, Result]:
    """Four steps on a few pages: the corpus, the folder of the run, and what the command said."""
    corpus, out = write_novel(folder), folder / "run"
    return corpus, out, run("train", out, "--corpus", corpus, *TRAIN)
