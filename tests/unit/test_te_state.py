"""Transformer Engine's state in a checkpoint: what is dropped, and what is never executed."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_prores.checkpoint import te_state
from megatron_prores.checkpoint.te_state import drop_absent_states, load_state
from megatron_prores.upstream.registry import listed, undone_afterwards


def an_object(key: str) -> ShardedObject:
    return ShardedObject(key, torch.empty(0), (1,), (0,))


def test_only_states_that_are_not_there_are_dropped() -> None:
    there, absent = an_object("a.linear._extra_state"), an_object("a.norm._extra_state")
    other = an_object("rng_state")
    requested: dict[str, Any] = {
        "model": {"linear": there, "norm": absent},
        "chunks": [{"norm": an_object("b.norm._extra_state")}],
        "rng_state": other,
    }
    assert drop_absent_states(requested, {there.unique_key: None}) == ["a.norm", "b.norm"]
    # What is missing and is no such state stays requested: loading it fails, as it must.
    assert requested == {"model": {"linear": there}, "chunks": [{}], "rng_state": other}


def test_state_of_scales_is_read() -> None:
    state = {"scale_fwd": torch.tensor([1.0, 448.0]), "extra_fp8_variables": {"num_gemms": 1}}
    loaded = load_state(pickle.dumps(state))
    assert torch.equal(loaded["scale_fwd"], state["scale_fwd"])  # type: ignore[arg-type]
    assert loaded["extra_fp8_variables"] == {"num_gemms": 1}


class Malicious:
    """A pickle of it calls a function when it is read."""

    def __init__(self, call: Any, *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call, self.args


def test_function_is_not_called(tmp_path: Path) -> None:
    made = tmp_path / "made"
    with pytest.raises(pickle.UnpicklingError, match=r"posix\.mkdir"):
        load_state(pickle.dumps({"recipe": Malicious(os.mkdir, str(made))}))
    assert not made.exists()


def test_recipe_is_read() -> None:
    recipes = pytest.importorskip("transformer_engine.common.recipe")
    loaded = load_state(pickle.dumps({"recipe": recipes.DelayedScaling(margin=1)}))
    assert loaded["recipe"] == recipes.DelayedScaling(margin=1)


def test_transformer_engine_reads_its_states_by_the_safe_unpickler() -> None:
    base = pytest.importorskip("transformer_engine.pytorch.module.base")
    op = pytest.importorskip("transformer_engine.pytorch.ops.op")
    with undone_afterwards():
        te_state.install()
        te_state.install()
        for module in (base, op):
            assert module.pickle.loads is load_state
            assert module.pickle.dumps is pickle.dumps
            (entry,) = listed()[f"{module.__name__}.pickle"]
            assert entry.written_against == "transformer_engine 2.20"
    assert base.pickle is op.pickle is pickle


def test_cpu_device_hides_what_needs_a_gpu(tmp_path: Path) -> None:
    import subprocess
    import sys

    for name in ("transformer_engine", "apex"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('imported')")
    code = """
from megatron_prores.command_line import device
device.prepare("cpu")
import megatron.core.optimizer
from megatron.core.extensions import transformer_engine as extension
from megatron_prores.system.environment import is_installed
assert not extension.HAVE_TE
assert not is_installed("transformer_engine") and not is_installed("apex")
"""
    paths = [str(tmp_path), *filter(None, os.environ.get("PYTHONPATH", "").split(":")), os.getcwd()]
    environment = os.environ | {"PYTHONPATH": ":".join(paths)}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
