"""The registry of replacements after a start of the main program: nothing is replaced past it."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import megatron_prores
from megatron_prores.upstream.registry import listed
from tests.distributed.launch import MAIN_PROGRAM, run_ranks
from tests.distributed.test_checkpoint_faults import flags

PACKAGE = str(Path(megatron_prores.__file__).parent)

VERSIONS = {"megatron": "megatron-core 0.19.2", "torch": "torch 2.15 and 2.11"}

# One of each room that replaces something.
SOME = {
    "torch.cuda.is_available": "cpu.torch_device.install",
    "megatron.core.tensor_parallel.random._get_cuda_rng_state": "cpu.megatron_device.install",
    "torch.distributed.checkpoint.filesystem.pickle": "checkpoint.safe_load.install",
    "megatron.core.dist_checkpointing.save": "checkpoint.saving.save",
    "megatron.training.checkpointing._load_base_checkpoint": "checkpoint.guard._load",
    "megatron.training.checkpointing.maybe_msc": "upstream.tracker_file.write_tracker_atomically",
    "megatron.training.datasets.data_samplers.DistributedSignalHandler": (
        "upstream.training_loop.ask_for_signals"
    ),
    "megatron.training.training.load_checkpoint": "training.lifecycle.Lifecycle._load",
}


# A third of a start on the CPU device, and something like a tenth.
NOT_NEEDED = ("torch._dynamo", "wandb.sdk")


def is_ours(value: Any) -> bool:
    """Whether a function, a class or an object is of our package."""
    if isinstance(value, staticmethod):
        value = value.__func__
    if inspect.isfunction(value):
        return value.__code__.co_filename.startswith(PACKAGE)
    kind = value if inspect.isclass(value) else type(value)
    return str(kind.__module__).startswith("megatron_prores")


def attributes(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """List what a module holds, and what the classes hold that it defines."""
    for name, value in [*vars(module).items()]:
        yield f"{module.__name__}.{name}", value
        if inspect.isclass(value) and value.__module__ == module.__name__:
            for inner, held in [*vars(value).items()]:
                yield f"{value.__module__}.{value.__qualname__}.{inner}", held


def start_and_list(argv: list[str], output: str) -> None:
    """Run the main program; write down what is listed, and what of ours is in place and is not."""
    sys.argv = [str(MAIN_PROGRAM), *argv]
    gc.unfreeze()  # what the fork server froze
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(sys.argv[0], run_name="__main__")
    entries = listed()
    modules = [m for name, m in [*sys.modules.items()] if name.partition(".")[0] in VERSIONS]
    held = [each for module in modules if module for each in attributes(module)]
    # A module that was imported later has names for the same objects.
    known = {id(value) for name, value in held if name in entries}
    result = {
        "listed": {name: list(map(dataclasses.asdict, why)) for name, why in entries.items()},
        "unlisted": [name for name, value in held if is_ours(value) and id(value) not in known],
        "ours": [name for name, value in held if is_ours(value) and name in entries],
        "frozen": gc.get_freeze_count(),
        "imported": [name for name in NOT_NEEDED if name in sys.modules],
    }
    Path(output).write_text(json.dumps(result))


def test_the_registry_lists_every_replacement_of_a_run(tmp_path: Path) -> None:
    argv = flags("--save", tmp_path / "saved", "--save-interval", 4)
    output = tmp_path / "listed"
    job = run_ranks(tmp_path / "job", start_and_list, (argv, str(output)))
    assert job.succeeded, job.output[-3000:]
    result = json.loads(output.read_text())
    assert not result["unlisted"]
    assert len(result["ours"]) > 70  # so they are seen
    assert not result["imported"]
    assert result["frozen"] > 100_000  # Megatron and torch, which a collection passes over
    entries = result["listed"]
    for name, function in SOME.items():
        assert f"megatron_prores.{function}" in [why["function"] for why in entries[name]]
    for name, reasons in entries.items():
        for why in reasons:
            assert why["written_against"] == VERSIONS[name.partition(".")[0]], name
            # These tests note the alphas of each step themselves.
            assert why["purpose"] or why["function"].startswith("tests."), name
