"""Flags of Megatron's own that no other test has: a run with many of them opens its layers alike.

docs/flags.md counts a flag as run where a command line of these tests has it.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from megatron_prores.config.prores_config import ProResConfig
from tests.distributed.conftest import Text
from tests.distributed.launch import Job, run_job, run_ranks

STEPS = 4
WARMUP = 12
BATCH = 8
LENGTH = 32

BASE = f"""
    --device cpu --num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length {LENGTH}
    --max-position-embeddings {LENGTH} --micro-batch-size 2 --global-batch-size {BATCH}
    --train-iters {STEPS} --lr 1e-3 --log-interval 1 --num-workers 0 --mock-data
    --tokenizer-type NullTokenizer --vocab-size 127 --prores-warmup-iters {WARMUP}
"""
QUIET = "--eval-interval 4 --eval-iters 1"
ROPE = "--position-embedding-type rope --normalization RMSNorm --disable-bias-linear"

RUNS = {
    "attention": f"""
        {QUIET} {ROPE} --swiglu --qk-layernorm --add-qkv-bias --group-query-attention
        --num-query-groups 2 --kv-channels 16 --window-size 16,0 --window-attn-skip-freq 2
        --softmax-type learnable --rotary-percent 0.5 --rotary-interleaved
        --rotary-seq-len-interpolation-factor 2 --use-rope-scaling --no-rope-freq 4
        --rotary-base 5000 --init-method-std 0.01
        --attention-softmax-in-fp32 --no-bias-dropout-fusion --use-cpu-initialization
        --calculate-per-token-loss --hidden-dropout 0.2 --attention-dropout 0.2
    """,
    "positions and activation": f"""
        {QUIET} --squared-relu --position-embedding-type yarn --yarn-beta-fast 16
        --yarn-beta-slow 2 --yarn-original-max-position-embeddings 16
        --rotary-scaling-factor 2 --apply-query-key-layer-scaling --bf16
        --accumulate-allreduce-grads-in-fp32 --cross-entropy-loss-fusion
        --recompute-activations --mlp-chunks-for-training 2 --log-layer-norms-interval 2
    """,
    "experts": f"""
        {QUIET} {ROPE} --swiglu --num-experts 4 --moe-layer-freq 2 --moe-ffn-hidden-size 32
        --moe-token-dispatcher-type allgather --moe-router-topk 2
        --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.01
        --moe-z-loss-coeff 0.001 --moe-router-score-function sigmoid --moe-router-dtype fp32
        --moe-router-enable-expert-bias --moe-router-bias-update-rate 0.01
        --moe-router-topk-scaling-factor 2.5 --moe-shared-expert-intermediate-size 32
        --moe-per-layer-logging --mtp-num-layers 1 --mtp-loss-scaling-factor 0.2
        --mtp-detach-heads --log-layer-norms-interval 2
    """,
    "training loop": f"""
        {ROPE} --eval-interval 2 --eval-iters 1 --start-eval-at-iter 3 --eval-micro-batch-size 1
        --eval-global-batch-size 4 --lr-decay-style cosine --lr-decay-iters 4
        --lr-warmup-fraction 0.25 --lr-warmup-init 1e-5 --min-lr 1e-4 --decoupled-lr 5e-4
        --decoupled-min-lr 1e-4 --weight-decay-incr-style linear --start-weight-decay 0.0
        --end-weight-decay 0.1 --apply-wd-to-qk-layernorm --qk-layernorm
        --untie-embeddings-and-output-weights --manual-gc --manual-gc-interval 2
        --no-manual-gc-eval --check-for-large-grads --check-for-spiky-loss
        --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
        --ddp-num-buckets 2 --exit-duration-in-mins 60 --iterations-to-skip 2
        --check-weight-hash-across-dp-replicas-interval 2 --log-layer-norms-interval 1 --log-spikes
    """,
    "logging": f"""
        {QUIET} {ROPE} --log-params-norm --log-num-zeros-in-grad --log-throughput
        --peak-tflops 1e-3 --timing-log-level 2 --timing-log-option all --log-timers-to-tensorboard
        --log-validation-ppl-to-tensorboard --log-memory-interval 2
        --log-world-size-to-tensorboard --tensorboard-log-interval 2 --tensorboard-queue-size 10
        --no-log-loss-scale-to-tensorboard --no-barrier-with-level-1-timing --logging-level 20
        --no-one-logger --eod-mask-loss --num-dataset-builder-threads 2 --no-mmap-bin-files
        --optimizer sgd --sgd-momentum 0.8 --null-tokenizer-eod-id 3
    """,
}

VALIDATION = f"""
    {ROPE} --eval-interval 2 --full-validation --multiple-validation-sets
    --validation-set-names first second --save-interval 2 --log-progress --no-save-optim
    --no-save-rng
"""

SPLIT = f"{QUIET} {ROPE} --split 80,15,5 --mid-level-dataset-surplus 0.01"


@pytest.mark.parametrize("name", RUNS)
def test_layers_open_alike_whatever_else_a_run_does(name: str, tmp_path: Path) -> None:
    flags = [*BASE.split(), *RUNS[name].split()]
    job = run_job(tmp_path, flags, ranks=2 if name == "training loop" else 1)
    assert job.succeeded, job.output[-3000:]
    assert "has no effect" not in job.output
    untried = "warning: --optimizer is untried: no other optimizer than adam"
    assert (untried in job.output) == ("--optimizer" in flags)
    config = ProResConfig(schedule="linear", warmup_iters=WARMUP)
    held = job.alphas_by_step()
    skipped = {1} if "--iterations-to-skip" in flags else set()
    assert set(range(STEPS)) - skipped <= set(held)
    for step, alphas in held.items():
        assert list(alphas.values()) == pytest.approx(list(config.alphas(step, 4)))
    assert all(math.isfinite(loss) for loss in job.scalars("lm loss").values())
    if "--log-throughput" in flags:
        check_throughput(job)
    norms = job.layer_norms()
    assert bool(norms) == ("--log-layer-norms-interval" in flags)
    assert all(math.isfinite(value) for value in norms.values())


def check_throughput(job: Job) -> None:
    """Compares what is logged of it with the seconds of each step that Megatron logs."""
    seconds = job.scalars("iteration-time")
    del seconds[1]  # it compiles
    assert len(seconds) == STEPS - 1
    tokens, tflops, mfu = (
        job.scalars(f"throughput_per_gpu/{name}")
        for name in ("tokens_per_second", "tflops", "mfu_percent")
    )
    assert tokens == pytest.approx(
        {step: 8 * 32 / each for step, each in seconds.items()}, rel=1e-3
    )
    # Of a layer 12 h^2 weights and attention, causal; and the vocabulary: 6 a token and weight.
    flops = 6 * (4 * (12 * 32**2 + 32 * 32) + 128 * 32)
    assert tflops == pytest.approx({s: flops * each / 1e12 for s, each in tokens.items()}, rel=1e-3)
    assert mfu == pytest.approx({s: 100 * each / 1e-3 for s, each in tflops.items()}, rel=1e-3)
    assert job.output.count("% of 0.001 TFLOP/s") == len(mfu)


def real_data() -> list[str]:
    """Return the flags of a run without its data and tokenizer."""
    words = BASE.split()
    return [word for word in words if word not in ("--mock-data", "--vocab-size", "127")]


def test_several_validation_sets_are_read_to_their_end(text: Text, tmp_path: Path) -> None:
    flags = real_data()
    position = text.flags.index("--valid-data-path") + 1
    both = [*text.flags[: position + 1], text.flags[position], *text.flags[position + 1 :]]
    saved = tmp_path / "saved"
    job = run_job(tmp_path, [*flags, *both, *VALIDATION.split(), "--save", str(saved)])
    assert job.succeeded, job.output[-3000:]
    assert {"lm loss validation-first", "lm loss validation-second"} <= job.tags(), job.tags()
    assert (saved / f"iter_{STEPS:07d}").is_dir()


def make_cache(argv: list[str]) -> None:
    """Builds the cache of a run with the planner, which tells the epochs as well."""
    from megatron_prores.plan.planner import make_plan

    plan = make_plan(argv, 1, with_cache=True)
    assert [round(each["share"], 9) for each in plan.data] == [0.75, 0.25]
    samples = STEPS * BATCH
    for each in plan.data:
        assert each["epochs"] == pytest.approx(each["share"] * samples * LENGTH / each["tokens"])


def test_a_blend_is_drawn_as_weighed_and_its_cache_is_made_before(
    text: Text, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    position = text.flags.index("--train-data-path")
    blend = ["3", text.flags[position + 1], "1", text.short[position + 1]]
    data = ["--data-path", *blend, "--data-cache-path", str(cache)]
    flags = [*real_data(), *text.flags[:position], *data, *SPLIT.split()]
    planned = run_ranks(tmp_path / "plan", make_cache, (flags,))
    assert planned.succeeded, planned.output[-3000:]
    before = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    job = run_job(tmp_path, flags)
    assert job.succeeded, job.output[-3000:]
    assert "lm loss validation" in job.tags()
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == before
    (index,) = cache.glob("*-BlendedDataset-train-dataset_index.npy")
    drawn = np.load(index)[: STEPS * BATCH].tolist()
    assert abs(drawn.count(0) - 0.75 * len(drawn)) <= 1
