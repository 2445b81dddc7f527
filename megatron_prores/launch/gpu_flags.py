"""The flags of Megatron's that a fast run on GPUs has: which, where, and why.

The example scripts, the benchmark and the study take them from here, and the planner says which of
them a command line lacks. docs/launch.md names the places of megatron-core 0.19.2 that read them.
Plain Python 3.11, so that a dry run works with nothing installed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Setup:
    """What the choice depends on. The size of the model is none of it."""

    tensor: int = 1
    """Tensor-parallel ranks."""
    replicas: int = 1
    """Ranks that gradients are summed over: data-parallel times context-parallel."""
    gpus_per_node: int = 8
    bf16: bool = True
    """Also under FP8."""
    transformer_engine: bool = True
    """Whether the layers are its, rather than Megatron's local ones."""
    apex: bool = True
    """Whether Apex's fused_weight_gradient_mlp_cuda is installed."""


@dataclass(frozen=True)
class Choice:
    """Flags that belong together."""

    flags: str
    why: str
    applies: Callable[[Setup], bool]
    not_with: tuple[str, ...] = ()
    """Flags of the user's that want the opposite, where Megatron has no flag that says it."""


CHOICES = (
    Choice(
        "--no-create-attention-mask-in-dataloader",
        "a mask of s x s bytes a sequence, 32 MiB a micro-batch of 32, would come through shared "
        "memory, to the GPU, and through the tensor-parallel broadcast; attention is causal anyway",
        lambda setup: True,
        ("--reset-attention-mask",),
    ),
    Choice(
        "--cross-entropy-loss-fusion",
        "the float32 logits are passed over in four compiled kernels, not in a dozen",
        # It returns gradients in bfloat16, whatever the weights are.
        lambda setup: setup.bf16,
    ),
    Choice(
        "--manual-gc --manual-gc-interval 100",
        "Python's collector runs on all ranks at the same step; else each stops for it at another, "
        "and all wait each time",
        lambda setup: True,
    ),
    Choice(
        "--rerun-mode disabled --no-check-for-nan-in-loss-and-grad",
        "the checks wait for the GPU twice a micro-batch and twice a bucket of gradients, the "
        "machine that would run a step again once a step; a gradient norm that is no number ends "
        "the run all the same",
        lambda setup: True,
        ("--rerun-mode", "--check-for-spiky-loss", "--check-for-large-grads"),
    ),
    Choice(
        "--overlap-grad-reduce --overlap-param-gather",
        "gradients are summed and weights gathered while the backward and the forward pass compute",
        lambda setup: setup.replicas > 1,
    ),
    Choice(
        "--sequence-parallel",
        "norms and residual stream are split over the tensor-parallel ranks as well",
        lambda setup: setup.tensor > 1,
    ),
    Choice(
        "--tp-comm-overlap",
        "Transformer Engine's linears communicate while they compute, over the NVLink of a node",
        lambda setup: setup.transformer_engine and 1 < setup.tensor <= setup.gpus_per_node,
    ),
    Choice(
        "--transformer-impl local --attention-backend fused",
        "with ProRes or added norms torch's attention kernel; Megatron's own writes all scores "
        "[b, n, s, s], 0.8 GB a layer of the 130M model",
        lambda setup: not setup.transformer_engine,
    ),
    Choice(
        "--no-persist-layer-norm --no-masked-softmax-fusion --no-rope-fusion",
        "these kernels are Apex's and Transformer Engine's",
        lambda setup: not setup.transformer_engine,
    ),
    Choice(
        "--no-gradient-accumulation-fusion",
        "the kernel is Apex's; the output head wants it with Transformer Engine as well",
        lambda setup: not setup.apex,
    ),
)


def chosen(setup: Setup, given: Sequence[str] = ()) -> list[Choice]:
    """Choose the flags of a run.

    Args:
        setup: What the run has.
        given: The user's own flags, which come after these and count over them.
    """
    names = {word.partition("=")[0] for word in given}
    return [
        choice for choice in CHOICES if choice.applies(setup) and names.isdisjoint(choice.not_with)
    ]


def gpu_flags(setup: Setup, given: Sequence[str] = ()) -> list[str]:
    """Return the flags of a run as words; arguments are those of :func:`chosen`."""
    return [word for choice in chosen(setup, given) for word in choice.flags.split()]


def missing(setup: Setup, argv: Sequence[str]) -> list[Choice]:
    """Return the choices of which a command line lacks a flag, whatever its value."""
    names = {word.partition("=")[0] for word in argv}
    return [
        choice
        for choice in chosen(setup, argv)
        if any(word not in names for word in choice.flags.split() if word.startswith("--"))
    ]
