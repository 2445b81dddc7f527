"""The flags of the main program: Megatron's own, and the group "ProRes".

They are read twice. Before Megatron is imported only our own are (:func:`read_prores_flags`): the
device decides how Megatron is imported, and a wrong value should not cost a user its ten seconds.
Then Megatron's parser reads all of them (:func:`parse_args`).
"""

from __future__ import annotations

import argparse
import json
import linecache
import sys
from collections.abc import Sequence
from types import TracebackType

from megatron_prores.config.flags import config_of, told_in_flags
from megatron_prores.config.placement import PLACEMENTS
from megatron_prores.config.prores_config import (
    DEFAULT_WARMUP_ITERS_PER_LAYER,
    OFF,
    ProResConfig,
)
from megatron_prores.errors import TRACEBACK, Parser, UserError
from megatron_prores.schedule.depth import depths_of, total_depth
from megatron_prores.schedule.formulas import SCHEDULES
from megatron_prores.system.environment import THIS_MACHINE, TargetEnvironment

DEVICES = ("cuda", "cpu")


def check_device(device: str) -> None:
    """Refuse a device that there is none of.

    Raises:
        UserError: Names those that there are.
    """
    if device not in DEVICES:
        raise UserError(f"--device {device}: choose one of {', '.join(DEVICES)}")


def add_prores_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group "ProRes" to a parser, as Megatron's ``extra_args_provider``."""
    group = parser.add_argument_group(
        title="ProRes", description="Progressive Residual Warmup (arXiv 2603.05369)"
    )
    group.add_argument(
        "--prores-schedule",
        default="linear",
        metavar="NAME",
        help="How alpha of a layer grows from 0 to 1; "
        f"one of {', '.join(SCHEDULES)}; {OFF}: plain Megatron; file:PATH: a table in a .csv "
        "(step,1,2,...,L) or .json file, interpolated; module:function: your own "
        "function(step, layers, warmup). Default: linear.",
    )
    group.add_argument(
        "--prores-warmup-iters",
        type=int,
        metavar="W",
        help="Iterations of the whole warmup: after W iterations every layer is fully open.",
    )
    group.add_argument(
        "--prores-warmup-iters-per-layer",
        type=int,
        metavar="T",
        help="Iterations of the warmup per layer, so that W = T x layers. "
        f"Default: {DEFAULT_WARMUP_ITERS_PER_LAYER}, if --prores-warmup-iters is not given.",
    )
    group.add_argument(
        "--prores-warmup-samples",
        type=int,
        metavar="S",
        help="The whole warmup in samples: alpha follows the consumed samples, as the learning "
        "rate does in sample-based training.",
    )
    group.add_argument(
        "--prores-override-checkpoint",
        action="store_true",
        help="Go on from a checkpoint that was trained with other ProRes settings, with the "
        "settings of this command line.",
    )
    group.add_argument(
        "--prores-restart",
        action="store_true",
        help="With --finetune: warm the loaded model up again, all layers closed at first.",
    )
    group.add_argument(
        "--prores-verify-checkpoint",
        default="hashes",
        choices=("hashes", "sizes"),
        help="What to compare of a checkpoint with its manifest before it is loaded; hashes: the "
        "content of every file, each rank reading its share; sizes: only that every file is there "
        "and as long as it was. Default: hashes.",
    )
    group.add_argument(
        "--norm-placement",
        default="pre",
        metavar="NAME",
        help="Where the norms of a layer sit; one of "
        + "; ".join(f"{name}: {placement.formula}" for name, placement in PLACEMENTS.items())
        + ". Default: pre.",
    )
    group.add_argument(
        "--branch-init",
        default="auto",
        metavar="NAME",
        help="Initial weights; normal: one standard deviation for every linear layer, as in the "
        "paper; scaled: 1/sqrt(2L) of it for the last linear of a branch, as in Megatron and "
        "GPT-2; ds: 1/sqrt(2l) of it in layer l, as in open_lm; deepnorm: DeepNorm's gains; auto: "
        "deepnorm with that placement, else normal. Default: auto.",
    )
    group.add_argument(
        "--init-method-truncated-normal",
        action="store_true",
        help="Draw initial weights from a normal distribution cut off at 3 standard deviations, "
        "which leaves 0.987 of --init-method-std.",
    )
    group.add_argument(
        "--embedding-weight-decay",
        action="store_true",
        help="Decay the embedding like other weights, as Megatron does; the paper's runs do not.",
    )
    group.add_argument(
        "--device",
        default="cuda",
        metavar="DEVICE",
        help="cuda, or cpu: train on CPU tensors and gloo, for a first run and for tests.",
    )
    group.add_argument(
        "--log-layer-norms-interval",
        type=int,
        metavar="N",
        help="Every N iterations log, for each layer, the size of the residual stream, of what its "
        "branches add, of its gradient and of its weights. Default: never.",
    )
    group.add_argument(
        "--log-spikes",
        action="store_true",
        help="Say in the log when the loss or the gradient norm spikes, and log how often.",
    )
    group.add_argument(
        "--skip-step-above-sigmas",
        type=float,
        metavar="S",
        help="Leave out an update whose gradient norm lies more than S standard deviations above "
        "the mean of the 1000 steps before. Default: never.",
    )
    group.add_argument(
        "--peak-tflops",
        type=float,
        metavar="TFLOPS",
        help="Dense bf16 peak of a GPU, for the MFU of --log-throughput. Default: known for B200, "
        "H200, H100 and A100.",
    )
    return parser


def read_prores_flags(argv: Sequence[str]) -> tuple[ProResConfig, str]:
    """Read and check our own flags alone, without Megatron.

    Args:
        argv: The command line, without the program's name.

    Returns:
        The ProRes configuration, and the device, "cuda" or "cpu".

    Raises:
        UserError: A value is wrong.
    """
    parser = add_prores_args(Parser(add_help=False, allow_abbrev=False))
    # Megatron's; a user's own schedule must fit them.
    parser.add_argument("--num-layers", type=int)
    parser.add_argument("--hybrid-layer-pattern")
    parser.add_argument("--yaml-cfg")  # Megatron would read it before anybody could object
    parser.add_argument("-h", "--help", action="store_true")
    args, _ = parser.parse_known_args(argv)
    if args.yaml_cfg is not None:
        raise UserError(
            "--yaml-cfg cannot be used with pretrain_gpt_prores.py: give the options as flags"
        )
    check_device(args.device)
    had_megatron = "megatron.core" in sys.modules
    with told_in_flags():
        config = config_of(args)
        config.load()
        num_layers = total_depth(args)
        if num_layers is not None and num_layers >= 1:
            config.check_layers(num_layers)
    if "megatron.core" in sys.modules and not had_megatron:
        # --device cpu has to be in place first.
        module = config.schedule.partition(":")[0]
        raise UserError(
            f"--prores-schedule {config.schedule}: importing {module} imports Megatron, which is "
            "too early: put the function into a module that does not"
        )
    # To read what the flags are takes no GPU.
    return config, "cpu" if args.help else args.device


def explicit_prores_flags(argv: Sequence[str]) -> set[str]:
    """Name the destinations of our flags that the command line really has."""
    parser = add_prores_args(Parser(add_help=False, allow_abbrev=False))
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_known_args(argv)[0]))


def parse_args(
    device: str, target: TargetEnvironment = THIS_MACHINE
) -> tuple[argparse.Namespace, ProResConfig]:
    """Parse and validate the whole command line with Megatron's own parser.

    Sets Megatron's global arguments, tokenizer, and writers, as a side effect of upstream's
    ``parse_and_validate_args``.

    Args:
        device: "cuda" or "cpu", as :func:`read_prores_flags` gave it; the CPU has other defaults.
        target: The machine of the run, which the checks ask.

    Returns:
        Megatron's arguments, and the ProRes configuration, agreed with the checkpoint to load.

    Raises:
        UserError: A flag is unknown, wrong, or cannot work with ProRes, on the chosen device, or
            with the checkpoint.
    """
    from megatron.training import arguments

    from megatron_prores.checkpoint.guard import check_paths
    from megatron_prores.command_line import saved_run, setup_checks
    from megatron_prores.command_line.conflicts import check_flags
    from megatron_prores.command_line.paths import check_files
    from megatron_prores.data.dataset_files import data_prefixes

    def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        # Not a subclass: Megatron makes the parser itself.
        parser.error = Parser.error.__get__(parser)  # type: ignore[method-assign]
        add_prores_args(parser)
        if device == "cpu":
            from megatron_prores.command_line.cpu import set_defaults

            set_defaults(parser)
        return parser

    # Once for our checks, which must come before upstream opens files and writers.
    try:
        args = arguments.parse_args(provider)
    except RuntimeError as error:  # --enable-msc without its package
        raise UserError(upstream_words(error)) from error
    check_paths(args, target)
    saved = saved_run.find_saved_run(args)
    restored = saved_run.restore_flags(args, saved, explicit_prores_flags(sys.argv[1:]))
    with told_in_flags():
        prores = config_of(args)
        prores.load()
    check_flags(args, prores, target)
    check_files(args, target)
    saved_run.check_agreement(args, prores, saved)
    datasets = [] if args.mock_data else data_prefixes(args)
    try:
        with setup_checks.around_setup(prores, datasets, saved, upstream_words, target):
            args = arguments.parse_and_validate_args(provider)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        if (path := args.heterogeneous_layers_config_path) is None:
            raise
        raise UserError(
            f"--heterogeneous-layers-config-path {path}: Megatron cannot read the model's layers "
            f"from it: {type(error).__name__}: {error} ({TRACEBACK}=1 shows where)"
        ) from error
    except (AssertionError, ValueError, RuntimeError, OSError) as error:
        raise UserError(upstream_words(error)) from error
    except SystemExit as error:
        # With exit code 0; rank 0 has printed why.
        raise UserError("Megatron ended the run at these flags, with the words above") from error
    vars(args).update(restored)
    with told_in_flags():
        num_layers = depths_of(args)[-1]
        prores.check_layers(num_layers)
    # Where Megatron keeps its arguments, for the run that loads the next checkpoint.
    args.prores_settings = prores.settings(num_layers)
    return args, prores


def upstream_words(error: Exception) -> str:
    """Say in one line what upstream's validation objects to."""
    message = str(error)
    if not message and error.__traceback__ is not None:
        message = f"this must hold: {_failed_assertion(error.__traceback__)}"
    return f"Megatron refuses these flags: {message} ({TRACEBACK}=1 shows where)"


def _failed_assertion(traceback: TracebackType) -> str:
    """Read the source of an assertion that has no message; its names are those of the flags."""
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    line = linecache.getline(traceback.tb_frame.f_code.co_filename, traceback.tb_lineno)
    return line.strip().removeprefix("assert ").removesuffix(", \\").replace("args.", "")
