"""Runs the suite: pytest, in this process, with our plugin and nothing else.

Nothing outside decides what is judged: neither a configuration file nor a conftest, neither
pytest's environment variables nor other plugins that happen to be installed.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from moge_hal.conformance.cases import PROPERTIES, Case, every_case, parse
from moge_hal.conformance.plugin import ConformancePlugin
from moge_hal.conformance.result import Result
from moge_hal.conformance.subject import Subject
from moge_hal.errors import UserError, close_matches
from moge_hal.registry import get_backend

_SUITE = Path(__file__).with_name("suite.py")


def list_cases(filters: str | Sequence[str] = ()) -> list[str]:
    """The ids that the filters select, all without filters. Raises `UserError` as `run` does."""
    return [case.id for case in select(filters)]


def run(
    backends: str | Sequence[str] | None = None,
    filters: str | Sequence[str] = (),
    *,
    echo: bool = True,
) -> Result:
    """Judges backends.

    backends: names as for `get_backend`, `package.module:Class` included, in a list or with commas
    between them; None = the one that MOGE_HAL_BACKEND names. filters: a glob on ids, or
    several; a case runs if one of them matches it. echo: print progress and the report. Raises
    `UserError` for a backend that does not exist, cannot run here or cannot be bound, and for a
    filter that matches no case.
    """
    cases = select(filters)
    if isinstance(backends, str):
        backends = [name.strip() for name in backends.split(",") if name.strip()]
    subjects = (
        [Subject(get_backend(name), name) for name in dict.fromkeys(backends)]
        if backends is not None
        else [Subject(get_backend())]
    )
    if not subjects:
        raise UserError("no backend was named to be judged: give one or more names")
    plugin = ConformancePlugin(subjects, cases)
    options = ["-c", os.devnull, "--rootdir", str(_SUITE.parent), "--noconftest"]
    options += ["--import-mode=importlib", "--assert=plain", "-p", "no:cacheprovider"]
    if echo:
        options += ["--quiet", "--no-header", "--tb=no", "-rN", "--disable-warnings"]
    else:
        options += ["-p", "no:terminal"]
    with _without_pytest_variables():
        code = pytest.main([*options, str(_SUITE)], plugins=[plugin])
    if code == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with {code!r} before it had judged every case")
    if len(plugin.outcomes) != len(cases) * len(subjects):
        raise RuntimeError("pytest did not run every case")
    return plugin.result()


def select(filters: str | Sequence[str]) -> list[Case]:
    """The cases whose id a glob matches; a whole id may also be one that is not in the list."""
    cases = list(every_case())
    if not filters:
        return cases
    filters = [filters] if isinstance(filters, str) else filters
    chosen: dict[str, Case] = {}
    for pattern in filters:
        found = [case for case in cases if fnmatchcase(case.id, pattern)]
        if not found and pattern.count("/") == 4 and not set(pattern) & set("*?["):
            found = [parse(pattern)]
        if not found:
            globs = [f"{op}/*" for op in PROPERTIES]
            globs += [f"*/{name}" for names in PROPERTIES.values() for name in names.split()]
            close = close_matches(pattern, dict.fromkeys([*globs, *(case.id for case in cases)]))
            rule = "a filter is a glob on whole ids, such as 'experts/*'"
            raise UserError(f"no case matches {pattern!r}; {rule}.{close}")
        chosen |= {case.id: case for case in found}
    return list(chosen.values())


@contextmanager
def _without_pytest_variables() -> Iterator[None]:
    """They are for the pytest that someone started, and this one may run inside it."""
    held = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("PYTEST_")}
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    try:
        yield
    finally:
        del os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"]
        os.environ.update(held)
