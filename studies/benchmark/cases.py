"""The table of cases: which models are measured, in which order, and what is compared in each."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

from megatron_prores.config.prores_config import OFF
from megatron_prores.launch.gpu_flags import Setup, gpu_flags
from megatron_prores.system.environment import is_installed

FP32, BF16, FP8 = "fp32", "bf16", "fp8"

SIZES: dict[str, tuple[int, ...]] = {
    # Layers, hidden size, ffn, heads, sequence length, micro-batch, sequences per step, vocabulary.
    "laptop": (4, 256, 688, 4, 128, 2, 2, 4096),
    "8x256": (8, 256, 688, 4, 256, 8, 8, 8192),
    "24x32": (24, 32, 88, 2, 64, 8, 8, 512),  # of studies/paper on a laptop
    # The paper's. A step has 32 sequences, what one of 16 GPUs has of the paper's batch of 512.
    # Micro-batches are those of examples/, but for 7B, whose layers are not all on the GPU.
    "130M": (12, 768, 2048, 12, 1024, 32, 32, 32000),
    "350M": (24, 1024, 2736, 16, 1024, 16, 32, 32000),
    "1.3B": (24, 2048, 5632, 32, 1024, 8, 32, 32000),
    "3B": (32, 2560, 6848, 32, 1024, 4, 32, 32000),
    "7B": (32, 4096, 11008, 32, 1024, 4, 32, 32000),
}


@dataclass(frozen=True)
class Side:
    """One of those that a case compares: a model, and the phase of its warmup."""

    name: str
    schedule: str | None = None
    """A ProRes schedule, or ``none``; None: Megatron's own layer, with no class of ours."""
    opened: bool = False
    """Whether the warmup is over, rather than under way."""
    attention: str | None = None
    """Megatron's ``--attention-backend``; None: the one that stock Megatron has here."""
    in_bf16: bool = False
    """Whether the side leaves FP8 out, in a case of FP8."""
    measured: bool = False
    """Whether every step measures its layers, as ``--log-layer-norms-interval 1`` does."""

    @property
    def model(self) -> Hashable:
        """What the side shares with the other sides of the same model."""
        return self.schedule, self.attention, self.in_bf16


STOCK = Side("stock Megatron")
NO_SCHEDULE = Side("schedule none", OFF)
WARMUP = Side("ProRes during warmup", "linear")
AFTER = Side("ProRes after warmup", "linear", opened=True)
STOCK_BF16 = Side("stock Megatron in bf16", in_bf16=True)
UNFUSED = Side("unfused attention", "linear", opened=True, attention="unfused")
FUSED = Side("fused attention", "linear", opened=True, attention="fused")
PLAIN = Side("plain PyTorch loop", "linear")
MAIN_PROGRAM = Side("the main program", "linear")
MEASURED = Side("layer norms at every step", "linear", opened=True, measured=True)


def _against(base: Side, *others: Side) -> tuple[Side, ...]:
    # The base a second time: what the ratio of two equal models looks like on this machine.
    return base, replace(base, name=f"{base.name} again"), *others


@dataclass(frozen=True)
class Case:
    """What one process measures."""

    size: str
    precision: str
    sides: tuple[Side, ...] = _against(STOCK, WARMUP, AFTER)
    """The first is the base of all ratios."""
    norm_placement: str = "pre"
    layers: int | None = None
    """How many of the model's layers; None: all. All models of a case are in memory at once."""
    mfu_target: float | None = None
    """Percent, for the slower side of ProRes."""
    gain_target: float | None = None
    """How many times as fast as stock Megatron in bf16 the slower side of ProRes is to be."""
    only_on: str | None = None
    """The only device that can run it."""
    rival_target: float | None = None
    """How many times as long as the plain loop the main program may take; None: no such case."""

    @property
    def models(self) -> dict[Hashable, Side]:
        """The different models, each with the last side that it is; ProRes with open layers."""
        return {side.model: side for side in self.sides}


def _fp8(size: str, layers: int | None = None, gain: float | None = None) -> Case:
    sides = _against(STOCK, WARMUP, AFTER, STOCK_BF16)
    return Case(size, FP8, sides, layers=layers, gain_target=gain, only_on="cuda")


# Megatron has a layer of its own for pre alone.
_PLACED = _against(NO_SCHEDULE, WARMUP, AFTER)

CASES: dict[str, Case] = {
    # The most important ones first, for a run whose time is short. Layers fit an H200 (141 GB).
    "1.3B-bf16": Case("1.3B", BF16, mfu_target=45.0),
    "7B-bf16": Case("7B", BF16, layers=14, mfu_target=50.0),
    "7B-fp8": _fp8("7B", layers=8, gain=1.3),
    "130M-bf16": Case("130M", BF16, mfu_target=35.0),
    "1.3B-fp8": _fp8("1.3B"),
    "3B-bf16": Case("3B", BF16),
    "350M-bf16": Case("350M", BF16),
    "130M-fp8": _fp8("130M"),
    "350M-fp8": _fp8("350M"),
    "3B-fp8": _fp8("3B", layers=20),
    "1.3B-layer-norms": Case("1.3B", BF16, _against(AFTER, MEASURED)),
    "130M-layer-norms": Case("130M", BF16, _against(AFTER, MEASURED)),
    # What Megatron's local layers gain without Transformer Engine.
    "130M-attention": Case("130M", BF16, _against(UNFUSED, FUSED), only_on="cuda"),
    "laptop-pre": Case("laptop", FP32),
    "laptop-sandwich": Case("laptop", FP32, _PLACED, "sandwich"),
    "laptop-post": Case("laptop", FP32, _PLACED, "post"),
    "laptop-deepnorm": Case("laptop", FP32, _PLACED, "deepnorm"),
    "laptop-lns": Case("laptop", FP32, _PLACED, "lns"),
    # On a GPU Transformer Engine, the default there, has attentions of its own.
    "laptop-layer-norms": Case("laptop", FP32, _against(AFTER, MEASURED)),
    "laptop-attention": Case("laptop", FP32, _against(UNFUSED, FUSED), only_on="cpu"),
    # The whole main program, what it reads and logs included.
    "8x256-plain": Case("8x256", FP32, (PLAIN, MAIN_PROGRAM), only_on="cpu", rival_target=0.95),
    "24x32-plain": Case("24x32", FP32, (PLAIN, MAIN_PROGRAM), only_on="cpu", rival_target=1.3),
}


def default_cases(device: str) -> list[str]:
    """Return the names of the cases that a device is measured with: small ones on the CPU."""
    precisions = [FP32] if device == "cpu" else [BF16]
    if device == "cuda" and is_installed("transformer_engine"):
        precisions.append(FP8)
    return [name for name, case in CASES.items() if case.precision in precisions]


def megatron_flags(case: Case, device: str) -> list[str]:
    """Return the command line of a training run of the model, for Megatron's own parser.

    It trains without an end, on random data, with what is installed, as ``examples/`` do.
    """
    layers, hidden, ffn, heads, length, micro_batch, sequences, vocabulary = SIZES[case.size]
    flags = f"""--device {device} --num-layers {case.layers or layers} --hidden-size {hidden}
        --ffn-hidden-size {ffn} --num-attention-heads {heads} --normalization RMSNorm --swiglu
        --disable-bias-linear --position-embedding-type rope --seq-length {length}
        --max-position-embeddings {length} --untie-embeddings-and-output-weights
        --attention-dropout 0 --hidden-dropout 0 --micro-batch-size {micro_batch}
        --global-batch-size {sequences} --lr 1e-4 --lr-decay-style constant --train-iters 1000000
        --eval-iters 0 --eval-interval 1000000 --mock-data --tokenizer-type NullTokenizer
        --vocab-size {vocabulary}""".split()
    if case.precision != FP32:
        flags.append("--bf16")
    if case.precision == FP8:
        flags += ["--fp8-format", "hybrid", "--fp8-recipe", "tensorwise"]
    if device == "cpu":
        return flags
    # Not on the CPU: gloo frees its copies of gradients in threads of its own, which the count of
    # memory there does not see.
    flags.append("--use-distributed-optimizer")
    setup = Setup(
        bf16=case.precision != FP32,
        transformer_engine=is_installed("transformer_engine"),
        apex=is_installed("fused_weight_gradient_mlp_cuda"),
    )
    return flags + gpu_flags(setup)
