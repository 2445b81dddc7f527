"""The training runs of the GPU tests. Every one is planned by a test that needs no GPU."""

from __future__ import annotations

ITERATIONS = 20

_MODEL = f"""
    --num-layers 4 --hidden-size 128 --ffn-hidden-size 256 --num-attention-heads 4
    --seq-length 128 --max-position-embeddings 128 --micro-batch-size 4 --global-batch-size 8
    --normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --lr 2e-3 --lr-decay-style constant --clip-grad 1.0 --train-iters {ITERATIONS}
    --log-interval 1 --eval-interval 5 --eval-iters 2 --num-workers 0
    --tokenizer-type NullTokenizer --vocab-size 255 --mock-data
    --no-create-attention-mask-in-dataloader --no-gradient-accumulation-fusion
    --prores-warmup-iters 24
"""
LOCAL = f"""
    {_MODEL} --transformer-impl local --no-persist-layer-norm --no-masked-softmax-fusion
    --no-rope-fusion --attention-backend unfused
"""
"""Megatron's local layers in float32: what all others are compared with."""
LOCAL_BF16 = f"{LOCAL.replace('unfused', 'fused')} --bf16 --cross-entropy-loss-fusion"
"""The same in bf16, with torch's attention: what a machine without Transformer Engine trains."""
TE = f"{_MODEL} --transformer-impl transformer_engine"
BF16 = f"{TE} --bf16"

FP8 = {
    "tensorwise": "--fp8-format hybrid --fp8-recipe tensorwise",
    "delayed": "--fp8-format hybrid --fp8-recipe delayed --fp8-amax-history-len 16 "
    "--fp8-amax-compute-algo max",
    "blockwise": "--fp8-format e4m3 --fp8-recipe blockwise",
    "mxfp8": "--fp8-format e4m3 --fp8-recipe mxfp8",
}
NEEDS = {"mxfp8": (10, 0)}
"""The CUDA compute capability that a recipe needs, where it is more than Hopper's."""

PLACEMENTS = ("pre", "sandwich", "post", "deepnorm", "lns")

GRAPHS = {
    "local": "--cuda-graph-impl local",
    "transformer_engine": "--cuda-graph-impl transformer_engine",
    "transformer_engine, attention alone": "--cuda-graph-impl transformer_engine "
    "--cuda-graph-modules attn",
    "full_iteration": "--cuda-graph-impl full_iteration --no-check-for-nan-in-loss-and-grad",
}

RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SELECTIVE = "--recompute-granularity selective --recompute-modules layernorm"


def command_lines() -> dict[str, str]:
    """Names every run that stands alone: name -> command line."""
    lines: dict[str, str] = {}
    for placement in PLACEMENTS:
        flag = f"--norm-placement {placement}"
        lines[f"{placement}, float32"] = f"{LOCAL} {flag}"
        lines[f"{placement}, local bf16"] = f"{LOCAL_BF16} {flag}"
        lines[f"{placement}, bf16"] = f"{BF16} {flag}"
        lines[f"{placement}, tensorwise"] = f"{BF16} {flag} {FP8['tensorwise']}"
    for recipe, flags in FP8.items():
        if recipe != "tensorwise":
            lines[f"pre, {recipe}"] = f"{BF16} {flags}"
    lines["none, bf16"] = f"{BF16} --prores-schedule none"
    gather = "--fp8-param-gather --use-distributed-optimizer"
    lines["FP8 weights"] = f"{BF16} {FP8['tensorwise']} {gather}"
    ends = "--first-last-layers-bf16 --num-layers-at-start-in-bf16 1 --num-layers-at-end-in-bf16 1"
    lines["first and last layer in bf16"] = f"{BF16} {FP8['tensorwise']} {ends}"
    lines["FP8, full recompute"] = f"{BF16} {FP8['tensorwise']} {RECOMPUTE}"
    lines["FP8, norms recomputed"] = f"{BF16} {FP8['tensorwise']} {SELECTIVE}"
    lines["sandwich, full recompute"] = f"{BF16} --norm-placement sandwich {RECOMPUTE}"
    return lines
