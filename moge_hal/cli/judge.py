"""Commands about backends: conformance, verify, matrix, new-backend."""

import json
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

# What needs torch is imported by the command that needs it, so that --help is there at once.
from moge_hal.cli.app import JsonOption, app, example, note
from moge_hal.errors import UserError, refuse

JobsOption = Annotated[
    int,
    typer.Option("--jobs", "-j", help="Processes to share the work; pays where cases are slow."),
]


@app.command(epilog=example("moge-hal conformance --backend cpu,onnx --filter 'experts/*'"))
def conformance(
    backend: Annotated[
        str | None,
        typer.Option("--backend", help="One or more, separated by commas; each is judged."),
    ] = None,
    filters: Annotated[
        list[str] | None, typer.Option("--filter", help="A glob on case ids; repeatable.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="core, train, capture or bitwise: these cases alone.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few cases of every kind.")] = False,
    seed_offset: Annotated[int, typer.Option(help="Other inputs for the same shapes.")] = 0,
    jobs: JobsOption = 1,
    simulate: Annotated[
        bool,
        typer.Option(
            "--simulate", help="The backend's code on the CPU: its chip need not be here."
        ),
    ] = False,
    deviations: Annotated[
        Path | None, typer.Option(help="A TOML file of known deviations, which must be met.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Write report.json, junit.xml, report.html into this folder."),
    ] = None,
    golden: Annotated[
        list[Path] | None,
        typer.Option(help="Judge on stored cases instead: a .npz file or a folder; repeatable."),
    ] = None,
    only_list: Annotated[
        bool, typer.Option("--list", help="Print ids instead of judging.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Judge backends against the specification in float64. Exit code 1: one of them is wrong."""
    from moge_hal.conformance import list_cases, run

    globs = filters or []
    _together("--golden", golden, filters, profile, quick, seed_offset, deviations, report, as_json)
    _together("--list", only_list, backend, golden, deviations, report, as_json)
    if golden:
        raise typer.Exit(_golden(backend, golden, simulate))
    if only_list:
        ids = list_cases(globs, profile=profile, quick=quick, seed_offset=seed_offset)
        print("\n".join(ids))
        return
    if not 1 <= jobs <= 64:
        refuse("--jobs", jobs, "must be from 1 to 64")
    # Whatever a backend prints is no part of the JSON.
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        result = run(
            backend,
            globs,
            profile=profile,
            quick=quick,
            seed_offset=seed_offset,
            simulate=simulate,
            deviations=deviations,
            report=report,
            jobs=jobs,
            echo=not as_json,
        )
    if as_json:
        print(json.dumps(result.data(), indent=2))
    raise typer.Exit(result.exit_code)


def _together(name: str, given: object, *others: object) -> None:
    if given and any(others):
        said = (
            "may stand with --backend and --simulate"
            if name == "--golden"
            else ("may stand with --filter, --profile, --quick and --seed-offset")
        )
        raise UserError(f"{name} {said}, and with nothing else: leave the others out")


def _golden(backend: str | None, files: list[Path], simulate: bool) -> int:
    """Judges stored cases; the exit code."""
    from moge_hal.conformance.golden.check import judge_file
    from moge_hal.conformance.session import split, subjects
    from moge_hal.conformance.verdict import Failure, Skip

    code = 0
    cases = [file for path in files for file in (sorted(path.glob("*.npz")) or [path])]
    found, refused = subjects(None if backend is None else split(backend), simulate)
    for name, reason in refused.items():
        raise UserError(f"{name}: {reason}")
    for subject in found:
        for file in cases:
            try:
                verdict = judge_file(subject, file)
            except Failure as failure:
                code = 1
                off = "" if failure.error is None else f": error {failure.error:.2g}, "
                off += "" if failure.limit is None else f"limit {failure.limit:.2g}"
                print(f"FAILED on {subject.label}: {file}: {failure.reason}{off}")
            except Skip as skip:
                code = 1  # a file that was named was not judged
                print(f"not judged on {subject.label}: {file}: {skip}")
            else:
                size = "" if verdict.error is None else f": error {verdict.error:.2g}, "
                size += "" if verdict.limit is None else f"limit {verdict.limit:.2g}"
                print(f"passed on {subject.label}: {file}{size}")
    return code


@app.command(epilog=example("moge-hal verify report/report.json"))
def verify(
    report: Annotated[Path, typer.Argument(help="A report.json that somebody handed over.")],
    draw: Annotated[int, typer.Option(help="How many cases of a backend to run again.")] = 25,
    seed: Annotated[
        int | None, typer.Option(help="Of the draw, to repeat one; left out, a new one.")
    ] = None,
    allow_import: Annotated[
        bool,
        typer.Option("--allow-import", help="Import a backend that it names package.module:Class."),
    ] = False,
) -> None:
    """Check that a report is whole and sound, and run cases drawn from it again on this machine.
    Exit code 1: it is not, or could not be confirmed."""
    from moge_hal.conformance.reports.verify import verify as check

    found = check(report, draw, seed, allow_import)
    print(found.report())
    raise typer.Exit(found.exit_code)


@app.command(epilog=example("moge-hal matrix cpu/report.json onnx/report.json"))
def matrix(
    reports: Annotated[list[Path], typer.Argument(help="Files report.json.")],
    readme: Annotated[
        Path | None,
        typer.Option(help="Put the table between the two markers of this Markdown file."),
    ] = None,
    only_check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit code 1: the file says otherwise.")
    ] = False,
) -> None:
    """Write the table of what runs where, from reports of the suite."""
    from moge_hal.conformance.reports.matrix import in_readme
    from moge_hal.conformance.reports.matrix import matrix as table_of
    from moge_hal.files import write_file

    table = table_of(reports)
    if readme is None:
        print(table)
        return
    try:
        old = readme.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{readme} cannot be read: {error}") from None
    new = in_readme(old, table)
    if only_check and new != old:
        print(
            f"{readme} has another table than these reports; `moge-hal matrix` without --check "
            f"writes this one:\n\n{table}"
        )
        raise typer.Exit(1)
    if new != old:
        write_file(readme, new.encode())


@app.command("new-backend", epilog=example("moge-hal new-backend mychip"))
def new_backend(
    name: Annotated[str, typer.Argument(help="What MOGE_HAL_BACKEND will be set to.")],
    into: Annotated[Path, typer.Option(help="The folder to make moge-hal-NAME in.")] = Path("."),
) -> None:
    """Write the package of a new backend: complete, and passing from the first minute."""
    from moge_hal.scaffold import new_backend as write

    folder = write(name, into)
    note(
        f"{folder}: its README.md says what to do; first: cd {folder} && pip install -e . && pytest"
    )
