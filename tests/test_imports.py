"""The one-way import rule: the core knows no backend, and only the command line knows everything.

Every import statement of the package (inside functions too) is read from its source, wherever the
package under test lies: in this clone or in site-packages. An arrow from one layer to another must
be in `MAY_IMPORT`.
"""

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import moge_hal

HOME = Path(moge_hal.__path__[0])

# `cli` is the top of the stack; `conformance` judges through the contract and may name no backend.
MAY_IMPORT = {
    "core": {"core"},
    "conformance": {"core", "conformance"},
    "export": {"core", "export"},
    "backends": {"core", "export", "backends"},
    "cli": {"core", "conformance", "export", "backends", "cli"},
}


def layer(module: str) -> str | None:
    """The layer that a dotted name belongs to; None outside this package."""
    package, _, rest = module.partition(".")
    if package != "moge_hal":
        return None
    first = rest.partition(".")[0]
    if first == "__main__":
        return "cli"
    return first if first in MAY_IMPORT else "core"


def folder(name: str) -> Path:
    """Where a subpackage lies, found as Python finds it but without importing it."""
    spec = importlib.util.find_spec(f"moge_hal.{name}")
    assert spec is not None and spec.origin is not None, f"moge_hal.{name} is not importable"
    return Path(spec.origin).parent


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the package: (dotted name, with `.__init__` for a package; file)."""
    roots = {
        "moge_hal": HOME,
        "moge_hal.backends": folder("backends"),
        "moge_hal.export": folder("export"),
    }
    for name, root in roots.items():
        others = [path for path in roots.values() if path != root and root in path.parents]
        for file in sorted(root.rglob("*.py")):
            if not any(other in file.parents for other in others):
                yield ".".join([name, *file.relative_to(root).with_suffix("").parts]), file


def imported(module: str, source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all that a module's source imports, `import_module("name")` included.

    `from a import b` yields a.b, since b may be a module; where b is a function, a.b is in a's
    layer anyway.
    """
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=base, names=names, level=level):
                above = module.split(".")[:-level] if level else []
                prefix = ".".join([*above, *([base] if base else [])])
                yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in names)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name


def forbidden(module: str, source: str) -> list[str]:
    """One line for each import of `module` that the rule forbids."""
    own = layer(module)
    assert own is not None
    found = ((line, name, layer(name)) for line, name in imported(module, source))
    return [
        f"{module}:{line} ({own}) imports {name} ({other})"
        for line, name, other in found
        if other is not None and other not in MAY_IMPORT[own]
    ]


def test_every_arrow_points_one_way() -> None:
    seen = dict.fromkeys(MAY_IMPORT, 0)
    broken = []
    for module, file in modules():
        seen[str(layer(module))] += 1
        broken += forbidden(module, file.read_text(encoding="utf-8"))
    assert not broken, "\n".join(broken)
    assert all(seen.values()), f"a layer without files: nothing was checked there: {seen}"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("moge_hal.registry", "import moge_hal.backends.cpu"),
        ("moge_hal.registry", "from . import backends"),
        ("moge_hal.registry", "def f():\n    from .export.folder import write"),
        ("moge_hal.__init__", "from .cli import main"),
        ("moge_hal.registry", "importlib.import_module('moge_hal.backends.cpu')"),
        ("moge_hal.conformance.plugin", "from ..backends.null import NullBackend"),
        ("moge_hal.conformance.__init__", "from .. import export"),
        ("moge_hal.export.graph", "from moge_hal import backends"),
        ("moge_hal.backends.cpu.__init__", "from ...cli import app"),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str) -> None:
    assert len(forbidden(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("moge_hal.bind", "import torch\nfrom . import ops\nfrom .backend import Backend"),
        (
            "moge_hal.backends.onnx",
            "from ..export import graph\nfrom moge_hal.backend import Facts",
        ),
        (
            "moge_hal.backends.cpu.__init__",
            "from .kernels import experts\nfrom ...ops import route",
        ),
        (
            "moge_hal.cli",
            "from .backends import cpu\nfrom .export import graph\nfrom . import conformance",
        ),
    ],
)
def test_an_allowed_import_is_not(module: str, source: str) -> None:
    assert forbidden(module, source) == []


def test_import_moge_hal_loads_no_backend(tmp_path: Path) -> None:
    """In a fresh interpreter: who only wants the semantics pays for no runtime."""
    unwanted = ["onnx", "onnxruntime", "moge_hal.backends", "moge_hal.export"]
    loaded = f"[name for name in {unwanted} if name in sys.modules]"
    run = subprocess.run(
        [sys.executable, "-c", f"import sys, moge_hal; print({loaded}, moge_hal.__file__)"],
        cwd=tmp_path,  # the interpreter would look in the working directory first
        env={**os.environ, "PYTHONPATH": str(HOME.parent)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == f"[] {HOME / '__init__.py'}"
