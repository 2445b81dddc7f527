"""The paths of a command line: data, tokenizer, checkpoints, and the directories of output."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megatron_prores.checkpoint.newest import is_there
from megatron_prores.command_line.values import check_split, flag_of
from megatron_prores.data.dataset_files import check_dataset, data_prefixes
from megatron_prores.data.megatron_tokenizer import check_tokenizer_arguments
from megatron_prores.errors import UserError
from megatron_prores.system.environment import THIS_MACHINE, TargetEnvironment


def check_files(args: Any, target: TargetEnvironment = THIS_MACHINE) -> None:
    """Refuse a run whose data, tokenizer, checkpoint or output directories cannot be used.

    Args:
        args: Parsed, not yet validated by Megatron.
        target: The machine of the run.

    Raises:
        UserError: Names the flag and the file.
    """
    check_directories(args, target)
    check_checkpoint_is_there(args, target)
    layers = args.heterogeneous_layers_config_path
    if layers is not None and not os.path.isfile(layers):
        raise UserError(f"--heterogeneous-layers-config-path {layers}: no such file")
    if args.tokenizer_type is None:
        raise UserError("--tokenizer-type is missing: give the one that the data was made with")
    check_tokenizer_arguments(args, target)
    if args.mock_data:
        return
    prefixes = data_prefixes(args)
    if not prefixes:
        raise UserError(
            "no data to train on: give --data-path PREFIX, --train-data-path and "
            "--valid-data-path, or --mock-data"
        )
    check_split(args)
    for flag, prefix in dict.fromkeys(prefixes):
        # A number is no path: it is a weight that has come too far.
        is_number = prefix.replace(".", "", 1).isdigit()
        if not is_number and target.is_elsewhere(prefix, f"{prefix}.bin", f"{prefix}.idx"):
            target.note(f"{flag} {prefix}: not here; the data was not looked at")
        else:
            check_dataset(flag, prefix)


def check_directories(args: Any, target: TargetEnvironment) -> None:
    """Refuse directories of output that cannot be made, and W&B without what it needs.

    Args:
        args: Parsed, not yet validated by Megatron.
        target: The machine of the run.

    Raises:
        UserError: Names the flag and the path.
    """
    for destination in ("tensorboard_dir", "wandb_save_dir", "data_cache_path"):
        path = getattr(args, destination)
        if path and "://" not in path:
            target.check_writable(flag_of(destination), path)
    if args.wandb_project:
        if not args.wandb_exp_name:
            raise UserError("--wandb-project needs --wandb-exp-name: a name for this run")
        if not (args.wandb_save_dir or args.save):
            raise UserError("--wandb-project needs --wandb-save-dir, or --save")


def check_checkpoint_is_there(args: Any, target: TargetEnvironment) -> None:
    """Refuse a run that needs a checkpoint and has none.

    Upstream ends it with exit code 0, or evaluates a model that nobody has trained. Without
    ``--exit-on-missing-checkpoint`` and ``--finetune``, a ``--load`` that is empty yet is how the
    first of a chain of runs starts.

    Args:
        args: Parsed, not yet validated by Megatron.
        target: The machine of the run.

    Raises:
        UserError: Names the flag and the directory.
    """
    for flag, path in (
        ("--load", args.load),
        ("--pretrained-checkpoint", args.pretrained_checkpoint),
    ):
        if path and os.path.lexists(path) and not os.path.isdir(path):
            raise UserError(f"{flag} {path}: not a directory")
    given = [path for path in (args.load, args.pretrained_checkpoint) if path]
    if any("://" in path or args.ckpt_step or is_there(Path(path)) for path in given):
        return
    for flag, wanted in (
        ("--exit-on-missing-checkpoint", args.exit_on_missing_checkpoint),
        ("--finetune", args.finetune),
        ("--pretrained-checkpoint", bool(args.pretrained_checkpoint)),
        ("--skip-train", args.skip_train),
    ):
        if wanted and (elsewhere := [path for path in given if target.is_elsewhere(path)]):
            target.note(f"{', '.join(elsewhere)}: not here; no checkpoint was looked at")
        elif wanted:
            where = "--load is not given"
            if given:
                where = f"{'--load' if args.load else '--pretrained-checkpoint'} {given[0]}"
            raise UserError(f"{where}: no checkpoint is there, and {flag} needs one")
