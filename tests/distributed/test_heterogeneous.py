"""Heterogeneous models: layers with a branch left out, or replaced by a linear layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.conftest import MEASURED, MODEL, OPTIMIZER, Text, loading, saving
from tests.distributed.launch import Job, run_job
from tests.distributed.test_layouts import NORM_TOLERANCE, TOLERANCE
from tests.distributed.test_plan import planned

LEFT_OUT: dict[str, object] = {"no_op": True}
LINEAR: dict[str, object] = {"replace_with_linear": True}
ATTENTION: dict[str, object] = {"n_heads_in_group": 2}

WARMUP = "--prores-schedule linear --prores-warmup-iters 24".split()

LAYOUTS = {
    "TP2": "--tensor-model-parallel-size 2",
    "PP2": "--pipeline-model-parallel-size 2",
}


def write_blocks(path: Path, blocks: list[tuple[dict[str, object], dict[str, object]]]) -> Path:
    """Writes the file of ``--heterogeneous-layers-config-path``, in Nemotron's format."""
    model = {
        "hidden_act": "silu",
        "num_hidden_layers": len(blocks),
        "hidden_size": 64,
        "num_attention_heads": 4,
        "tie_word_embeddings": False,
        "rope_theta": 10000,
        "rope_scaling": {"factor": 8.0},
    }
    described = [
        {"attention": {"n_heads_in_group": None} | attention, "ffn": {"ffn_mult": None} | mlp}
        for attention, mlp in blocks
    ]
    path.mkdir(exist_ok=True)
    file = path / "blocks.json"
    file.write_text(json.dumps(model | {"block_configs": described}))
    return file


def wide(factor: float) -> dict[str, object]:
    return {"ffn_mult": factor}  # the width is the next multiple of 256


FLAGS = [
    *MODEL,
    *"--norm-epsilon 1e-5 --group-query-attention --num-query-groups 2".split(),
    *"--use-rope-scaling --rope-scaling-factor 8 --use-rotary-position-embeddings".split(),
]

MIXED = [
    (ATTENTION, wide(2.0)),
    (LEFT_OUT, wide(8.0)),
    (ATTENTION, LEFT_OUT),
    (LINEAR, LINEAR),
]


def run(directory: Path, argv: list[str], ranks: int = 1) -> Job:
    job = run_job(directory, argv, ranks)
    assert job.succeeded, job.output[-3000:]
    return job


def layer_map(job: Job) -> list[str]:
    """Reads from a run's log which stage holds which layer."""
    mark = "> ProRes: "
    lines = [line for line in job.output.splitlines() if line.startswith(mark)]
    return [line.removeprefix(mark) for line in lines[1:]]


@pytest.mark.parametrize("placement", ["pre", "sandwich", "post", "lns"])
def test_same_run_on_every_layout(placement: str, text: Text, tmp_path: Path) -> None:
    blocks = write_blocks(tmp_path, MIXED)
    flags = [*FLAGS, *text.flags, *OPTIMIZER, *WARMUP, "--norm-placement", placement]
    flags += ["--heterogeneous-layers-config-path", str(blocks)]
    run(tmp_path / "save", [*flags, *saving(tmp_path / "saved")])
    load = [*flags, *loading(tmp_path / "saved")]
    alone = run(tmp_path / "alone", [*load, *MEASURED])
    assert all(list(held) == [1, 2, 3, 4] for held in alone.alphas_by_step().values())
    plans = planned(
        {name: ([*load, *layout.split()], 2) for name, layout in LAYOUTS.items()},
        tmp_path / "plans",
    )
    for name, layout in LAYOUTS.items():
        job = run(tmp_path / name, [*load, *MEASURED, *layout.split()], ranks=2)
        assert job.alphas_by_step() == alone.alphas_by_step()
        assert plans[name]["layer_map"].splitlines() == layer_map(job)
        for tag in ("lm loss", "grad-norm", "lm loss validation"):
            assert job.scalars(tag) == pytest.approx(alone.scalars(tag), rel=TOLERANCE), tag
        assert job.layer_norms() == pytest.approx(alone.layer_norms(), rel=NORM_TOLERANCE)


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_a_layer_without_branches_is_the_identity(
    placement: str, text: Text, tmp_path: Path
) -> None:
    flags = [*FLAGS, *text.flags, "--norm-placement", placement, "--train-iters", "3", *MEASURED]
    whole = (ATTENTION, wide(2.0))
    jobs = {}
    for name, between in {"with": [(LEFT_OUT, LEFT_OUT)], "without": []}.items():
        blocks = [whole, *between, whole]
        argv = [*flags, "--prores-schedule", f"file:{half_open(tmp_path / name, len(blocks))}"]
        file = write_blocks(tmp_path / name, blocks)
        argv += ["--heterogeneous-layers-config-path", str(file)]
        argv[argv.index("--num-layers") + 1] = str(len(blocks))
        jobs[name] = run(tmp_path / name / "run", argv)
    losses = {name: job.scalars("lm loss") for name, job in jobs.items()}
    assert losses["with"] == pytest.approx(losses["without"], rel=TOLERANCE)
    measured = jobs["with"].layer_norms()
    empty = {tag: value for (tag, _), value in measured.items() if tag.endswith("/layer_2")}
    for name in ("residual_norm", "residual_rms"):
        assert empty.pop(f"prores/{name}/layer_2") == measured[f"prores/{name}/layer_1", 3]
    assert set(empty.values()) == {0.0}
    others = {
        (tag.replace("layer_3", "layer_2"), at): value
        for (tag, at), value in measured.items()
        if not tag.endswith("/layer_2")
    }
    assert others == pytest.approx(jobs["without"].layer_norms(), rel=NORM_TOLERANCE)


def half_open(path: Path, layers: int) -> Path:
    """Writes a schedule that holds every layer at a half."""
    path.mkdir()
    rows = [["step", *range(1, layers + 1)], [0, *[0.5] * layers], [100, *[0.5] * layers]]
    (path / "alpha.csv").write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    return path / "alpha.csv"


NO_LINEAR = [*MIXED[:3], MIXED[0]]

CANNOT_RUN = {
    "DeepNorm's gains are not defined": (1, "--norm-placement deepnorm"),
    "Megatron cannot run with --sequence-parallel": (
        2,
        "--tensor-model-parallel-size 2 --sequence-parallel",
    ),
    "cannot be used with virtual pipeline stages": (
        2,
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    ),
}


@pytest.mark.parametrize("complaint", CANNOT_RUN)
def test_what_cannot_run_is_refused(complaint: str, text: Text, tmp_path: Path) -> None:
    ranks, flags = CANNOT_RUN[complaint]
    argv = [*FLAGS, *text.flags, *flags.split(), "--train-iters", "2"]
    argv += ["--heterogeneous-layers-config-path"]
    job = run_job(tmp_path / "refused", [*argv, str(write_blocks(tmp_path, MIXED))], ranks)
    assert job.exit_codes == [2] * ranks
    assert complaint in job.output
    assert "Traceback" not in job.output
    plan = planned({"plan": ([*argv, str(tmp_path / "blocks.json")], ranks)}, tmp_path / "plan")
    assert complaint in plan["plan"]["error"]
    if "virtual" not in complaint:
        assert "the attention of layer 4 is a linear layer" in job.output
        run(tmp_path / "trained", [*argv, str(write_blocks(tmp_path, NO_LINEAR))], ranks)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "no such file"),
        ("{}", "hidden_act"),
        ("[1", "delimiter"),
    ],
)
def test_a_file_that_is_no_description_is_refused(
    content: str | None, complaint: str, text: Text, tmp_path: Path
) -> None:
    file = tmp_path / "blocks.json"
    if content is not None:
        file.write_text(content)
    argv = [*FLAGS, *text.flags, "--train-iters", "2"]
    job = run_job(tmp_path / "job", [*argv, "--heterogeneous-layers-config-path", str(file)])
    assert job.exit_codes == [2]
    assert f"--heterogeneous-layers-config-path {file}" in job.output
    assert complaint in job.output
    assert "Traceback" not in job.output
