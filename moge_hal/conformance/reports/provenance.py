"""Where a report comes from: the suite's own sources, versions, the checkout, the machine.

Nothing here names a person, a host or a folder: reports are made to be handed on.
"""

import platform
import subprocess
from dataclasses import dataclass
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parents[2]

# What a verdict rests on: the suite from its list of cases to the word, the specification, the
# contract, how a backend is bound to them, and the model that is judged whole. `tests/test_report`
# compares this with what the suite imports.
SOURCES = (
    "backend",
    "bind",
    "cache",
    "config",
    "conformance/cases",
    "conformance/deviations",
    "conformance/digest",
    "conformance/forced",
    "conformance/inputs",
    "conformance/judge",
    "conformance/judging",
    "conformance/levels",
    "conformance/limits",
    "conformance/listing",
    "conformance/oracle",
    "conformance/properties/bitwise",
    "conformance/properties/caching",
    "conformance/properties/capture",
    "conformance/properties/faking",
    "conformance/properties/gradients",
    "conformance/properties/operations",
    "conformance/properties/scenes",
    "conformance/properties/training",
    "conformance/properties/whole_model",
    "conformance/routing",
    "conformance/selection",
    "conformance/session",
    "conformance/subject",
    "conformance/test_suite",
    "conformance/verdict",
    "conformance/weights",
    "generate",
    "model",
    "ops",
    "rotary",
    "router",
    "runtime",
    "sampling",
)
_DISTRIBUTIONS = (
    "moge-hal",
    "torch",
    "numpy",
    "pytest",
    "pytest-xdist",
    "onnx",
    "onnxruntime",
    "triton",
    "torch-npu",
)


def suite_hash() -> str:
    """16 hexadecimal digits over these sources: equal where the same suite judged, wherever it is
    installed, and whether its lines end as on Linux or as on Windows.
    """
    found = blake2b(digest_size=8)
    for name in SOURCES:
        text = (_PACKAGE / f"{name}.py").read_bytes().replace(b"\r\n", b"\n")
        found.update(f"{name} {len(text)};".encode() + text)
    return found.hexdigest()


def versions() -> dict[str, str]:
    """Of Python and of the distributions that take part, those that are installed."""
    found = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Git:
    """The commit that the package runs from. dirty: its files, or Python files beside them, are not
    those of the commit."""

    commit: str
    dirty: bool


def git() -> Git | None:
    """Of the checkout that the package runs from; None if it does not run from one, as when it is
    installed, even if that is inside a checkout of something else."""
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit, status = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    if commit is None or status is None:
        return None
    changed = [line for line in status.splitlines() if line[:2] != "??" or line.endswith(".py")]
    return Git(commit.strip(), bool(changed))


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(_PACKAGE), *words],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):  # no git, no checkout, or one of somebody else's
        return None
    return done.stdout


@dataclass(frozen=True)
class Machine:
    """What the suite ran on, the backend's device aside."""

    platform: str
    processor: str
    threads: int  # that torch computes with


def machine() -> Machine:
    """This one."""
    return Machine(platform.platform(), _processor(), torch.get_num_threads())


def _processor() -> str:
    """Its name: Python's own function knows none on Linux."""
    table = Path("/proc/cpuinfo")
    if table.is_file():
        for line in table.read_text("utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
