"""nvidia-resiliency-ext: missing or too old, it is named, with the version that is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_prores.command_line.resiliency import LEAST, check_resiliency, check_start
from megatron_prores.errors import UserError
from megatron_prores.plan.target import PlannedMachine
from megatron_prores.system.environment import THIS_MACHINE, TargetEnvironment
from tests.distributed.launch import REPOSITORY

GIVEN = {
    "--async-strategy nvrx": {"async_save": True, "async_strategy": "nvrx"},
    "--enable-ft-package": {"enable_ft_package": True},
    "--fault-injector-ranks": {"fault_injector_ranks": "0"},
    "--fault-injector-num-ranks": {"fault_injector_num_ranks": 1},
}


def flags(**given: Any) -> SimpleNamespace:
    values: dict[str, Any] = {
        "async_save": False,
        "async_strategy": "nvrx",
        "enable_ft_package": False,
        "fault_injector_ranks": None,
        "fault_injector_num_ranks": None,
    }
    return SimpleNamespace(**values | given)


def install(directory: Path, version: str, *, has_async: bool = True) -> None:
    """Writes a package of that version, empty but for the modules that are looked for."""
    module = directory / "nvidia_resiliency_ext"
    for place in (module, module / "checkpointing", module / "checkpointing" / "async_ckpt"):
        place.mkdir()
        (place / "__init__.py").touch()
    (module / "__init__.py").write_text(f"__version__ = {version!r}\n")
    names = ("core", "cached_metadata_filesystem_reader", "filesystem_async", "state_dict_saver")
    for name in names if has_async else names[:1]:
        (module / "checkpointing" / "async_ckpt" / f"{name}.py").touch()
    metadata = directory / f"nvidia_resiliency_ext-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: nvidia-resiliency-ext\nVersion: {version}\n"
    )


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.startswith("nvidia_resiliency_ext")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


class EmptyMachine(TargetEnvironment):
    """A machine without packages."""

    def is_installed(self, module: str) -> bool:
        return False


@pytest.mark.parametrize("flag", GIVEN)
def test_it_is_missing(flag: str) -> None:
    check_resiliency(flags(), EmptyMachine())
    with pytest.raises(UserError, match=f"^{flag}.* needs .* {LEAST} or newer, which is not"):
        check_resiliency(flags(**GIVEN[flag]), EmptyMachine())


@pytest.mark.parametrize("flag", GIVEN)
def test_it_is_too_old(flag: str, path: Path) -> None:
    install(path, "0.5.1")
    with pytest.raises(UserError, match=f"^{flag}.* needs .* {LEAST} or newer, and 0.5.1 is"):
        check_resiliency(flags(**GIVEN[flag]))


@pytest.mark.parametrize("version", ["0.6.0", "0.6.1rc1", "1.0"])
def test_it_is_new_enough(version: str, path: Path) -> None:
    install(path, version)
    check_start()
    for given in GIVEN.values():
        check_resiliency(flags(**given))


def test_a_plan_takes_it_as_installed_and_notes_the_version(path: Path) -> None:
    install(path, "0.5.1")
    machine = PlannedMachine()
    check_resiliency(flags(**GIVEN["--enable-ft-package"]), machine)
    machine.note_assumptions(SimpleNamespace(device="cpu"))
    assert [note.rpartition(": ")[2] for note in machine.notes] == ["nvidia-resiliency-ext>=0.6.0"]
    assert THIS_MACHINE.version_below("nvidia-resiliency-ext", "0.6.0") == "0.5.1"


def test_an_old_version_that_megatron_takes_for_none_is_no_obstacle(path: Path) -> None:
    install(path, "0.3.0", has_async=False)
    check_start()


def test_an_old_version_that_ends_megatrons_import_is_named_before_it(path: Path) -> None:
    install(path, "0.5.1")
    with pytest.raises(UserError, match=r"nvidia-resiliency-ext 0\.5\.1 is installed.*0\.6\.0"):
        check_start()
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "pretrain_gpt_prores.py", "--device", "cpu"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": f"{path}:{REPOSITORY}"},
        timeout=120,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: nvidia-resiliency-ext 0.5.1 is installed"), result


def test_megatron_still_asks_for_that_version() -> None:
    from megatron.core.dist_checkpointing.strategies import nvrx

    assert nvrx.NVRX_MIN_VERSION == LEAST
