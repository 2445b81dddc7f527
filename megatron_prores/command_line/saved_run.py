"""What a checkpoint remembers of ProRes, and the agreement of a run with the one that it loads.

Megatron keeps a run's arguments in its checkpoints, ours among them, and ``prores_settings`` beside
them (checkpoint/settings.py). A run that would go on with others is stopped before any work.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prores.checkpoint.manifest import DamagedError
from megatron_prores.checkpoint.newest import to_load
from megatron_prores.checkpoint.reader import FORMAT, StoredCheckpoint
from megatron_prores.checkpoint.saving import REMOTE
from megatron_prores.checkpoint.settings import differences
from megatron_prores.command_line.values import flag_of
from megatron_prores.config.flags import FLAGS
from megatron_prores.config.prores_config import OFF, ProResConfig
from megatron_prores.errors import UserError
from megatron_prores.schedule.custom import FILE, is_custom
from megatron_prores.schedule.depth import total_depth

_WARMUP_FLAGS = ("prores_warmup_iters", "prores_warmup_iters_per_layer", "prores_warmup_samples")

RESTORED_FLAGS = (
    "prores_schedule",
    *_WARMUP_FLAGS,
    "norm_placement",
    "branch_init",
    "embedding_weight_decay",
)
"""Destinations of the flags that ``--use-checkpoint-args`` restores."""

_ORDERING_FLAGS = ("transformer_impl",)
"""What decides in which order a model holds its parameters."""

_LAYOUT_FLAGS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "num_virtual_stages_per_pipeline_rank",
    "num_layers_per_virtual_pipeline_stage",
    "hybrid_layer_pattern",
)
"""What decides which of them a rank holds."""


@dataclass(frozen=True)
class SavedRun:
    """The run that a checkpoint comes from."""

    directory: str
    """The checkpoint of one iteration."""
    iteration: int
    """Iterations completed."""
    args: argparse.Namespace
    """Its arguments."""

    @property
    def settings(self) -> dict[str, str | int] | None:
        """Its ProRes settings; None where it has none."""
        return getattr(self.args, "prores_settings", None)


def find_saved_run(args: Any) -> SavedRun | None:
    """Read the arguments of the checkpoint that a run is going to load, and nothing else of it.

    Args:
        args: Parsed, not yet validated by Megatron.

    Returns:
        The saved run, or None where there is no checkpoint and training starts from the beginning.

    Raises:
        UserError: The checkpoint cannot be read.
    """
    for directory in (args.load, args.pretrained_checkpoint):
        if directory is not None and (saved := _read(directory, args.ckpt_step)) is not None:
            return saved
    return None


def _read(directory: str, step: int | None) -> SavedRun | None:
    if directory.startswith(REMOTE):
        return None
    name = directory
    try:
        choice = to_load(Path(directory), step)
        if choice is None or not choice.directory.is_dir():
            return None
        name = str(choice.directory)
        if not (choice.directory / FORMAT).is_file():
            raise UserError(
                f"--load {directory}: {name} is not in the format torch_dist: it could be neither "
                "verified nor compared. Megatron-LM's own program converts it, with "
                "--ckpt-convert-format torch_dist"
            )
        state = StoredCheckpoint(choice.directory).common
    except DamagedError as error:
        raise UserError(f"--load {directory}: {name} cannot be read: {error}") from error
    if "args" not in state:
        return None
    return SavedRun(name, state.get("iteration", 0), state["args"])


def restore_flags(args: Any, saved: SavedRun | None, explicit: set[str]) -> dict[str, Any]:
    """Take our flags from the checkpoint, as ``--use-checkpoint-args`` does Megatron's own.

    Args:
        args: Parsed; changed in place.
        saved: The checkpoint to load.
        explicit: Destinations of our flags that the command line has; these stay.

    Returns:
        Destination -> value of what was restored.

    Raises:
        UserError: The schedule in the checkpoint is a function of the user's own.
    """
    if not args.use_checkpoint_args or saved is None:
        return {}
    kept = set(explicit)
    # The three lengths exclude each other: one of the user's own stands for all of them, and so
    # does a schedule of the user's own.
    if kept & {"prores_schedule", *_WARMUP_FLAGS}:
        kept |= set(_WARMUP_FLAGS)
    plain = argparse.Namespace(prores_schedule=OFF, norm_placement="pre")
    source = saved.args if hasattr(saved.args, "prores_settings") else plain
    restored = {
        name: getattr(source, name)
        for name in RESTORED_FLAGS
        if name not in kept and hasattr(source, name)
    }
    schedule = str(restored.get("prores_schedule", OFF))
    if is_custom(schedule) and not schedule.startswith(FILE):
        raise UserError(
            f"--use-checkpoint-args: {saved.directory} was trained with --prores-schedule "
            f"{schedule}; give that flag: no code runs because a checkpoint names it"
        )
    vars(args).update(restored)
    if args.hybrid_layer_pattern is None:
        args.hybrid_layer_pattern = getattr(saved.args, "hybrid_layer_pattern", None)
    if args.num_layers is None and args.hybrid_layer_pattern is None:
        args.num_layers = getattr(saved.args, "num_layers", None)
    return restored


def check_agreement(args: Any, prores: ProResConfig, saved: SavedRun | None) -> None:
    """Refuse to load a checkpoint that this run's warmup does not continue.

    Args:
        args: Parsed, not yet validated by Megatron.
        prores: The ProRes configuration of this run.
        saved: The checkpoint to load, or None.

    Raises:
        UserError: Names every setting that differs, both values, and the flag that overrides.
    """
    # Without a checkpoint under --load, --pretrained-checkpoint is finetuned.
    starts_at_zero = args.finetune or (
        saved is not None and not (args.load and _is_under(saved.directory, args.load))
    )
    if starts_at_zero and prores.enabled and not args.prores_restart:
        flag = "--finetune" if args.finetune else "--pretrained-checkpoint"
        raise UserError(
            f"{flag} starts at iteration 0, where the warmup of --prores-schedule "
            f"{prores.schedule} switches the layers of the trained model off: give "
            f"--prores-schedule {OFF} to train it on as it is, or --prores-restart to warm it up "
            "again"
        )
    if args.prores_restart and not starts_at_zero:
        raise UserError("--prores-restart is for --finetune: this run goes on where it stopped")
    if saved is None:
        return
    if not starts_at_zero:
        _check_learning_rate(args, saved)
        _check_optimizer_layout(args, saved)
    num_layers = total_depth(args)
    if args.prores_override_checkpoint or num_layers is None:
        return
    found = differences(saved.settings, prores.settings(num_layers))
    told = [
        f"{FLAGS[name]} {_shown(there)} there, {_shown(here)} here"
        for name, (there, here) in found.items()
        if name == "norm_placement" or not starts_at_zero
    ]
    if told:
        raise UserError(
            f"{saved.directory} was trained with other ProRes settings: {'; '.join(told)}. "
            "Give the same, or --prores-override-checkpoint to go on with those of this command "
            "line"
        )


def _shown(value: object) -> object:
    return "not given" if value is None else value


def _check_learning_rate(args: Any, saved: SavedRun) -> None:
    """Refuse another length or height of the learning rate's schedule, which upstream asserts."""
    keeps_own = args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler
    if keeps_own or args.no_load_optim or args.skip_train:
        return
    for name in ("train_iters", "train_samples", "lr", "min_lr"):
        there, here = getattr(saved.args, name, None), getattr(args, name)
        if there is not None and here is not None and there != here:
            flag = flag_of(name)
            raise UserError(
                f"{saved.directory} was trained with {flag} {there}, this run has {here}: give the "
                "same, --override-opt-param-scheduler to follow the schedule of this command line, "
                "or --use-checkpoint-opt-param-scheduler to follow the saved one"
            )


def _check_optimizer_layout(args: Any, saved: SavedRun) -> None:
    """Refuse a distributed optimizer that was saved in the order of another model's parameters.

    By default Megatron saves the optimizer as it lies in memory. Upstream refuses another tensor or
    pipeline parallelism, with a traceback; but Transformer Engine's modules hold their parameters
    in another order than the local ones, and what upstream then loads are the moments of other
    weights, without a word.
    """
    if (
        not getattr(saved.args, "use_distributed_optimizer", False)
        or getattr(saved.args, "dist_ckpt_optim_fully_reshardable", False)
        or args.no_load_optim
        or args.skip_train
    ):
        return
    there, here = (getattr(each, "hybrid_layer_pattern", None) for each in (saved.args, args))
    if (there is None) != (here is None):
        kinds = {True: "a GPT model's", False: "a hybrid model's"}
        raise UserError(
            f"{saved.directory} holds the optimizer in the order of {kinds[there is None]} "
            f"parameters, and this run has {kinds[here is None]}: give --no-load-optim to start "
            "the optimizer anew; or save with --dist-ckpt-optim-fully-reshardable there"
        )
    # The layout is then the checkpoint's, and not known here yet.
    compared = _ORDERING_FLAGS if args.use_checkpoint_args else (*_ORDERING_FLAGS, *_LAYOUT_FLAGS)
    for name in compared:
        there, here = getattr(saved.args, name, None), getattr(args, name, None)
        # Validation fills in what the command line leaves out: only what is given is compared.
        if there is not None and here is not None and there != here:
            flag = flag_of(name)
            raise UserError(
                f"{saved.directory} holds the optimizer as {flag} {there} lays it out, and this "
                f"run has {here}: give the same; or --no-load-optim to start the optimizer anew; "
                "or save with --dist-ckpt-optim-fully-reshardable there, which any layout can load"
            )


def _is_under(path: str, directory: str) -> bool:
    return os.path.realpath(path).startswith(os.path.realpath(directory) + os.sep)
