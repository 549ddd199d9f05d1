"""How a backend is found, chosen and refused. Every backend here is a real class in a real module
in a temporary folder; those that are "installed" have a dist-info folder as pip leaves one.
"""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

import moge_hal
from moge_hal import registry
from moge_hal.backend import Backend
from moge_hal.errors import UserError
from moge_hal.registry import (
    BackendError,
    UnknownBackendError,
    backends,
    find,
    get_backend,
    parse_overrides,
    settings,
    source_of,
    table,
)

MODULE = """
from moge_hal.backend import Backend, Probe

class Good(Backend):
    name = "good"
    def probe(self):
        if self.index not in (None, 0):
            return Probe(False, f"there is no good:{self.index}.", "name good:0.")
        return Probe(True, device=f"good:{self.index or 0}")

class Absent(Backend):
    name = "absent"
    def probe(self):
        return Probe(False, "its chip is not here.", "plug it in.")

class Outer:
    class Inner(Good):
        name = "inner"

class CannotBeMade(Backend):
    def __init__(self, index=None):
        raise OSError("libchip.so is missing")

class TakesNoIndex(Backend):
    def __init__(self):
        pass

class ProbeRaises(Backend):
    name = "faulty"
    def probe(self):
        raise RuntimeError("the driver is too old")

class SaysMuch(Backend):
    name = "talker"
    def probe(self):
        return Probe(False, "the driver says:\\n  too\\n  old.", "renew it.")

class RaisesMuch(Backend):
    name = "talker"
    def probe(self):
        raise RuntimeError("the driver says:\\n  too\\n  old")

class ProbeIsNone(Backend):
    name = "faulty"
    def probe(self):
        pass

class NoBackend:
    pass
"""

Install = Callable[..., Path]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No environment of the caller's; a folder on sys.path that holds the module `chips`."""
    for name in ("BACKEND", "OPS", "STRICT", "CACHE"):
        monkeypatch.delenv(f"MOGE_HAL_{name}", raising=False)
    (tmp_path / "chips.py").write_text(MODULE, "utf-8")
    (tmp_path / "raises_at_import.py").write_text("raise OSError('libfoo.so is missing')", "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("chips", None)
    importlib.invalidate_caches()


@pytest.fixture
def install(tmp_path: Path) -> Install:
    """install("dist", "name = module:Class", ...): a distribution that declares these backends."""

    def write(distribution: str, *points: str) -> Path:
        folder = tmp_path / f"{distribution}-1.0.dist-info"
        folder.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n"
        (folder / "METADATA").write_text(metadata, "utf-8")
        lines = "\n".join(["[moge_hal.backends]", *points, ""])
        (folder / "entry_points.txt").write_text(lines, "utf-8")
        importlib.invalidate_caches()
        return folder

    return write


def refusal(name: str | None) -> str:
    with pytest.raises(BackendError) as error:
        get_backend(name)
    return str(error.value)


def probed() -> dict[str, registry.BackendInfo]:
    return {row.name: row for row in backends()}


def test_the_backends_that_come_with_the_package() -> None:
    rows = probed()
    assert {"ascend", "cpu", "cuda", "null", "onnx"} <= rows.keys()
    assert list(rows) == sorted(rows)
    assert rows["cpu"].probe.ok
    assert rows["cpu"].source == "moge-hal"
    assert moge_hal.backends() == backends()


def first_automatic() -> str:
    rows = probed()
    return next(name for name in ("ascend", "cuda", "cpu") if rows[name].probe.ok)


@pytest.mark.parametrize("value", [None, "", "auto"])
def test_auto_is_the_first_that_can_run(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is not None:
        monkeypatch.setenv("MOGE_HAL_BACKEND", value)
    assert get_backend().name == first_automatic()
    assert get_backend("auto").name == first_automatic()


def test_the_environment_chooses_and_an_argument_goes_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MOGE_HAL_BACKEND", "null")
    assert get_backend().name == "null"
    assert get_backend("cpu").name == "cpu"


def test_an_installed_package_is_found_and_chosen(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("some-chips", "good = chips:Good", "absent = chips:Absent")
    monkeypatch.setenv("MOGE_HAL_BACKEND", "good:0")
    backend = get_backend()
    assert (type(backend).__module__, backend.name, backend.index) == ("chips", "good", 0)
    assert probed()["good"].source == "some-chips"
    assert "good     ok   good:0" in table()
    assert "absent   no   its chip is not here. Fix: plug it in." in table()


def test_in_a_fresh_process_too(install: Install, tmp_path: Path) -> None:
    install("some-chips", "good = chips:Good", "odd = raises_at_import:Odd")
    code = "import moge_hal; print(type(moge_hal.get_backend()).__name__, len(moge_hal.backends()))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MOGE_HAL_BACKEND": "good", "PYTHONPATH": str(tmp_path)},
        cwd=Path(moge_hal.__path__[0]).parent,
        capture_output=True,
        text=True,
    )
    assert run.stdout.split() == ["Good", str(len(backends()))], run.stderr


def test_an_index_is_that_device_or_an_error(install: Install) -> None:
    install("some-chips", "good = chips:Good")
    message = refusal("good:1")
    assert "backend 'good:1' cannot run: there is no good:1. Fix: name good:0." in message
    cuda = probed()["cuda"].probe
    if not cuda.ok:
        assert f"backend 'cuda:1' cannot run: {cuda.reason} Fix: {cuda.fix}" in refusal("cuda:1")


@pytest.mark.parametrize("name", ["good:-1", "good:x", "good:²", "good:"])
def test_an_index_is_a_number(name: str, install: Install) -> None:
    install("some-chips", "good = chips:Good")
    assert f"{name!r}" in refusal(name)


def test_a_list_is_ordered_and_has_no_hidden_cpu_at_its_end(install: Install) -> None:
    install("some-chips", "good = chips:Good", "absent = chips:Absent", "broken = chips:Gone")
    assert get_backend("cpu,good").name == "cpu"
    assert get_backend("good,cpu").name == "good"
    assert get_backend("absent, good ,cpu").name == "good"
    assert get_backend("broken,good").name == "good"
    message = refusal("absent,chips:Absent")
    assert message.count("cannot run: its chip is not here. Fix: plug it in.") == 2
    rows = probed()
    if not (rows["ascend"].probe.ok or rows["cuda"].probe.ok):
        message = refusal("ascend,cuda")
        for name in ("ascend", "cuda"):
            assert f"backend {name!r} cannot run: {rows[name].probe.reason}" in message


def test_a_refusal_shows_reason_and_fix_of_every_backend(install: Install) -> None:
    install("some-chips", "absent = chips:Absent", "broken = raises_at_import:Odd")
    for name in ("absent", "broken", "cpuu", ",", "absent,broken"):
        message = refusal(name)
        for row in backends():
            assert row.name in message
            if not row.probe.ok:
                assert row.probe.reason in message
                assert row.probe.fix in message


@pytest.mark.parametrize("name", ["cpuu", "cpuu:1", "absent,cpuu"])
def test_a_misspelt_name_gets_close_matches(name: str, install: Install) -> None:
    install("some-chips", "absent = chips:Absent")
    assert "no backend 'cpuu" in refusal(name)
    assert "Did you mean 'cpu'" in refusal(name)


def test_a_class_can_be_named_by_its_path() -> None:
    assert get_backend("chips:Good").name == "good"
    assert type(get_backend("chips:Outer.Inner")).__qualname__ == "Outer.Inner"
    assert get_backend("chips:Absent,chips:Good").name == "good"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("no_such_module.at_all:Good", "cannot be imported (ModuleNotFoundError: No module named"),
        ("chips:Goood", "cannot be imported (AttributeError: "),
        ("raises_at_import:Good", "cannot be imported (OSError: libfoo.so is missing)"),
        ("chips:NoBackend", "is not a subclass of moge_hal.Backend"),
        ("chips:MODULE", "cannot be imported"),
        ("os:path", "is not a subclass of moge_hal.Backend"),
        ("chips:CannotBeMade", "cannot be created (OSError: libchip.so is missing)"),
        ("chips:TakesNoIndex", "cannot be created (TypeError: "),
        ("chips:ProbeRaises", "its probe raised RuntimeError: the driver is too old"),
        ("chips:ProbeIsNone", "its probe returned None"),
    ],
)
def test_a_faulty_class_is_refused_in_a_sentence(path: str, words: str, install: Install) -> None:
    message = refusal(path)
    assert path in message
    assert words in message
    # Installed, it is a line of the table, and the others still run.
    install("faulty-chips", f"faulty = {path}")
    assert words in probed()["faulty"].probe.reason
    assert not probed()["faulty"].probe.ok
    assert get_backend("cpu").name == "cpu"


def test_an_entry_point_may_name_extras_and_nested_classes(install: Install) -> None:
    install("some-chips", "good = chips:Good [fast]", "inner = chips:Outer.Inner")
    assert get_backend("good").name == "good"
    assert type(get_backend("inner")).__qualname__ == "Outer.Inner"


def test_two_distributions_that_claim_a_name_are_both_named(install: Install) -> None:
    install("first-chips", "chip = chips:Good")
    install("second-chips", "chip = chips:Absent", "good = chips:Good")
    message = refusal("chip")
    assert "first-chips and second-chips both claim the backend name 'chip'" in message
    assert "uninstall one of them" in message
    row = probed()["chip"]
    assert not row.probe.ok
    assert row.source == "first-chips, second-chips"
    assert get_backend("good").name == "good"
    assert get_backend("cpu").name == "cpu"


def test_auto_goes_on_after_a_backend_that_is_broken(install: Install) -> None:
    """A plug-in that claims `ascend` and cannot be imported must not stop who asked for nothing."""
    install("other-npu", "ascend = raises_at_import:Npu")
    assert not probed()["ascend"].probe.ok
    assert get_backend("auto").name == first_automatic()


def test_settings_are_read_in_one_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert settings() == registry.Settings("auto", {}, False, tmp_path / "moge_hal")
    monkeypatch.setenv("MOGE_HAL_BACKEND", "null")
    monkeypatch.setenv("MOGE_HAL_OPS", " experts=default, linear=default,")
    monkeypatch.setenv("MOGE_HAL_STRICT", "1")
    monkeypatch.setenv("MOGE_HAL_CACHE", str(tmp_path / "c"))
    overrides = {"experts": "default", "linear": "default"}
    assert settings() == registry.Settings("null", overrides, True, tmp_path / "c")


@pytest.mark.parametrize(("value", "strict"), [("", False), ("0", False), ("1", True)])
def test_strict_is_0_or_1(value: str, strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOGE_HAL_STRICT", value)
    assert settings().strict is strict
    monkeypatch.setenv("MOGE_HAL_STRICT", "yes")
    with pytest.raises(UserError, match=r"MOGE_HAL_STRICT = 'yes' must be 0 or 1"):
        settings()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("expert=default", r"MOGE_HAL_OPS: no operation 'expert'; there are embed, .*'experts'"),
        ("experts", r"MOGE_HAL_OPS: 'experts' must read experts=default"),
        ("experts=cuda", r"MOGE_HAL_OPS: 'experts=cuda' must read experts=default"),
        ("linear=default,=default", r"MOGE_HAL_OPS: no operation ''"),
    ],
)
def test_overrides_that_mean_nothing_are_refused(
    text: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=words):
        parse_overrides(text)
    monkeypatch.setenv("MOGE_HAL_OPS", text)
    with pytest.raises(UserError, match=words):
        get_backend()


def test_an_instance_is_new_every_time() -> None:
    first, second = get_backend("cpu"), get_backend("cpu")
    assert first is not second
    assert isinstance(first, Backend)


def test_a_slip_of_the_pen_is_told_from_a_backend_that_cannot_run(install: Install) -> None:
    """Where several backends are judged, the one ends the run and the other is a line of it."""
    install("some-chips", "good = chips:Good", "absent = chips:Absent", "broken = chips:Gone")
    slips = [
        "goood",
        "good:x",
        "cpu,goood",
        ",",
        "auto,cpu",
        "no_such.module:X",
        "chips:Gone",
        "x:y z",
    ]
    for name in slips:
        for chosen in (get_backend, find):
            with pytest.raises(UnknownBackendError):
                chosen(name)
    for name in ("absent", "good:1", "broken", "chips:CannotBeMade", "raises_at_import:X"):
        with pytest.raises(BackendError) as error:
            get_backend(name)
        assert type(error.value) is BackendError


def test_a_backend_is_found_without_being_asked_whether_it_can_run(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("some-chips", "absent = chips:Absent", "faulty = chips:ProbeRaises")
    assert find("absent").name == "absent"
    assert find("cuda:7").index == 7
    assert find("faulty").name == "faulty"
    assert find("chips:Absent").name == "absent"
    monkeypatch.setenv("MOGE_HAL_BACKEND", "absent")
    assert find().name == "absent"
    for several in ("auto", "absent,cpu"):
        with pytest.raises(UnknownBackendError, match="name one backend: which of a"):
            find(several)


def test_where_a_backend_comes_from(install: Install) -> None:
    install("some-chips", "good = chips:Good")
    assert source_of(find("good")).startswith("some-chips ")
    assert source_of(find("cpu")) == f"moge-hal {version('moge-hal')}"
    assert source_of(find("chips:Good")) == "some-chips 1.0"  # the same class
    assert source_of(find("chips:Absent")) == "chips:Absent"


@pytest.mark.parametrize("name", [":X", "chips:Good:1", "chips:", "no such:Good"])
def test_what_names_no_class_gets_a_sentence(name: str) -> None:
    text = refusal(name)
    assert text.startswith((f"backend {name!r}: a class is named as", f"no backend {name!r}."))
    assert "NoneType" not in text


@pytest.mark.parametrize("name", ["auto,cpu", "cpu, auto"])
def test_auto_stands_alone(name: str) -> None:
    assert refusal(name) == f"backend {name!r}: auto stands alone, other names may be listed"


@pytest.mark.parametrize("name", ["SaysMuch", "RaisesMuch"])
def test_what_a_driver_says_becomes_one_line(name: str, install: Install) -> None:
    install("talkers", f"talker = chips:{name}")
    assert "the driver says: too old. Fix: " in refusal("talker").splitlines()[0]
    (row,) = (line for line in table().splitlines() if line.startswith("  talker"))
    assert "the driver says: too old. Fix: " in row
