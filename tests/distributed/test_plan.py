"""The planner says what the program does: its table, its parameters, its refusals."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import faults
from tests.distributed.launch import Job, run_job, run_ranks
from tests.distributed.test_hybrid import MIXED, MIXED_FLAGS
from tests.refusals import command_line, listing, prepare_files, shown_difference
from tests.wrong_invocations import MAIN, MOCK, ROWS, Row

# ---- The same table, the same parameters as a real run ------------------------------------------

# At step 0 of this schedule every layer has another alpha.
REAL = f"{MOCK} --prores-schedule stagewise_sqrt_l --prores-warmup-iters 8"

LAYOUTS = {
    "virtual stages": ("--pipeline-model-parallel-size 2 --num-layers 8 --global-batch-size 2 "
                       "--num-virtual-stages-per-pipeline-rank 2", 2),
    "uneven stages": ("--pipeline-model-parallel-size 3 --num-layers 6 --global-batch-size 2 "
                      "--decoder-first-pipeline-num-layers 1 "
                      "--decoder-last-pipeline-num-layers 2 --swiglu", 3),
    "tensor and data ranks, in samples": ("--tensor-model-parallel-size 2 --global-batch-size 4 "
                                          "--untie-embeddings-and-output-weights "
                                          "--position-embedding-type rope", 4),
    "a prediction layer in a layout": (
                      "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Ettt|tmL "
                      "--mtp-num-layers 1 --global-batch-size 2 --position-embedding-type rope", 2),
    # The second of three blocks is on both stages, which are uneven.
    "a hybrid model": (f"--num-layers 6 --hybrid-layer-pattern {MIXED} {MIXED_FLAGS} "
                       "--disable-bias-linear --global-batch-size 2 "
                       "--position-embedding-type rope", 2),
}  # fmt: skip


type Requests = dict[str, tuple[list[str], int]]
"""Command lines and world sizes, by name."""


def show_table() -> None:
    """Lets rank 0 of a run print the table of its audit, which it draws only for a fault."""
    from megatron_prores.warmup import audit

    stock = audit.find_faults

    def find_faults(reports: Any, alphas: Any, depths: Any) -> Any:
        if os.environ["RANK"] == "0":
            print("TABLE", json.dumps(audit.table(reports)), flush=True)
        return stock(reports, alphas, depths)

    audit.find_faults = find_faults


def make_plans(
    requests: Requests, output: str, cwd: str, plant: Callable[[], None] | None = None
) -> None:
    """Plans one command line after the other in this process, with a fault planted if asked."""
    from megatron_prores.errors import StopRun
    from megatron_prores.plan.planner import make_plan

    os.chdir(cwd)
    if plant is not None:
        plant()
    results = {}
    for name, (argv, world_size) in requests.items():
        try:
            results[name] = make_plan(argv, world_size).as_dict()
        except StopRun as reason:
            results[name] = {"error": reason.message(), "code": reason.exit_code}
    Path(output).write_text(json.dumps(results))


def planned(
    requests: Requests, directory: Path, plant: Callable[[], None] | None = None
) -> dict[str, Any]:
    """Gives the plans of command lines, made in one process that has Megatron imported."""
    (directory / "cwd").mkdir(parents=True)
    output = directory / "plans.json"
    args = (requests, str(output), str(directory / "cwd"), plant)
    job = run_ranks(directory / "logs", make_plans, args, timeout=800)
    assert job.succeeded, job.output[-3000:]
    assert list((directory / "cwd").iterdir()) == []
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    requests = {
        name: (shlex.split(f"{REAL} {flags}"), ranks) for name, (flags, ranks) in LAYOUTS.items()
    }
    return planned(requests, tmp_path_factory.mktemp("layouts"))


def logged_map(job: Job) -> str:
    lines = [line for line in job.output.splitlines() if line.startswith("> ProRes: ")]
    return "\n".join(line.removeprefix("> ProRes: ") for line in lines[1:])


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_plan_is_what_the_audit_of_a_real_run_finds(
    name: str, plans: dict[str, Any], tmp_path: Path
) -> None:
    flags, ranks = LAYOUTS[name]
    job = run_job(tmp_path, shlex.split(f"{REAL} {flags}"), ranks, prepare=show_table)
    assert job.succeeded, job.output[-3000:]
    plan = plans[name]
    (table,) = re.findall(r"^TABLE (.*)$", job.output, re.MULTILINE)
    assert plan["table"] == json.loads(table)
    assert len(plan["table"].splitlines()) > ranks
    assert plan["layer_map"] == logged_map(job)
    shared = name == "a hybrid model"
    assert plan["layer_map"].count("\n") == plan["model"]["layers"] + shared
    # "> number of parameters on (tensor, gtp_remat, pipeline) model parallel rank (0, 0, 1): 99"
    counts = re.findall(r"model parallel rank \((\d+), \d+, (\d+)\): (\d+)", job.output)
    assert counts
    for _, stage, count in counts:
        assert plan["parameters"]["per_rank"][int(stage)] == int(count)


def count_from_the_stage() -> None:
    """Each of two pipeline stages counts its two layers from 1."""
    from megatron_prores.model.layer import ProResLayerMixin

    ProResLayerMixin.prores_layer = property(lambda layer: (layer.layer_number - 1) % 2 + 1)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (count_from_the_stage, "layer 1 is held by 0, 1"),
        (faults.forget_alpha_in_deepest_layer, "alpha of layer 4 is 1, not"),
    ],
)
def test_a_fault_that_the_audit_finds_is_found_in_the_plan(
    fault: Callable[[], None], words: str, tmp_path: Path
) -> None:
    argv = shlex.split(f"{REAL} --pipeline-model-parallel-size 2")
    result = planned({"faulty": (argv, 2)}, tmp_path, fault)["faulty"]
    assert "would be stopped by its audit" in result["error"]
    assert words in result["error"]


def test_groups_that_do_not_fit_together_are_found() -> None:
    from megatron_prores.plan.groups import LayoutError, _check_partition, _check_same

    groups = {"TENSOR": [[0, 1], [2, 3]], "EMBEDDING_GROUP": [[0, 3]]}
    _check_partition(groups, 4)
    _check_same(groups, {kind: list(each) for kind, each in groups.items()}, 3)
    for wrong in ([[0, 1], [2]], [[0, 1], [1, 2, 3]]):
        with pytest.raises(LayoutError, match="TENSOR"):
            _check_partition({"TENSOR": wrong}, 4)
    with pytest.raises(LayoutError, match="rank 3 makes other groups"):
        _check_same(groups, {"TENSOR": [[0, 2], [1, 3]], "EMBEDDING_GROUP": [[0, 3]]}, 3)


# ---- The same refusals ---------------------------------------------------------------------------

# What is missing here may be there: these rows are planned, with a note that says so.
NOTES = {
    "no GPU and no --device cpu": "packages that must be installed there, and are not here: "
    "transformer_engine",
    "data that is not there": "--data-path /nowhere/text_document: not here",
    "tokenizer model that is not there": "tokenizer /nowhere/pieces.model: not here",
    "unknown optimizer": "emerging_optimizers",
    "no directory of checkpoints, and one is wanted": "/nowhere/saved: not here",
    "no checkpoint to finetune": "/nowhere/saved: not here",
    "no checkpoint to evaluate": "/nowhere/saved: not here",
}

# Refused by what only a run does: taking hold of --save.
_AT_RUN_TIME = ("save where nothing can be written",)


def is_about_flags(row: Row) -> bool:
    """Leaves out the launcher's environment, which the planner makes, and stored checkpoints."""
    stored = ("{w}/saved ", "{w}/astray", "{w}/babble", "{w}/cut_saved", "{w}/old")
    return (
        row.program == MAIN
        and not row.environment.keys() & {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"}
        and not any(path in f"{row.argv} " for path in stored)
        and row.name not in _AT_RUN_TIME
    )


FLAG_ROWS = [row for row in ROWS if is_about_flags(row)]


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("refusals")
    files = directory / "files"
    files.mkdir()
    prepare_files(files)
    before = listing(files)
    results = planned(
        {row.name: (command_line(row, files), row.ranks) for row in FLAG_ROWS}, directory / "plans"
    )
    assert shown_difference(before, listing(files)) == []
    return results


def test_the_planners_refusals_are_the_programs_refusals(refusals: dict[str, Any]) -> None:
    assert len(FLAG_ROWS) > 130
    others = {}
    for row in FLAG_ROWS:
        result = refusals[row.name]
        error = result.get("error", "")
        told = "\n" not in error and all(word in error for word in row.words)
        if row.name not in NOTES and not (told and result.get("code") == 2):
            others[row.name] = error or "planned"
    assert others == {}


@pytest.mark.parametrize("name", NOTES)
def test_what_may_be_there_is_a_note(name: str, refusals: dict[str, Any]) -> None:
    notes = refusals[name].get("notes", [])
    assert any(NOTES[name] in note for note in notes), refusals[name].get("error", notes)


# ---- What only GPUs have, and what a plan adds ---------------------------------------------------

LLAMA = """
    --num-layers 8 --hidden-size 512 --ffn-hidden-size 1376 --num-attention-heads 8
    --seq-length 1024 --max-position-embeddings 1024 --normalization RMSNorm --swiglu
    --disable-bias-linear --position-embedding-type rope --untie-embeddings-and-output-weights
    --micro-batch-size 2 --train-iters 10000 --lr 2e-3 --eval-interval 1000 --eval-iters 10
    --mock-data --tokenizer-type NullTokenizer --vocab-size 32000 --bf16
"""
EMBEDDINGS = 2 * 32000 * 512
LAYER = 4 * 512 * 512 + 3 * 512 * 1376 + 2 * 512
TOTAL = EMBEDDINGS + 8 * LAYER + 512
BATCH = "--global-batch-size 512"

OF_GPUS = {
    "plain": (BATCH, 1, TOTAL),
    "plain again": (BATCH, 1, TOTAL),
    "fp8": (f"{BATCH} --fp8-format hybrid --fp8-recipe tensorwise", 8, TOTAL),
    "cuda graph": (f"{BATCH} --cuda-graph-impl local --te-rng-tracker", 8, TOTAL),
    "context": (f"{BATCH} --context-parallel-size 2 --tensor-model-parallel-size 2 "
                "--sequence-parallel --use-distributed-optimizer", 16, TOTAL),
    "experts": (f"{BATCH} --num-experts 8 --expert-model-parallel-size 4 --moe-router-topk 2 "
                "--moe-grouped-gemm --moe-permute-fusion --moe-token-dispatcher-type alltoall "
                "--tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer",
                16, TOTAL + 8 * (7 * 3 * 512 * 1376 + 8 * 512)),
    "latent attention": (f"{BATCH} --multi-latent-attention --q-lora-rank 128 --kv-lora-rank 64 "
                         "--qk-head-dim 64 --qk-pos-emb-head-dim 32 --v-head-dim 64 "
                         "--qk-layernorm --no-rope-fusion", 4, 54011904),
    "sandwich": (f"{BATCH} --norm-placement sandwich", 2, TOTAL + 8 * 2 * 512),
    "tied": (f"{BATCH} --pipeline-model-parallel-size 2", 2, TOTAL - EMBEDDINGS // 2),
    "without ProRes": (f"{BATCH} --prores-schedule none --tensor-model-parallel-size 2 "
                       "--sequence-parallel --pipeline-model-parallel-size 4 "
                       "--num-virtual-stages-per-pipeline-rank 2", 8, TOTAL),
    "samples": (f"{BATCH} --prores-warmup-samples 2000000", 8, TOTAL),
    "growing batch": ("--step-batch-size-schedule 0:64,1M:256,10M:500 "
                      "--prores-warmup-samples 16000", 8, TOTAL),
    "long warmup": ("--global-batch-size 520 --train-iters 2500 --prores-schedule equal "
                    "--save /nowhere/saved --save-interval 500 --pipeline-model-parallel-size 4 "
                    "--num-virtual-stages-per-pipeline-rank 2", 8, TOTAL),
    "names only": (f"{BATCH} --tokenizer-type HuggingFaceTokenizer --tokenizer-model some/model "
                   "--wandb-project p --wandb-exp-name e --wandb-save-dir /proc/wandb "
                   "--tensorboard-dir tensorboard --save saved --save-interval 9", 1, TOTAL),
    "hybrid": (f"{BATCH} --hybrid-layer-pattern {'*-*-|' * 3}*-*- "
               "--pipeline-model-parallel-size 2", 2, TOTAL),
    # Of Mamba: the way in (gate, x, B, C, dt), convolution, A, D, dt, norm, and the way out. Of the
    # gated delta net: the way in (q, k, v, gate, beta, alpha), convolution, A, dt, norm, way out.
    "mamba": (f"{BATCH} --hybrid-layer-pattern {'M-*-' * 4}/*- --mamba-num-groups 8 "
              "--pipeline-model-parallel-size 2", 2,
              TOTAL - 4 * 4 * 512 * 512 + 4 * (512 * (2 * 1024 + 2 * 8 * 128 + 16)
              + 5 * (1024 + 2 * 8 * 128) + 3 * 16 + 1024 + 1024 * 512)
              + LAYER + 2 * 512 * 512 + 3 * 512),
    "gated delta net": (f"{BATCH} --hybrid-layer-pattern {'G-' * 8} --linear-num-key-heads 4 "
                        "--linear-num-value-heads 4 --linear-key-head-dim 64 "
                        "--linear-value-head-dim 64 --linear-conv-kernel-dim 4", 1,
                        TOTAL - 8 * 4 * 512 * 512 + 8 * (512 * (4 * 256 + 8) + 4 * 3 * 256 + 2 * 4
                        + 64 + 256 * 512)),
}  # fmt: skip


@pytest.fixture(scope="module")
def gpu_plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    requests = {}
    for name, (flags, ranks, _) in OF_GPUS.items():
        base = (
            LLAMA.replace("--untie-embeddings-and-output-weights", "") if name == "tied" else LLAMA
        )
        if "--hybrid-layer-pattern" in flags:
            base = base.replace("--num-layers 8", "")
        requests[name] = (shlex.split(f"{base} {flags}"), ranks)
    results = planned(requests, tmp_path_factory.mktemp("gpus"))
    for name, result in results.items():
        assert "error" not in result, (name, result)
    return results


@pytest.mark.parametrize("name", OF_GPUS)
def test_parameters_are_those_of_the_model_whatever_the_layout(
    name: str, gpu_plans: dict[str, Any]
) -> None:
    plan = gpu_plans[name]
    assert plan["parameters"]["unpadded"] == OF_GPUS[name][2]
    held = [layer for stage in plan["stages"] for layer in stage["layers"]]
    assert sorted(held) == list(range(1, 9))


def test_a_process_can_plan_more_than_once(gpu_plans: dict[str, Any]) -> None:
    assert gpu_plans["plain"] == gpu_plans["plain again"]


def test_the_optimizer_is_sharded_over_the_ranks_that_share_it(gpu_plans: dict[str, Any]) -> None:
    # Moments and main weights in float32: 12 bytes a parameter, over 4 data x 2 context ranks.
    plan = gpu_plans["context"]
    assert plan["layout"]["data"] == 4
    assert plan["memory"]["stages"][0]["optimizer"] == 12 * (plan["parameters"]["per_rank"][0] // 8)
    # Megatron's own report divides by the data ranks alone.
    assert plan["memory"]["upstream_weights_and_optimizer"] == pytest.approx(
        9 * plan["parameters"]["per_rank"][0], rel=0.01
    )
    experts = gpu_plans["experts"]
    dense = experts["parameters"]["per_rank"][0] - experts["parameters"]["per_rank_experts"][0]
    assert experts["memory"]["stages"][0]["optimizer"] == pytest.approx(
        12 * (dense / 8 + experts["parameters"]["per_rank_experts"][0] / 2), rel=1e-6
    )


@pytest.mark.parametrize("name", ["plain", "fp8", "experts", "latent attention", "tied", "sandwich",
                                  "without ProRes", "long warmup"])  # fmt: skip
def test_the_parts_of_memory_add_up_to_megatrons_report(
    name: str, gpu_plans: dict[str, Any]
) -> None:
    """Where its assumptions hold: bf16, Adam, even stages, one context parallel rank."""
    memory = gpu_plans[name]["memory"]
    stage = memory["stages"][memory["fullest_stage"]]
    parts = stage["weights"] + stage["gradients"] + stage["optimizer"]
    assert parts == pytest.approx(memory["upstream_weights_and_optimizer"], rel=1e-3)
    assert memory["fullest_total"] == parts + memory["upstream_activations"]


def test_layers_open_in_steps_samples_and_tokens(gpu_plans: dict[str, Any]) -> None:
    plan = gpu_plans["samples"]
    last = plan["layers"][-1]
    assert last["opens_after_step"] == 3907  # 2,000,000 / 512, rounded up
    assert last["opens_after_tokens"] == 3907 * 512 * 1024
    growing = gpu_plans["growing batch"]
    # 976 samples (1M tokens) in 16 steps of 64, then 256 until 9765 samples, then 500.
    assert [phase["first_step"] for phase in growing["training"]["batch_phases"]] == [0, 16, 51]
    assert growing["layers"][-1]["opens_after_step"] == 64
    assert growing["training"]["samples"] == 16 * 64 + 35 * 256 + (10000 - 51) * 500


def test_warnings_name_what_to_change(gpu_plans: dict[str, Any]) -> None:
    assert gpu_plans["plain"]["warnings"] == []
    said = "\n".join(gpu_plans["long warmup"]["warnings"])
    assert "8 of 8 layers never open fully" in said
    assert "2 evaluations, from step 1000 on, come before any layer is fully open" in said
    # 520 = 2 data ranks x micro batch 2 x 130, which 4 pipeline ranks do not divide.
    assert "130 micro-batches, which do not divide by the 4" in said
    (uneven,) = gpu_plans["growing batch"]["warnings"]
    assert "from step 51 on the batch is 500" in uneven


def test_notes_tell_what_was_taken_as_given(gpu_plans: dict[str, Any]) -> None:
    said = "\n".join(gpu_plans["names only"]["notes"])
    assert "tokenizer some/model: not here; the vocabulary is that of --vocab-size 32000" in said
    assert "built from Megatron's local spec" in said
    assert "compute capability 9.0" in said
    assert "CUDA_DEVICE_MAX_CONNECTIONS=1" in "\n".join(gpu_plans["context"]["notes"])
