"""What ranks share is started, counted and saved as the whole that it is a part of."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.distributed.conftest import MODEL, OPTIMIZER, WARMUP, loading, saving
from tests.distributed.launch import run_job
from tests.distributed.test_layouts import PP2, TOLERANCE
from tests.distributed.test_resume import tensors

MOCK = "--mock-data --tokenizer-type NullTokenizer --vocab-size 500 --num-workers 0".split()
TP2 = "--tensor-model-parallel-size 2".split()


def test_a_tied_embedding_is_saved_with_its_own_optimizer_state(tmp_path: Path) -> None:
    # Stages share it, so that its gradients are a bucket of their own. The bucket before it, of one
    # layer of these sizes, ends in padding: it is an odd multiple of 64, filled up to one of 128.
    tied = [flag for flag in MODEL if flag != "--untie-embeddings-and-output-weights"]
    sizes = "--hidden-size 72 --group-query-attention --num-query-groups 2"
    first = "--decoder-first-pipeline-num-layers 1"
    argv = [*tied, *sizes.split(), *MOCK, *WARMUP, *OPTIMIZER, *PP2.split(), *first.split()]
    argv += saving(tmp_path / "saved")
    job = run_job(tmp_path / "job", argv, ranks=2)
    assert job.succeeded, job.output[-3000:]
    saved = tensors(tmp_path / "saved" / "iter_0000002")
    prefix = "optimizer.state.param."
    weights = [name.removeprefix(prefix) for name in saved if name.startswith(prefix)]
    assert "embedding.word_embeddings.weight" in weights
    for name in weights:
        # In float32 the optimizer has no other weights than the model.
        assert saved[prefix + name].flatten().equal(saved[name].flatten()), name


def test_deepnorm_starts_queries_keys_and_values_that_ranks_share(tmp_path: Path) -> None:
    groups = "--group-query-attention --num-query-groups 1 --norm-placement deepnorm".split()
    still = "--train-iters 1 --lr 1e-30 --save-interval 1".split()
    argv = [*MODEL, *MOCK, *WARMUP, *OPTIMIZER, *TP2, *groups, *still]
    job = run_job(tmp_path / "job", [*argv, "--save", str(tmp_path / "saved")], ranks=2)
    assert job.succeeded, job.output[-3000:]
    saved = tensors(tmp_path / "saved" / "iter_0000001")
    # [layer, row, h]: 64 rows of queries, 16 of the key, 16 of the value.
    query, key, value = saved["decoder.layers.self_attention.linear_qkv.weight"].split(
        (64, 16, 16), dim=1
    )
    gain = (8 * 4) ** -0.25
    assert query.std().item() == pytest.approx(math.sqrt(2 / (64 + 64)), rel=0.05)
    assert key.std().item() == pytest.approx(math.sqrt(2 / (64 + 16)), rel=0.05)
    assert value.std().item() == pytest.approx(gain * math.sqrt(2 / (64 + 16)), rel=0.05)


def test_learnable_offsets_of_the_softmax_count_on_every_tensor_rank(tmp_path: Path) -> None:
    # As few other weights as can be.
    small = "--hidden-size 8 --ffn-hidden-size 8 --vocab-size 60 --make-vocab-size-divisible-by 32"
    model = [*MODEL, *MOCK, *WARMUP, *OPTIMIZER, *small.split(), "--softmax-type", "learnable"]
    model += ["--init-method-std", "0.5", "--log-params-norm"]
    saved = run_job(tmp_path / "save", [*model, *saving(tmp_path / "saved")])
    assert saved.succeeded, saved.output[-3000:]
    load = [*model, *loading(tmp_path / "saved"), "--exit-interval", "3"]
    one, two = run_job(tmp_path / "one", load), run_job(tmp_path / "two", [*load, *TP2], ranks=2)
    assert one.succeeded, one.output[-3000:]
    assert two.succeeded, two.output[-3000:]
    for tag in ("params-norm", "grad-norm"):
        assert two.scalars(tag) == pytest.approx(one.scalars(tag), rel=TOLERANCE), tag
