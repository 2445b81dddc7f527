"""Random models: on a random layout each is the run of one rank, with the schedule's alphas.

A few in every run of the tests, hundreds by an option, each a test of its own:

    bash tests/run.sh tests/distributed/test_random_models.py --random-models 200 --random-seed 7

Run A trains on one rank and saves on its way. Run B goes on from there on the layout, and saves.
Run C goes on from B's checkpoint on one rank. B and C must be what A was.

Where experts get an optimizer of their own, which Megatron cannot make out of that of one rank, or
turn back, B starts with a new one, is compared with a run A2 that does the same on one rank, and C
is on the layout.

Two experts may suit a token equally well, but for rounding. A model that is not the same run, and
had such a token, has shown nothing: its test is skipped, and the summary counts it.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prores.config.placement import PLACEMENTS
from megatron_prores.config.prores_config import BRANCH_INITS, OFF
from megatron_prores.schedule.formulas import SCHEDULES, alphas
from tests.distributed import faults
from tests.distributed.launch import Job, run_job
from tests.distributed.random_layouts import Layout
from tests.distributed.random_models import COMMON, RandomModel, draw_models
from tests.distributed.routing import KNIFE_EDGE, closest_choice, noting_closest_choice
from tests.distributed.test_layouts import TOLERANCE

SAVED, SAVED_AGAIN, LAST = 2, 4, 5

# Seconds of a run, which takes two to eight: a machine may have much else to do.
TIMEOUT = 120.0


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "random_model" in metafunc.fixturenames:
        number, seed = (metafunc.config.getoption(f"--random-{n}") for n in ("models", "seed"))
        ids = [f"seed{seed}-{index}" for index in range(number)]
        metafunc.parametrize("random_model", draw_models(number, seed), ids=ids)


class Runs:
    """The runs of a random model, in a directory of their own."""

    def __init__(self, model: RandomModel, directory: Path) -> None:
        self.model = model
        self.directory = directory
        self.new_optimizer = ("--no-load-optim",) if model.layout.own_optimizer else ()
        self.choices = directory / "choices"

    def one_rank(self) -> Job:
        """Run A."""
        return self._run("A", Layout(1), *self._saving("A", SAVED), prepare=self._noting())

    def one_rank_from_checkpoint(self) -> Job:
        """Run A2."""
        flags = (*self._loading("A", SAVED), *self.new_optimizer)
        return self._run("A2", Layout(1), *flags, prepare=self._noting())

    def on_layout(self, prepare: Callable[[], None] | None = None) -> Job:
        """Run B, with a fault planted by ``prepare``."""
        flags = (*self._loading("A", SAVED), *self.new_optimizer, *self._saving("B", SAVED_AGAIN))
        stop = ("--exit-interval", str(SAVED_AGAIN))
        name = "B" if prepare is None else prepare.__name__
        return self._run(name, self.model.layout, *flags, *stop, prepare=prepare)

    def again(self) -> Job:
        """Run C."""
        layout = self.model.layout if self.new_optimizer else Layout(1)
        return self._run("C", layout, *self._loading("B", SAVED_AGAIN))

    def rounding_chose_experts(self) -> bool:
        return self.choices.exists() and closest_choice(self.choices) < KNIFE_EDGE

    def _noting(self) -> Callable[[], None] | None:
        return noting_closest_choice(self.choices) if "--num-experts" in self.model.model else None

    def _saving(self, name: str, interval: int) -> tuple[str, ...]:
        return "--save", str(self.directory / f"saved{name}"), "--save-interval", str(interval)

    def _loading(self, name: str, step: int) -> tuple[str, ...]:
        return "--load", str(self.directory / f"saved{name}"), "--ckpt-step", str(step)

    def _run(
        self,
        name: str,
        layout: Layout,
        *flags: str,
        prepare: Callable[[], None] | None = None,
    ) -> Job:
        argv = [*COMMON, *self.model.model, *self.model.warmup, "--train-iters", str(LAST)]
        argv += ["--data-cache-path", str(self.directory / "cache"), *layout.flags, *flags]
        # Shown by pytest when the test fails: a person can run it again.
        print(f"\nrun {name}, {layout.ranks} ranks: pretrain_gpt_prores.py {shlex.join(argv)}")
        directory = self.directory / name
        job = run_job(directory, argv, layout.ranks, prepare=prepare, timeout=TIMEOUT)
        assert job.succeeded, f"run {name}: {job.exit_codes}\n{job.output[-3000:]}"
        return job


def assert_same_scalars(job: Job, reference: Job, first: int, last: int) -> None:
    """Compares everything that Megatron logs but times, of the steps that ``job`` has made."""
    assert job.tags() == reference.tags()
    for tag in sorted(job.tags()):
        # The same values over another axis; a count that no checkpoint keeps.
        if tag.endswith(("vs samples", "cumulative_acceptance_rate")):
            continue
        expected = {t: v for t, v in reference.scalars(tag).items() if first < t <= last}
        values = {t: v for t, v in job.scalars(tag).items() if t > first}
        assert values == pytest.approx(expected, rel=TOLERANCE), tag


def assert_alphas_of_schedule(job: Job, model: RandomModel, first: int, last: int) -> None:
    """Compares what the layers held at every step with the schedule."""
    if model.schedule == OFF:
        assert not any(job.alphas)
        return
    held = job.alphas_by_step()
    assert sorted(held) == list(range(first, last + 1))
    for iteration, by_layer in held.items():
        step = iteration * model.steps_per_iteration
        expected = alphas(model.schedule, step, model.num_layers, model.total_warmup)
        assert list(by_layer) == list(range(1, model.num_layers + 1))
        assert torch.equal(
            torch.tensor(list(by_layer.values()), dtype=torch.float32),
            torch.tensor(expected, dtype=torch.float32),
        )


def test_a_random_model_is_the_same_run_on_its_layout(
    random_model: RandomModel, tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    record_property("features", sorted(random_model.features))  # for the summary
    runs = Runs(random_model, tmp_path)
    one_rank = runs.one_rank()
    assert_alphas_of_schedule(one_rank, random_model, 0, LAST)
    if runs.new_optimizer:
        one_rank = runs.one_rank_from_checkpoint()
    on_layout = runs.on_layout()
    assert_alphas_of_schedule(on_layout, random_model, SAVED, SAVED_AGAIN)
    again = runs.again()
    assert_alphas_of_schedule(again, random_model, SAVED_AGAIN, LAST)
    try:
        assert_same_scalars(on_layout, one_rank, SAVED, SAVED_AGAIN)
        assert_same_scalars(again, one_rank, SAVED_AGAIN, LAST)
    except AssertionError:
        if runs.rounding_chose_experts():
            pytest.skip("experts that suit a token equally well")
        raise


def test_a_fault_that_no_audit_stops_makes_it_another_run(tmp_path: Path) -> None:
    models = (model for seed in count(1) for model in draw_models(60, seed))
    drawn = next(model for model in models if may_have_faults(model))
    warmup = ("--prores-schedule", "linear", "--prores-warmup-iters", "24")
    model = replace(drawn, warmup=warmup, schedule="linear", total_warmup=24, steps_per_iteration=1)
    runs = Runs(model, tmp_path)
    one_rank = runs.one_rank()
    for fault in (faults.number_layers_by_stage_unaudited, faults.forget_alpha_in_deepest_layer):
        job = runs.on_layout(fault)
        with pytest.raises(AssertionError, match=r"grad-norm|lm loss"):
            assert_same_scalars(job, one_rank, SAVED, SAVED_AGAIN)
        with pytest.raises(AssertionError):
            assert_alphas_of_schedule(job, model, SAVED, SAVED_AGAIN)


def may_have_faults(model: RandomModel) -> bool:
    """Tells whether the faults are written for a model: four layers, one chunk per rank."""
    flags = " ".join(model.layout.flags)
    cut = "--pipeline-model-parallel-size" in flags and "virtual" not in flags and "|" not in flags
    return model.num_layers == 4 and model.schedule != OFF and cut


REACHED = """
    --add-qkv-bias, --calculate-per-token-loss, --disable-bias-linear, --embedding-weight-decay,
    --group-query-attention, --kv-channels, --mtp-num-layers, --qk-layernorm, --rotary-interleaved,
    --squared-relu, --swiglu, --untie-embeddings-and-output-weights, --use-distributed-optimizer,
    --attention-backend fused, --attention-backend unfused, --softmax-type learnable,
    --softmax-type off-by-one, --normalization LayerNorm, --normalization RMSNorm,
    --position-embedding-type rope, --position-embedding-type learned_absolute,
    --position-embedding-type none, --num-experts, --moe-layer-freq, --moe-router-pre-softmax,
    --moe-router-enable-expert-bias, --moe-router-load-balancing-type aux_loss,
    --moe-router-load-balancing-type seq_aux_loss, --moe-shared-expert-intermediate-size,
    --moe-z-loss-coeff, 1 ranks, 2 ranks, 3 ranks, --overlap-grad-reduce,
    --tensor-model-parallel-size 2, --tensor-model-parallel-size 3, --sequence-parallel,
    --expert-model-parallel-size 2, --expert-model-parallel-size 3, --expert-tensor-parallel-size 1,
    --expert-tensor-parallel-size 2, --pipeline-model-parallel-size 2,
    --pipeline-model-parallel-size 3, --num-layers-per-virtual-pipeline-stage,
    --num-virtual-stages-per-pipeline-rank, --decoder-first-pipeline-num-layers,
    --decoder-last-pipeline-num-layers, --account-for-embedding-in-pipeline-split,
    --account-for-loss-in-pipeline-split, --pipeline-model-parallel-layout of 2 stages,
    --pipeline-model-parallel-layout of 6 stages, stage of E, stage of L, stage of m, stage of ,
    --recompute-granularity full, --recompute-modules core_attn, --recompute-modules mlp,
    --recompute-modules moe, --prores-warmup-iters, --prores-warmup-iters-per-layer,
    --prores-warmup-samples
"""


def test_the_draw_reaches_every_kind_of_model() -> None:
    reached = {" ".join(words.split()) for words in REACHED.split(",")}
    reached |= {f"--prores-schedule {name}" for name in (OFF, *SCHEDULES)}
    reached |= {f"--norm-placement {name}" for name in PLACEMENTS}
    reached |= {f"--branch-init {name}" for name in BRANCH_INITS}
    models = draw_models(300, 1)
    assert len(models) == 300
    drawn = {feature.strip() for model in models for feature in model.features}
    assert sorted(reached - drawn) == []


def test_the_draw_is_the_same_for_the_same_seed() -> None:
    assert draw_models(5, 1) == draw_models(5, 1)
    assert draw_models(5, 1) != draw_models(5, 2)
