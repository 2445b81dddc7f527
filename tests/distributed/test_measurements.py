"""What is measured of a run is what a plain model of the same weights has, and costs it nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_prores.convert.export import export, open_checkpoint
from megatron_prores.runs.spikes import spike_score
from tests.distributed import watched
from tests.distributed.conftest import LAST, MODEL
from tests.distributed.launch import Job, run_job

LAYERS, HIDDEN = 4, 64

# The second iteration is measured on the weights that the first one saved.
RUN = [
    *MODEL,
    *("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "250"),
    *("--make-vocab-size-divisible-by", "1", "--init-method-std", "0.15", "--train-iters", "2"),
    *("--prores-warmup-iters", "8", "--save-interval", "1", "--no-save-optim"),
]
MICRO_BATCHES = 4

# float32 in another order.
TOLERANCE = 1e-4

CASES = {
    "pre": [],
    "sandwich": ["--norm-placement", "sandwich"],
    "post": ["--norm-placement", "post"],
    "deepnorm": ["--norm-placement", "deepnorm"],
    "Megatron's own layer": ["--prores-schedule", "none"],
}

FIGURES = {
    *("residual_norm", "residual_rms", "grad_norm", "weight_norm"),
    *(f"{branch}_{name}" for branch in ("attention", "mlp") for name in ("norm", "rms", "ratio")),
}


def rms(values: list[Tensor]) -> float:
    return float(torch.cat(values).double().square().mean().sqrt())


def norm(values: list[Tensor]) -> float:
    return float(sum(each.double().square().sum() for each in values) ** 0.5)


def keep(values: list[Tensor]) -> Callable[..., None]:
    """Return a forward hook that keeps outputs."""

    def hook(module: object, given: object, output: Any) -> None:
        values.append((output[0] if isinstance(output, tuple) else output).detach())

    return hook


def reference(case: str, saved: Path, batches: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Compute every figure with the plain model of transformers that a checkpoint is.

    Its weights hold alpha: of those the gradient is alpha times, the weight one alpha-th of it.
    """
    from transformers import AutoModelForCausalLM

    source = open_checkpoint(saved, 1)
    export(source, saved / "plain", "fp32")
    model = AutoModelForCausalLM.from_pretrained(saved / "plain", trust_remote_code=True)
    layers = model.model.layers
    behind_norm = case == "sandwich"
    added: dict[tuple[str, int], list[Tensor]] = {}
    streams: dict[int, list[Tensor]] = {}
    between: dict[int, list[Tensor]] = {}
    model.model.embed_tokens.register_forward_hook(keep(streams.setdefault(0, [])))
    for number, layer in enumerate(layers, start=1):
        attention = layer.post_self_attn_layernorm if behind_norm else layer.self_attn
        mlp = layer.post_mlp_layernorm if behind_norm else layer.mlp
        attention.register_forward_hook(keep(added.setdefault(("attention", number), [])))
        mlp.register_forward_hook(keep(added.setdefault(("mlp", number), [])))
        layer.register_forward_hook(keep(streams.setdefault(number, [])))
        if case in ("post", "deepnorm"):
            between[number] = []
            layer.post_attention_layernorm.register_forward_hook(keep(between[number]))
    for tokens, labels in batches:
        logits = model(tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        (loss / len(batches)).backward()
    figures = {}
    for number, layer in enumerate(layers, start=1):
        alpha = source.alphas[number - 1]
        folded = {"post_self_attn_layernorm.weight", "post_mlp_layernorm.weight"}
        if not behind_norm:
            folded = {"self_attn.o_proj.weight", "mlp.down_proj.weight"}
        scales = {n: alpha if n in folded else 1.0 for n, _ in layer.named_parameters()}
        attention_adds, mlp_adds = added["attention", number], added["mlp", number]
        before_mlp = between.get(number) or [
            x + a for x, a in zip(streams[number - 1], attention_adds, strict=True)
        ]
        figures[f"residual_rms/layer_{number}"] = rms(streams[number])
        figures[f"attention_rms/layer_{number}"] = rms(attention_adds)
        figures[f"mlp_rms/layer_{number}"] = rms(mlp_adds)
        for name in ("residual", "attention", "mlp"):
            of_token = figures[f"{name}_rms/layer_{number}"] * HIDDEN**0.5
            figures[f"{name}_norm/layer_{number}"] = of_token
        ratio = rms(attention_adds) / rms(streams[number - 1])
        figures[f"attention_ratio/layer_{number}"] = ratio
        figures[f"mlp_ratio/layer_{number}"] = rms(mlp_adds) / rms(before_mlp)
        parameters = dict(layer.named_parameters())
        gradients = [scales[n] * p.grad for n, p in parameters.items() if p.grad is not None]
        figures[f"grad_norm/layer_{number}"] = norm(gradients)
        weights = [p.detach() / scales[n] for n, p in parameters.items()]
        figures[f"weight_norm/layer_{number}"] = norm(weights)
    return figures


@pytest.mark.parametrize("case", CASES)
def test_figures_are_those_of_a_plain_model(case: str, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    flags = [*RUN, *CASES[case], "--save", str(saved), "--log-layer-norms-interval", "2"]
    prepare = partial(watched.record, str(tmp_path))
    job = run_job(tmp_path, flags, prepare=prepare)
    assert job.succeeded, job.output[-3000:]
    batches = torch.load(tmp_path / "batches.pt")[MICRO_BATCHES : 2 * MICRO_BATCHES]
    expected = {
        (f"prores/{name}", 2): value for name, value in reference(case, saved, batches).items()
    }
    assert job.layer_norms() == pytest.approx(expected, rel=TOLERANCE)
    # Every figure differs from layer to layer: none is another layer's.
    by_figure = [[job.layer_norms()[f"prores/{name}/layer_{number}", 2] for number in range(1, 5)]
                 for name in FIGURES - {"residual_norm", "residual_rms"}]  # fmt: skip
    assert all(len(set(values)) == LAYERS for values in by_figure)
    # The layers bear stand-ins at the steps that are measured, and at no other.
    seen = [json.loads(line) for line in (tmp_path / "modules.jsonl").read_text().splitlines()]
    first, second = seen[:MICRO_BATCHES], seen[MICRO_BATCHES : 2 * MICRO_BATCHES]
    hooks = 2 * LAYERS if case == "sandwich" else 0
    assert first == [[0, 0]] * MICRO_BATCHES
    assert second == [[hooks, LAYERS]] * MICRO_BATCHES
    assert all(each == [0, 0] for each in seen[2 * MICRO_BATCHES :])  # the evaluation


def test_a_step_that_is_measured_is_the_same_step(tmp_path: Path) -> None:
    prepare = partial(watched.record, str(tmp_path))
    off, on = (
        run_job(
            tmp_path / name,
            [*RUN, "--save", str(tmp_path / name / "saved"), *flags],
            prepare=prepare,
        )
        for name, flags in (("off", []), ("on", ["--log-layer-norms-interval", "1"]))
    )
    for tag in ("lm loss", "grad-norm"):
        assert on.scalars(tag) == off.scalars(tag)
    assert off.layer_norms() == {}


def test_a_recomputed_pass_is_counted_once(tmp_path: Path) -> None:
    flags = "--recompute-granularity full --recompute-method block --recompute-num-layers 2".split()
    flags += ["--save", str(tmp_path / "saved"), "--log-layer-norms-interval", "2"]
    prepare = partial(watched.record_counts, str(tmp_path))
    job = run_job(tmp_path, [*RUN, *flags], prepare=prepare)
    assert job.succeeded, job.output[-3000:]
    # The stream before the first branch and behind each of them, and what each branch adds: of
    # every element of the global batch.
    elements = float(MICRO_BATCHES * 2 * 64 * HIDDEN)
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert counts == [elements] * (1 + 2 * LAYERS + 2 * LAYERS)


def test_every_layer_is_measured_at_every_nth_iteration(on_one_rank: Job) -> None:
    tags = {f"prores/{name}/layer_{number}" for name in FIGURES for number in range(1, LAYERS + 1)}
    assert set(on_one_rank.layer_norms()) == {(tag, at) for tag in tags for at in (3, LAST)}


# The first stage has the embedding alone, 36 numbers. Of its two data-parallel ranks the second has
# none of them in the distributed optimizer: it must not wait for weights of a step left out.
TINY = """
    --device cpu --num-layers 2 --hidden-size 4 --ffn-hidden-size 8 --num-attention-heads 1
    --seq-length 16 --max-position-embeddings 16 --micro-batch-size 2 --global-batch-size 8
    --normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --lr 1e-4 --lr-decay-style constant --log-interval 1 --eval-interval 100 --eval-iters 0
    --mock-data --tokenizer-type NullTokenizer --vocab-size 8 --make-vocab-size-divisible-by 1
    --pipeline-model-parallel-size 2 --pipeline-model-parallel-layout E|ttL
    --use-distributed-optimizer --prores-schedule none
""".split()


def test_a_spike_is_told_and_its_step_skipped_on_all_ranks(tmp_path: Path) -> None:
    iterations = 30
    flags = [*TINY, "--train-iters", str(iterations)]
    flags += ["--log-spikes", "--skip-step-above-sigmas", "7"]
    job = run_job(tmp_path, flags, ranks=4, prepare=watched.spike)
    assert job.succeeded, job.output[-3000:]
    for name in ("lm loss", "grad-norm"):
        (line,) = re.findall(rf"spike: (iteration \d+), {name} .*", job.output)
        assert line == f"iteration {watched.SPIKE}"
        curve = [*job.scalars(name).values()]
        score = spike_score(curve)
        assert score == 1 / 24  # iterations 4 to 27
        assert f"spike score: {name} {score:.4g}, 1 of 24 steps" in job.output
        running = job.scalars(f"prores/spike_score/{name}")
        assert running[watched.SPIKE - 1] == 0
        assert running[iterations] == pytest.approx(1 / iterations)
    (said,) = re.findall(r"skipped: (iteration \d+), grad-norm .* 1 skipped so far", job.output)
    assert said == f"iteration {watched.SPIKE}"
    skipped = re.findall(r"iteration +(\d+)/.*number of skipped iterations: +(\d+)", job.output)
    assert {int(at): int(many) for at, many in skipped} == {
        at: int(at == watched.SPIKE) for at in range(1, iterations + 1)
    }
    assert job.scalars("prores/skipped_steps")[iterations] == 1
    # The update that was left out would have ruined the loss that follows it.
    assert np.ptp([*job.scalars("lm loss").values()][watched.SPIKE :]) < 0.5
