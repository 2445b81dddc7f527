"""Run-time replacements that a run of ProRes needs, where Megatron offers no seam.

Written against megatron-core 0.19.2: its training loop calls nothing of the user's between "the
iteration is known" and "the forward pass of the step starts" that would also run when a captured
CUDA graph is replayed.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch

from megatron_prores.upstream.registry import wrap

StepHook = Callable[[int], None]


def call_around_steps(before_forward: StepHook, after_logging: StepHook) -> None:
    """Call the hooks from Megatron's training loop.

    Both get the number of completed iterations, from the counter that a checkpoint restores. (The
    global ``args.curr_iteration`` would not do: it is one behind in the evaluation after a step.)

    Several may ask; one that asks again, with the same function of another object, is called once.

    Args:
        before_forward: Called on every rank before the forward passes of each training step and of
            each evaluation, outside anything that is captured, replayed or recomputed.
        after_logging: Called on every rank after Megatron has logged a training step.

    Raises:
        RuntimeError: The installed Megatron has other signatures than those relied on.
    """
    from megatron.training import training

    def train_step(stock: Callable[[], Any], named: dict[str, Any]) -> Any:
        before_forward(named["iteration"])
        return stock()

    def evaluate(stock: Callable[[], Any], named: dict[str, Any]) -> Any:
        before_forward(named["iteration"])
        return stock()

    def training_log(stock: Callable[[], Any], named: dict[str, Any]) -> Any:
        result = stock()
        after_logging(named["iteration"])
        return result

    for name, wrapper in (
        ("train_step", train_step),
        ("evaluate_and_print_results", evaluate),
        ("training_log", training_log),
    ):
        wrap(training, name, ("iteration",), wrapper, purpose=before_forward)


def exclude_embedding_from_weight_decay() -> None:
    """Leave the embedding out of weight decay, as upstream does norms and biases.

    Upstream has a table of overrides for parameter groups, but builds it where no user can reach.
    """
    from megatron.core.optimizer.optimizer_config import ParamKey
    from megatron.training import training

    def optimizer_config(stock: Callable[[], Any], named: dict[str, Any]) -> Any:
        config, overrides = stock()
        return config, {**overrides, ParamKey(name="*word_embeddings.weight"): {"wd_mult": 0.0}}

    wrap(training, "get_megatron_optimizer_config", (), optimizer_config)


def use_prebuilt_dataset_helpers() -> None:
    """Keep Megatron from compiling its dataset helper where the wheel has brought it compiled.

    The wheel has the compiled module but no Makefile, so that the compilation at start-up fails
    although nothing needs compiling.
    """
    from megatron.core.datasets import utils

    try:
        import megatron.core.datasets.helpers_cpp  # noqa: F401
    except ImportError:
        return
    wrap(utils, "compile_helpers", (), lambda stock, named: None)


def let_torch_adam_resume() -> None:
    """Let the distributed optimizer load a checkpoint when it drives torch's own Adam.

    That is so wherever neither Apex nor Transformer Engine is installed. Unlike theirs, torch's
    Adam keeps its step count beside the moments of each parameter, and upstream's loading trips
    over it four times: it asks an optimizer that has not stepped yet for its count; it looks for
    the count among the tensors of the checkpoint, where it is not; it hands one and the same count
    to all parameters, whose every step would then add their number to it; and in the format that
    cannot be loaded by other layouts (the default) it overwrites the count with that of the
    optimizer that has not stepped, so that the next updates are far too large.
    """
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    owner = distrib_optimizer.DistributedOptimizer

    def sharded_state_dict(stock: Callable[[], Any], named: dict[str, Any]) -> Any:
        adam = named["self"].optimizer
        if named.get("is_loading") and not adam.state:
            # As the first step would lay it out; the checkpoint overwrites it.
            for parameter in (p for group in adam.param_groups for p in group["params"]):
                adam.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        return stock()

    def set_states(stock: Callable[[], Any], named: dict[str, Any]) -> Any:
        # Not a tensor: upstream passes over it, and the count of the parameter groups stays.
        named["tensors"].setdefault("step", None)
        # In fp32 the model's own parameters are copied into; only one of upstream's formats minds.
        with torch.no_grad():
            return stock()

    def load_state_dict(stock: Callable[[], Any], named: dict[str, Any]) -> Any:
        result = stock()
        adam = named["self"].optimizer
        # The checkpoint's count is that of the parameter groups.
        counts = {group["step"] for group in adam.param_groups if group.get("step") is not None}
        for state in adam.state.values():
            state["step"] = torch.tensor(float(max(counts))) if counts else state["step"].clone()
        return result

    wrap(owner, "sharded_state_dict", ("self", "is_loading"), sharded_state_dict)
    wrap(owner, "_set_main_param_and_optimizer_states", ("self", "tensors"), set_states)
    wrap(owner, "load_state_dict", ("self",), load_state_dict)


def align_saved_optimizer_state() -> None:
    """Let ``--dist-ckpt-optim-fully-reshardable`` save each parameter's own optimizer state.

    The distributed optimizer pads each bucket of its buffer. Before it saves, upstream leaves that
    padding out, but still cuts the parameters from where they were with it: those behind the first
    bucket are saved with their neighbours' state, and loading overwrites the weights with it too.
    There are several buckets where an embedding is tied across pipeline stages, and with
    ``--overlap-grad-reduce``.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    def sharded_state(stock: Callable[[], Any], named: dict[str, Any]) -> Any:
        buffers = named["self"].buffers
        padded = [buffer.param_index_map for buffer in buffers]
        for buffer in buffers:
            before, shifts = 0, {}
            for bucket in buffer.buckets:
                shifts[bucket.bucket_id] = before
                before += bucket.grad_data.numel() - bucket.numel_unpadded
            buffer.param_index_map = {
                parameter: (start - shifts[bucket], end - shifts[bucket], bucket)
                for parameter, (start, end, bucket) in buffer.param_index_map.items()
            }
        try:
            return stock()
        finally:
            for buffer, index_map in zip(buffers, padded, strict=True):
                buffer.param_index_map = index_map

    wrap(DistributedOptimizer, "sharded_param_state_fully_reshardable", ("self",), sharded_state)


def fork_data_workers() -> None:
    """Start processes by fork, as Megatron's data loaders and checkpoint writers take for granted.

    Their functions are local ones that cannot be pickled; Python 3.14 starts processes otherwise.
    """
    multiprocessing.set_start_method("fork", force=True)
