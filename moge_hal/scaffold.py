"""A new backend's package, complete from the first minute: `moge-hal new-backend NAME`.

The files lie in `template/`, where a backend named `chip-name` is spelt in three ways.
"""

import keyword
import re
from pathlib import Path

from moge_hal.errors import UserError
from moge_hal.files import new_folder
from moge_hal.registry import backends, name_fault

LONGEST = 32  # characters; a longer name would push lines of code beyond their width

_TEMPLATES = Path(__file__).with_name("template")
_FILES = {  # in the new folder -> in `template/`
    ".github/workflows/conformance.yml": "workflow.yml.in",
    ".gitignore": "gitignore.in",
    "README.md": "README.md.in",
    "deviations.toml": "deviations.toml.in",
    "moge_hal_chip_name/__init__.py": "backend.py.in",
    "moge_hal_chip_name/py.typed": "py.typed.in",
    "pyproject.toml": "pyproject.toml.in",
    "tests/test_conformance.py": "test_conformance.py.in",
}


def new_backend(name: str, into: str | Path = ".") -> Path:
    """Writes the package `moge-hal-NAME` of a backend `NAME` into a folder, and returns its path.

    It passes the conformance suite as it is, since the CPU stands in for the chip. Raises
    `UserError` for a name that cannot be one or is taken, and for a folder that exists.
    """
    _check_name(name)
    spelt = {
        "chip-name": name,
        "chip_name": name.replace("-", "_"),
        "ChipName": "".join(word.capitalize() for word in name.replace("-", "_").split("_")),
    }
    placeholder = re.compile("|".join(spelt))

    def spell(found: re.Match[str]) -> str:
        return spelt[found[0]]

    target = Path(into) / f"moge-hal-{name}"
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists already: choose another name, or another place")
    with new_folder(target) as folder:
        for path, template in _FILES.items():
            text = (_TEMPLATES / template).read_text("utf-8")
            path, text = (placeholder.sub(spell, each) for each in (path, text))
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, "utf-8", newline="\n")
    return target


def _check_name(name: str) -> None:
    fault = name_fault(name)
    if fault is None and keyword.iskeyword(name):
        fault = f"the name {name!r} is a word of Python"
    if fault is None and len(name) > LONGEST:
        fault = f"the name {name!r} is longer than {LONGEST} characters"
    if fault is not None:
        raise UserError(f"{fault}: choose another name for the backend")
    for row in backends():  # my-chip and my_chip would be one package
        if row.name.replace("-", "_") == name.replace("-", "_"):
            raise UserError(
                f"the name {name!r} is taken by the backend {row.name!r} of {row.source}: choose "
                f"another one, or uninstall that"
            )
