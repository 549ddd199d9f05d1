"""Runs the suite: pytest, with our plugin and nothing else.

Nothing outside decides what is judged: neither a configuration file nor a conftest, neither
pytest's environment variables nor other plugins that happen to be installed.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from moge_hal.conformance.plugin import SESSION, Reporter, folder_for
from moge_hal.conformance.result import Result, Selection
from moge_hal.conformance.selection import select
from moge_hal.conformance.session import Options, Session, split
from moge_hal.errors import UserError, require_whole

_SUITE = Path(__file__).with_name("test_suite.py")


def list_cases(
    filters: str | Sequence[str] = (),
    *,
    profile: str | None = None,
    quick: bool = False,
    seed_offset: int = 0,
) -> list[str]:
    """The ids that `run` would judge. Raises `UserError` as it does."""
    return [case.id for case in select(_selection(filters, profile, quick, seed_offset))]


def run(
    backends: str | Sequence[str] | None = None,
    filters: str | Sequence[str] = (),
    *,
    profile: str | None = None,
    quick: bool = False,
    seed_offset: int = 0,
    simulate: bool = False,
    deviations: str | Path | None = None,
    report: str | Path | None = None,
    jobs: int = 1,
    echo: bool = True,
) -> Result:
    """Judges backends.

    backends: names as for `get_backend`, `package.module:Class` included, in a list or with commas
    between them; None = the one that MOGE_HAL_BACKEND names. One that exists and cannot be judged
    is in `Result.refused`, and the others are judged.
    filters: a glob on ids, or several; a case runs if one of them matches it. profile: its cases
    alone. quick: a few cases of every kind. seed_offset: other inputs for the same shapes.
    simulate: the backends' own operations on the CPU, whether their chip is here or not.
    deviations: a TOML file of known ones. report: a folder to write report.json, junit.xml and
    report.html into. jobs: processes to share the work. echo: print progress and the report.

    Raises `UserError` for a name that does not exist, for a selection without cases, and if no
    backend can be judged.
    """
    require_whole("jobs", jobs)
    if isinstance(backends, str):
        backends = split(backends)
    options = Options(
        None if backends is None else tuple(backends),
        _selection(filters, profile, quick, seed_offset),
        simulate,
        None if deviations is None else Path(deviations),
    )
    held = _Held(Session(options))
    args = ["-c", os.devnull, "--rootdir", str(_SUITE.parent), "--noconftest"]
    args += ["--import-mode=importlib", "--assert=plain", "-p", "no:cacheprovider"]
    args += ["-p", "moge_hal.conformance.plugin"]
    if echo:
        args += ["--quiet", "--no-header", "--tb=no", "-rN", "--disable-warnings"]
    else:
        args += ["-p", "no:terminal"]
    if report is not None:
        args += ["--moge-report", str(folder_for(report))]
    if jobs > 1:
        args += ["-p", "xdist", "-n", str(jobs), "--dist", "loadgroup"]
        args += ["--max-worker-restart", "0"]  # a new one confuses this way of sharing the work
        args += _as_arguments(held.session)
    with _environment():
        code = pytest.main([*args, str(_SUITE)], plugins=[held])
    if code == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    reporter = held.reporter
    if reporter is None or not (reporter.complete or reporter.broken):
        why = "\n".join(["", *reporter.not_collected] if reporter else [])
        raise RuntimeError(f"pytest ended with {code!r} before it had judged every case{why}")
    if reporter.unwritten and not reporter.broken:
        raise UserError(reporter.unwritten)
    return reporter.result()


class _Held:
    """Hands the session, made and checked before pytest starts, to the plugin."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.reporter: Reporter | None = None

    def pytest_configure(self, config: pytest.Config) -> None:
        config.stash[SESSION] = self.session

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.reporter = session.config.pluginmanager.getplugin("moge_hal_reporter")


def _selection(
    filters: str | Sequence[str], profile: str | None, quick: bool, seed_offset: int
) -> Selection:
    globs = [filters] if isinstance(filters, str) else list(filters)
    return Selection(globs, profile, quick, seed_offset)


def _as_arguments(session: Session) -> list[str]:
    """The session's options for the workers, which make sessions of their own."""
    options, chosen = session.options, session.options.selection
    args = ["--moge-backend", ",".join(subject.label for subject in session.subjects)]
    args += [f"--moge-filter={glob}" for glob in chosen.filters]
    args += ["--moge-profile", chosen.profile] if chosen.profile else []
    args += ["--moge-quick"] if chosen.quick else []
    args += ["--moge-seed-offset", str(chosen.seed_offset)]
    args += ["--moge-simulate"] if options.simulate else []
    args += ["--moge-deviations", str(options.deviations)] if options.deviations else []
    return args


@contextmanager
def _environment() -> Iterator[None]:
    """pytest's variables are for the pytest that someone started, and this one may run inside it.

    A process takes one thread unless OMP_NUM_THREADS says otherwise: the cases are small, and
    several threads wait for each other most of the time (ten times longer on a busy machine).
    """
    held = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("PYTEST_")}
    ours = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    threads = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        ours["OMP_NUM_THREADS"] = "1"  # for the workers
        torch.set_num_threads(1)
    os.environ.update(ours)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        for name in ours:
            del os.environ[name]
        os.environ.update(held)
