"""What cannot work, refused before any work: flags that exclude each other, absent files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_prores.config import OFF
from megatron_prores.data.dataset_files import check_dataset, data_prefixes
from megatron_prores.data.megatron_tokenizer import check_tokenizer_arguments
from megatron_prores.environment import is_installed
from megatron_prores.errors import UserError
from megatron_prores.flags.arguments import prores_config
from megatron_prores.flags.limits import check_numbers, check_split, check_training
from megatron_prores.flags.precision import check_fp8_hardware, check_graphs
from megatron_prores.flags.preflight import check_checkpoint_is_there, check_directories
from megatron_prores.placement import PLACEMENTS

Rule = tuple[str, Callable[[Any], bool], str]
"""(the flag as the user gave it, whether it is given, why it cannot work)."""

# This main program pretrains GPT models on packed text; upstream's has more modes.
_NEVER: tuple[Rule, ...] = (
    (
        "--checkpoint-activations",
        lambda a: a.checkpoint_activations,
        "it is no more; use --recompute-activations",
    ),
    (
        "--adlr-autoresume",
        lambda a: a.adlr_autoresume and not is_installed("userlib"),
        "its library, userlib, is not installed",
    ),
    ("--sft", lambda a: a.sft, "this program pretrains; finetuning is not part of it"),
    ("--fim-data", lambda a: a.fim_data, "fill-in-the-middle data is not supported yet"),
    ("--perform-rl-step", lambda a: a.perform_rl_step, "this program pretrains"),
    (
        "--hybrid-layer-pattern",
        lambda a: a.hybrid_layer_pattern is not None,
        "hybrid models are not supported yet",
    ),
    (
        "--hybrid-context-parallel",
        lambda a: a.hybrid_context_parallel,
        "it needs finetuning data; use --context-parallel-size",
    ),
    (
        "--dataloader-inter-document-masking",
        lambda a: a.dataloader_inter_document_masking,
        "packed sequences with boundaries are not supported yet; use --reset-attention-mask",
    ),
    (
        "--attention-backend local",
        lambda a: a.attention_backend.name == "local" and a.spec is None,
        "upstream's check of it needs --spec; use --attention-backend unfused",
    ),
    (
        "--recompute-modules mlp",
        lambda a: (
            (a.recompute_granularity == "selective" or a.recompute_activations)
            and "mlp" in (a.recompute_modules or ())
            and a.add_bias_linear
        ),
        "Megatron's backward pass never ends when it recomputes an MLP with biases; give "
        "--disable-bias-linear, or --recompute-granularity full",
    ),
    (
        "--mtp-num-layers with tied embeddings and --pipeline-model-parallel-size",
        lambda a: (
            bool(a.mtp_num_layers)
            and not a.untie_embeddings_and_output_weights
            and a.pipeline_model_parallel_size > 1
            and "m" in (a.pipeline_model_parallel_layout or "m").split("|")[-1]
        ),
        "Megatron cannot save a last stage that has prediction layers and a tied output head; give "
        "--untie-embeddings-and-output-weights, or --pipeline-model-parallel-layout with the "
        "prediction layers on a stage before the last",
    ),
)

# Paths of upstream that add the residual somewhere else than in the bias-dropout-add.
_NOT_WITH_PRORES: tuple[Rule, ...] = (
    (
        "--transformer-impl inference_optimized",
        lambda a: a.transformer_impl == "inference_optimized",
        "its kernels add the residual themselves, without alpha",
    ),
    (
        "--inference-fuse-tp-communication",
        lambda a: getattr(a, "inference_fuse_tp_communication", False),
        "its kernels add the residual themselves, without alpha",
    ),
    (
        "--fused-residual-rmsnorm",
        lambda a: getattr(a, "fused_residual_rmsnorm", False),
        "the fused norm takes over the residual addition, without alpha",
    ),
    (
        "--spec",
        lambda a: a.spec is not None,
        "ProRes builds the layer spec from Megatron's own flags",
    ),
)

_ONLY_WITH_TRANSFORMER_ENGINE: tuple[Rule, ...] = (
    ("--fp8-format", lambda a: a.fp8 is not None, "its GEMMs are Transformer Engine's"),
    ("--fp4-format", lambda a: a.fp4 is not None, "its GEMMs are Transformer Engine's"),
    ("--tp-comm-overlap", lambda a: a.tp_comm_overlap, "Transformer Engine's linears overlap it"),
)

_NOT_WITH_NORM_BEHIND_THE_SUM: tuple[Rule, ...] = (
    (
        "--fp32-residual-connection",
        lambda a: a.fp32_residual_connection,
        "the norm is part of the residual stream",
    ),
    (
        "--use-transformer-engine-op-fuser",
        lambda a: a.use_transformer_engine_op_fuser,
        "it fuses the MLP with a norm before it, which this placement has not",
    ),
)

_NOT_WITH_OWN_NORMS: tuple[Rule, ...] = (
    (
        "--mtp-num-layers",
        lambda a: bool(a.mtp_num_layers),
        "Megatron's prediction layers have their norms before the branches",
    ),
)

_NOT_WITH_OWN_INIT: tuple[Rule, ...] = (
    (
        "--init-method-xavier-uniform",
        lambda a: a.init_method_xavier_uniform,
        "both say how weights start",
    ),
    ("--use-mup", lambda a: a.use_mup, "both say how weights start"),
    (
        "--multi-latent-attention",
        lambda a: a.multi_latent_attention and _initialization(a) == "deepnorm",
        "DeepNorm's gains are defined for separate query, key and value projections",
    ),
)


def _initialization(args: Any) -> str:
    return prores_config(args).initialization


def check_flags(args: Any) -> None:
    """Refuses flags that cannot work together with ProRes, on this device, or in this program.

    Args:
        args: Parsed, not yet validated by Megatron.

    Raises:
        UserError: Names the flag, and why.
    """
    _refuse(args, _NEVER, "cannot be used with pretrain_gpt_prores.py")
    if args.prores_schedule != OFF:
        _refuse(args, _NOT_WITH_PRORES, f"cannot be used with --prores-schedule other than {OFF}")
    _check_placement_and_init(args)
    check_numbers(args)
    check_training(args)
    _check_async_save(args)
    if args.device == "cpu":
        from megatron_prores.cpu.flags import NOT_ON_CPU

        _refuse(args, NOT_ON_CPU, "cannot be used with --device cpu")
    elif args.transformer_impl == "transformer_engine" and not is_installed("transformer_engine"):
        raise UserError(
            "--transformer-impl transformer_engine (the default) needs Transformer Engine, which "
            "is not installed: install megatron-prores[te], or use --transformer-impl local"
        )
    elif args.transformer_impl == "local":
        _refuse(args, _ONLY_WITH_TRANSFORMER_ENGINE, "cannot be used with --transformer-impl local")
    if args.device == "cuda" and args.gradient_accumulation_fusion:
        _check_gradient_accumulation_fusion()
    check_graphs(args)
    check_fp8_hardware(args)


def _check_gradient_accumulation_fusion() -> None:
    # Also with Transformer Engine: the output head is Megatron's own linear, which ends the run
    # when the model is built.
    if not is_installed("fused_weight_gradient_mlp_cuda"):
        raise UserError(
            "gradient accumulation fusion (Megatron's default) needs Apex's "
            "fused_weight_gradient_mlp_cuda, which is not installed: give "
            "--no-gradient-accumulation-fusion"
        )


def _check_async_save(args: Any) -> None:
    if not args.async_save:
        return
    if not args.use_persistent_ckpt_worker:
        # Upstream saves synchronously, and says so in one line among many.
        raise UserError("--async-save needs --use-persistent-ckpt-worker: give both")
    if args.async_strategy == "nvrx" and not is_installed("nvidia_resiliency_ext"):
        raise UserError(
            "--async-strategy nvrx (the default of --async-save) needs nvidia-resiliency-ext, "
            "which is not installed: install it, or use --async-strategy mcore"
        )


def _check_placement_and_init(args: Any) -> None:
    placement = PLACEMENTS[args.norm_placement]
    named = f"--norm-placement {args.norm_placement}"
    if placement.norm_sum:
        _refuse(args, _NOT_WITH_NORM_BEHIND_THE_SUM, f"cannot be used with {named}")
    if not placement.is_stock:
        _refuse(args, _NOT_WITH_OWN_NORMS, f"cannot be used with {named}")
    if args.branch_init != "auto" or placement.deepnorm:
        _refuse(
            args,
            _NOT_WITH_OWN_INIT,
            f"cannot be used with --branch-init {_initialization(args)}",
        )
    if (placement.scaled_norms or _initialization(args) == "deepnorm") and (
        args.init_model_with_meta_device
    ):
        raise UserError(
            f"--init-model-with-meta-device cannot be used with {named} and "
            f"--branch-init {args.branch_init}: there are no weights yet to set"
        )


def _refuse(args: Any, rules: tuple[Rule, ...], verdict: str) -> None:
    for flag, is_given, reason in rules:
        if is_given(args):
            raise UserError(f"{flag} {verdict}: {reason}")


def check_files(args: Any) -> None:
    """Refuses a run whose data, tokenizer, checkpoint or output directories cannot be used.

    Args:
        args: Parsed, not yet validated by Megatron.

    Raises:
        UserError: Names the flag and the file.
    """
    check_directories(args)
    check_checkpoint_is_there(args)
    if args.tokenizer_type is None:
        raise UserError("--tokenizer-type is missing: give the one that the data was made with")
    check_tokenizer_arguments(args)
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
        check_dataset(flag, prefix)
