"""What the optimizer of a run of ProRes needs, where Megatron offers no seam."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_prores.upstream.registry import wrap


def exclude_embedding_from_weight_decay() -> None:
    """Leave the embedding out of weight decay, as upstream does norms and biases.

    Upstream has a table of overrides for parameter groups, but builds it where no user can reach.
    """
    from megatron.core.optimizer.optimizer_config import ParamKey
    from megatron.training import training

    def optimizer_config(stock: Callable[[], Any], named: dict[str, Any]) -> Any:
        config, overrides = stock()
        return config, {**overrides, ParamKey(name="*word_embeddings.weight"): {"wd_mult": 0.0}}

    purpose = exclude_embedding_from_weight_decay
    wrap(training, "get_megatron_optimizer_config", (), optimizer_config, purpose)


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

    purpose = let_torch_adam_resume
    wrap(owner, "sharded_state_dict", ("self", "is_loading"), sharded_state_dict, purpose)
    wrap(owner, "_set_main_param_and_optimizer_states", ("self", "tensors"), set_states, purpose)
    wrap(owner, "load_state_dict", ("self",), load_state_dict, purpose)


def let_sgd_resume() -> None:
    """Let a checkpoint of ``--optimizer sgd`` be loaded: Megatron has no way to lay its state out.

    It lays out the state of an optimizer that has not stepped yet, for the checkpoint to overwrite,
    and calls for that what it leaves empty for SGD.
    """
    from megatron.core.optimizer import optimizer

    def init(stock: Callable[..., Any], named: dict[str, Any]) -> Any:
        if named["config"].optimizer == "sgd":
            return stock(init_state_fn=_lay_momentum_out)
        return stock()

    for kind in (optimizer.FP32Optimizer, optimizer.Float16OptimizerWithFloat16Params):
        wrap(kind, "__init__", ("config", "init_state_fn"), init, purpose=let_sgd_resume)


def _lay_momentum_out(sgd: torch.optim.Optimizer, config: Any = None) -> None:
    for group in sgd.param_groups:
        for parameter in group["params"] if group["momentum"] else []:
            sgd.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter.data))


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

    wrap(
        DistributedOptimizer,
        "sharded_param_state_fully_reshardable",
        ("self",),
        sharded_state,
        purpose=align_saved_optimizer_state,
    )


def call_before_clipping(optimizer: Any, hook: Callable[[], None]) -> None:
    """Call the hook when gradients are reduced, and neither clipped nor free of the loss scale.

    Args:
        optimizer: The one that is watched. Megatron nests optimizers.
        hook: Called on every rank in each of its steps.
    """
    from megatron.core.optimizer import ChainedOptimizer

    def prepare_grads(stock: Callable[[], Any], named: dict[str, Any]) -> Any:
        if named["self"] is optimizer:
            hook()
        return stock()

    purpose = call_before_clipping
    wrap(ChainedOptimizer, "prepare_grads", ("self",), prepare_grads, purpose)


def skip_updates(is_too_large: Callable[[float], bool]) -> None:
    """Leave an update out where the norm of the gradient is too large, on every rank.

    Upstream has a threshold for it, but a rank whose optimizer holds no parameters does not ask
    it: there it would wait for the weights of ranks that leave the update out.

    Args:
        is_too_large: Of the norm of the whole gradient, before clipping, which all ranks have.
    """
    from megatron.core.optimizer import ChainedOptimizer

    skips = False

    def get_grad_norm(stock: Callable[[], Any], named: dict[str, Any]) -> Any:
        nonlocal skips
        norm = stock()
        skips = is_too_large(norm)
        return norm

    def step_with_ready_grads(stock: Callable[[], Any], named: dict[str, Any]) -> Any:
        return False if skips else stock()

    wrap(ChainedOptimizer, "get_grad_norm", ("self",), get_grad_norm, is_too_large)
    wrap(ChainedOptimizer, "step_with_ready_grads", ("self",), step_with_ready_grads, is_too_large)
