"""The fused attention gives the figures of Megatron's unfused one, to rounding."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.distributed import faults
from tests.distributed.conftest import MODEL, OPTIMIZER, WARMUP, Text, loading
from tests.distributed.launch import Check, Job, check_name, run_checks, run_job

# In units of the largest value: both add up s products of float32 per figure, in another order.
# An error of one part in 2^24 per term gives, for s = 48, less than 48 * 6e-8 = 3e-6.
TOLERANCE = 3e-6

# The losses of whole runs, as between layouts (test_layouts.py).
LOSS_TOLERANCE = 1e-5

HEADS, GROUPS, CHANNELS, SEQUENCE, BATCH = 6, 2, 16, 48, 3

UNFUSED = ["--attention-backend", "unfused"]


def modules(
    groups: int = HEADS, document_masks: bool = True, **config: object
) -> list[torch.nn.Module]:
    """Builds the stock and the fused attention with the same arguments."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_prores.model.attention import FusedDotProductAttention

    transformer = TransformerConfig(
        num_layers=4,
        hidden_size=HEADS * CHANNELS,
        num_attention_heads=HEADS,
        num_query_groups=groups,
        hidden_dropout=0.0,
        **{"attention_dropout": 0.0, **config},
    )
    scale = {"softmax_scale": 0.4} if "apply_query_key_layer_scaling" not in config else {}
    fused = partial(FusedDotProductAttention, document_masks=document_masks)
    return [
        attention(transformer, 3, AttnMaskType.causal, "self", **scale)
        for attention in (DotProductAttention, fused)
    ]


def documents_mask() -> torch.Tensor:
    """Gives [b, 1, s, s]: causal, and in each sequence cut into documents elsewhere."""
    mask = torch.ones(BATCH, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
    for sequence, cut in enumerate((5, 17, 40)):
        mask[sequence, :, cut:, :cut] = True
    return mask


def attend(
    attention: torch.nn.Module, groups: int, mask: torch.Tensor | None, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Gives the context and the gradients of query, key and value."""
    from megatron.core import tensor_parallel

    generator = torch.Generator().manual_seed(3)
    inputs = [
        torch.randn(SEQUENCE, BATCH, heads, CHANNELS, generator=generator).to(dtype)
        for heads in (HEADS, groups, groups)
    ]
    for tensor in inputs:
        tensor.requires_grad_()
    tensor_parallel.model_parallel_cuda_manual_seed(7, force_reset_rng=True)
    context = attention(*inputs, mask)
    weights = torch.randn(context.shape, generator=generator).to(dtype)
    return [context, *torch.autograd.grad((context * weights).sum(), inputs)]


def check_same_figures(groups: int, mask: str, dtype: torch.dtype, scaled: bool) -> None:
    from tests.distributed import layers

    layers.initialize()
    config: dict[str, object] = {"bf16": dtype == torch.bfloat16, "params_dtype": dtype}
    if scaled:
        config |= {"apply_query_key_layer_scaling": True}
    causal = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
    tensor = {"none": None, "causal": causal, "documents": documents_mask()}[mask]
    stock, fused = (attend(module, groups, tensor, dtype) for module in modules(groups, **config))
    # bfloat16: 8 bits, and the stock attention rounds its probabilities as well.
    tolerance = TOLERANCE if dtype == torch.float32 else 2.0**-6
    for theirs, ours in zip(stock, fused, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        scale = theirs.abs().max().item()
        assert scale > 0.1
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=tolerance * scale)


def check_kernel_is_in_use() -> None:
    """Without it the test above would compare the stock attention with itself.

    A mask that the kernel is given costs a GPU its flash kernel.
    """
    import torch.nn.functional as F

    from tests.distributed import layers

    layers.initialize()
    stock_function = F.scaled_dot_product_attention
    given: list[tuple[bool, bool]] = []

    def counted(*args: torch.Tensor, **kwargs: object) -> torch.Tensor:
        given.append((bool(kwargs["is_causal"]), kwargs["attn_mask"] is not None))
        return stock_function(*args, **kwargs)

    plain = torch.ones(BATCH, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
    with mock.patch.object(F, "scaled_dot_product_attention", counted):
        for documents in (False, True):
            attention = modules(document_masks=documents)[1]
            outputs = [attend(attention, HEADS, mask, torch.float32) for mask in (None, plain)]
            for one, other in zip(*outputs, strict=True):
                torch.testing.assert_close(one, other)
    assert given == [(True, False), (True, False), (True, False), (False, True)]


def check_dropout_and_windows_go_the_stock_way() -> None:
    from tests.distributed import layers

    layers.initialize()
    for config in (
        {"attention_dropout": 0.3},
        {"window_size": (8, 0)},
        {"softmax_type": "off-by-one"},
    ):
        stock, fused = (attend(module, HEADS, None, torch.float32) for module in modules(**config))
        assert all(torch.equal(*pair) for pair in zip(stock, fused, strict=True)), config
    # Evaluation draws nothing.
    stock, fused = (
        attend(module.eval(), HEADS, None, torch.float32)
        for module in modules(attention_dropout=0.3)
    )
    torch.testing.assert_close(fused[0], stock[0], rtol=0.0, atol=TOLERANCE * 10)


def check_who_gets_it() -> None:
    from megatron.core.transformer.enums import AttnBackend

    from tests.distributed import layers

    layers.initialize()

    def core_attention(prores: bool, backend: str) -> str:
        layer = layers.build_layer(prores=prores, attention_backend=AttnBackend[backend])
        return type(layer.self_attention.core_attention).__name__

    assert core_attention(True, "fused") == "FusedDotProductAttention"
    assert core_attention(True, "flash") == "FusedDotProductAttention"
    assert core_attention(True, "auto") == "DotProductAttention"
    assert core_attention(True, "unfused") == "DotProductAttention"
    # Plain Megatron has no class of ours in the model.
    assert core_attention(False, "fused") == "DotProductAttention"


CHECKS: list[Check] = [
    *(
        (check_same_figures, (groups, mask, torch.float32, False))
        for groups in (HEADS, GROUPS, 1)
        for mask in ("none", "causal", "documents")
    ),
    (check_same_figures, (HEADS, "causal", torch.float32, True)),
    (check_same_figures, (GROUPS, "causal", torch.bfloat16, False)),
    (check_same_figures, (GROUPS, "documents", torch.bfloat16, False)),
    (check_kernel_is_in_use, ()),
    (check_dropout_and_windows_go_the_stock_way, ()),
    (check_who_gets_it, ()),
]


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_checks(tmp_path_factory.mktemp("checks"), CHECKS)


@pytest.mark.parametrize("name", map(check_name, CHECKS))
def test_attention(name: str, failures: dict[str, str]) -> None:
    assert name not in failures, failures[name]


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, ""),
        (1, "--recompute-granularity selective --recompute-modules core_attn"),
        (2, "--tensor-model-parallel-size 2"),
    ],
    ids=["one rank", "recomputed attention", "TP2"],
)
def test_same_run_as_unfused(
    ranks: int, flags: str, text: Text, checkpoint: Path, on_one_rank: Job, tmp_path: Path
) -> None:
    """The unfused attention, against the CPU device's default on one rank and on this layout."""
    argv = [*MODEL, *text.flags, *WARMUP, *OPTIMIZER, *loading(checkpoint), *flags.split()]
    unfused = run_job(tmp_path / "unfused", [*argv, *UNFUSED], ranks)
    assert_same_losses(unfused, on_one_rank)
    if flags:
        assert_same_losses(run_job(tmp_path / "fused", argv, ranks), on_one_rank)


def test_same_run_where_documents_do_not_see_each_other(
    text: Text, checkpoint: Path, tmp_path: Path
) -> None:
    argv = [*MODEL, *text.short, *WARMUP, *OPTIMIZER, *loading(checkpoint)]
    seen = run_job(tmp_path / "seen", argv)
    argv += ["--reset-attention-mask", "--reset-position-ids"]
    fused = run_job(tmp_path / "fused", argv)
    assert_same_losses(fused, run_job(tmp_path / "unfused", [*argv, *UNFUSED]))
    assert fused.scalars("lm loss") != pytest.approx(seen.scalars("lm loss"), rel=1e-4)


@pytest.mark.parametrize("flags", [[], UNFUSED], ids=["default", "unfused"])
def test_the_runs_above_are_fused_by_default(
    flags: list[str], text: Text, checkpoint: Path, tmp_path: Path
) -> None:
    argv = [*MODEL, *text.flags, *WARMUP, *OPTIMIZER, *loading(checkpoint), *flags]
    job = run_job(tmp_path, argv, prepare=faults.break_fused_attention)
    assert job.succeeded == bool(flags)
    assert ("no fused attention" in job.output) == (not flags)


def assert_same_losses(job: Job, reference: Job) -> None:
    assert job.succeeded, job.output[-3000:]
    assert reference.succeeded, reference.output[-3000:]
    for tag in ("lm loss", "grad-norm", "lm loss validation"):
        assert job.scalars(tag) == pytest.approx(reference.scalars(tag), rel=LOSS_TOLERANCE), tag
