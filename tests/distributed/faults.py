"""Faults to plant in a job: each is called in every rank before the main program."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def number_layers_by_stage() -> None:
    """Each pipeline stage counts its layers from 1."""
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    from megatron_prores.model.layer import ProResLayerMixin

    def local_number(layer: ProResLayerMixin) -> int:
        return layer.layer_number - get_transformer_layer_offset(layer.config)

    ProResLayerMixin.prores_layer = property(local_number)


def number_layers_by_stage_unaudited() -> None:
    """The same, with nobody looking."""
    from megatron_prores.training import prores_run as training

    number_layers_by_stage()
    training.audit = lambda warmup, step: ""


def count_every_layer_of_the_pattern() -> None:
    """A hybrid model's layers are taken for the L, as their numbers suggest."""
    from megatron_prores.model.layer import ProResLayerMixin

    ProResLayerMixin.prores_layer = property(lambda layer: layer.layer_number)


def start_rank_1_with_another_schedule() -> None:
    """One rank was started with other flags than the rest."""
    if os.environ["RANK"] == "1":
        sys.argv += ["--prores-schedule", "linear_square"]


def forget_alpha_in_deepest_layer() -> None:
    """The deepest layer trains without warmup, and no audit looks."""
    from megatron_prores.model.layer import ProResLayerMixin
    from megatron_prores.training import prores_run as training

    stock = ProResLayerMixin.set_alpha

    def set_alpha(layer: ProResLayerMixin, value: float) -> None:
        stock(layer, 1.0 if layer.layer_number == 4 else value)

    ProResLayerMixin.set_alpha = set_alpha
    training.audit = lambda warmup, step: ""


def break_fused_attention() -> None:
    from megatron_prores.model.attention import FusedDotProductAttention

    def forward(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no fused attention")

    FusedDotProductAttention.forward = forward


def nan_in_iteration_5() -> None:
    """The loss is NaN in the fifth iteration, on the rank that computes it."""
    import torch

    from megatron_prores.training import gpt
    from megatron_prores.training.prores_run import ProResRun

    iteration = 0
    loss_func, before_forward = gpt.loss_func, ProResRun.before_forward

    def note(run: ProResRun, completed: int) -> None:
        nonlocal iteration
        iteration = completed + 1
        before_forward(run, completed)

    def bad(loss_mask: torch.Tensor, output: torch.Tensor) -> object:
        return loss_func(loss_mask, output * float("nan") if iteration == 5 else output)

    ProResRun.before_forward = note
    gpt.loss_func = bad


@dataclass(frozen=True)
class NanInGradient:
    """Plants a NaN into a gradient of rank 1, before ranks add theirs up."""

    iteration: int
    times: int

    def __call__(self) -> None:
        from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

        from megatron_prores.training.prores_run import ProResRun

        state = {"iteration": 0, "planted": 0}
        before_forward = ProResRun.before_forward
        start_grad_sync = _ParamAndGradBucketGroup.start_grad_sync

        def note(run: ProResRun, completed: int) -> None:
            state["iteration"] = completed + 1
            before_forward(run, completed)

        def plant(group: Any, *args: Any, **kwargs: Any) -> None:
            due = os.environ["RANK"] == "1" and state["iteration"] == self.iteration
            if due and state["planted"] < self.times:
                state["planted"] += 1
                group.buckets[0].grad_data[0] = float("nan")
            start_grad_sync(group, *args, **kwargs)

        ProResRun.before_forward = note  # type: ignore[method-assign]
        _ParamAndGradBucketGroup.start_grad_sync = plant


def flip_a_bit_of_a_weight() -> None:
    """One bit of one weight of rank 1 is another one from the third iteration on."""
    import torch

    from megatron_prores.training.prores_run import ProResRun

    before_forward = ProResRun.before_forward

    def flip(run: ProResRun, completed: int) -> None:
        before_forward(run, completed)
        if completed == 2 and os.environ["RANK"] == "1":
            assert run.warmup is not None
            weight = run.warmup.chunks[0][0].mlp.linear_fc1.weight.data
            weight.view(torch.int32)[0, 0] ^= 1 << 12

    ProResRun.before_forward = flip  # type: ignore[method-assign]


def stop_rank_1_in_every_step() -> None:
    """Rank 1 is stopped for a moment in each of its forward passes, by SIGSTOP, as from outside."""
    from megatron.core.models.gpt import GPTModel

    forward = GPTModel.forward

    def stopped(*args: Any, **kwargs: Any) -> Any:
        if os.environ["RANK"] == "1":
            command = ["sh", "-c", f"sleep 0.3; kill -CONT {os.getpid()}"]
            with subprocess.Popen(command):
                os.kill(os.getpid(), signal.SIGSTOP)
        return forward(*args, **kwargs)

    GPTModel.forward = stopped


@dataclass(frozen=True)
class KillBeforeTheTrackerFile:
    """SIGKILL comes when a checkpoint is complete, its manifest written, the tracker file not."""

    save: int
    """Which of the saves of this start, from 1."""

    def __call__(self) -> None:
        from megatron_prores.upstream import tracker_file

        stock, saves = tracker_file.atomic_write, 0

        def atomic_write(path: Path) -> object:
            nonlocal saves
            saves += 1
            if saves == self.save:
                os.kill(os.getpid(), signal.SIGKILL)
            return stock(path)

        tracker_file.atomic_write = atomic_write  # type: ignore[assignment]


def kill_writers() -> None:
    """On rank 1 SIGKILL takes the writer between two saves, and the next one in its second."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
    from megatron.training import async_utils, training

    if os.environ["RANK"] != "1":
        return
    finalize = training.maybe_finalize_async_save

    @functools.wraps(finalize)
    def maybe_finalize_async_save(*args: Any, **kwargs: Any) -> None:
        finalize(*args, **kwargs)
        left = async_utils._async_calls_queue.get_num_unfinalized_calls()
        if _saves and not left and not _killed:
            _killed.append(True)
            PersistentAsyncCaller._persistent_process.kill()
            PersistentAsyncCaller._persistent_process.join()

    training.maybe_finalize_async_save = maybe_finalize_async_save
    schedule = PersistentAsyncCaller.schedule_async_call

    @functools.wraps(schedule)
    def schedule_async_call(self: Any, async_req: Any) -> None:
        _saves.append(async_req.call_idx)
        schedule(self, async_req)

    PersistentAsyncCaller.schedule_async_call = schedule_async_call
    writer = filesystem_async.FileSystemWriterAsync
    _write.append(writer.write_preloaded_data_multithread)
    writer.write_preloaded_data_multithread = staticmethod(write_once)


_saves: list[int] = []
_killed: list[bool] = []
_write: list[Callable[..., None]] = []
_written: list[tuple[object, ...]] = []


def write_once(*args: object) -> None:
    """As Megatron's; in the writer that came after a kill, which dies in its second call."""
    if _killed and _written:
        os.kill(os.getpid(), signal.SIGKILL)
    _written.append(args)
    _write[0](*args)


def configure_twice() -> None:
    """Calls ``model_config`` two times, as a program does that asks before it runs."""
    from megatron_prores.training import prores_run as training

    stock = training.model_config

    def model_config(args: object, prores: object) -> object:
        stock(args, prores)  # type: ignore[arg-type]
        return stock(args, prores)  # type: ignore[arg-type]

    training.model_config = model_config  # type: ignore[assignment]
