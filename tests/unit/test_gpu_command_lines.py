"""Command lines for GPUs, planned without one: those of the GPU tests work, wrong ones do not."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from megatron_prores.config.placement import PLACEMENTS
from tests.distributed.launch import REPOSITORY
from tests.gpu.command_lines import BF16, FP8, GRAPHS, LOCAL, TE, command_lines

OVERLAP = "--tensor-model-parallel-size 2 --sequence-parallel --tp-comm-overlap"

CONTEXT = "--context-parallel-size 2 --tensor-model-parallel-size 4 --sequence-parallel"
EXPERTS = """
    --num-experts 4 --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall
    --overlap-moe-expert-parallel-comm
"""

GOOD = {
    **command_lines(),
    **{f"graph, {name}": f"{BF16} {flags}" for name, flags in GRAPHS.items()},
    **{
        f"{placement}, tensor-parallel communication overlaps": f"{BF16} {OVERLAP} "
        f"--norm-placement {placement}"
        for placement in PLACEMENTS
    },
    "FP8, tensor-parallel communication overlaps": f"{BF16} {OVERLAP} {FP8['tensorwise']}",
}

WRONG = {
    f"{BF16} {FP8['tensorwise']} --ffn-hidden-size 1368": ("--ffn-hidden-size 1368", "16", "1376"),
    f"{BF16} {FP8['mxfp8']} --hidden-size 144 --num-attention-heads 6": ("--hidden-size 144", "32"),
    f"{BF16} {FP8['delayed']} --first-last-layers-bf16": ("Delayed scaling", "BF16"),
    f"{BF16} --fp8-param-gather --use-distributed-optimizer": ("fp8",),
    f"{LOCAL} --bf16 {FP8['tensorwise']}": ("--fp8-format", "--transformer-impl local"),
    f"{LOCAL} --bf16 --cuda-graph-impl local": ("--te-rng-tracker",),
    f"{LOCAL} {OVERLAP}": ("--tp-comm-overlap", "--transformer-impl local"),
    f"{BF16} --cuda-graph-impl full_iteration": ("--no-check-for-nan-in-loss-and-grad",),
    f"{BF16} {GRAPHS['full_iteration']} --check-for-spiky-loss": ("--check-for-spiky-loss",),
    f"{BF16} {GRAPHS['full_iteration']} --timing-log-level 2": ("--timing-log-level 2",),
    f"{BF16} --norm-placement post --use-transformer-engine-op-fuser": (
        "--use-transformer-engine-op-fuser",
    ),
    f"{BF16} --fused-residual-rmsnorm": ("--fused-residual-rmsnorm",),
    f"{BF16} {EXPERTS} --norm-placement sandwich": ("--overlap-moe-expert-parallel-comm",),
    f"{TE} --cross-entropy-loss-fusion": ("--cross-entropy-loss-fusion", "--bf16", "bfloat16"),
    f"{BF16} --manual-gc-interval -1": ("--manual-gc-interval -1", "negative"),
    f"{BF16} --seq-length 124 {CONTEXT}": ("--seq-length 124", "--context-parallel-size 2 times"),
}

WARNED = f"{BF16} --img-h 32 --optimizer sgd --reset-position-ids"

CODE = r"""
import json, math, re, sys
from megatron_prores.errors import UserError
from megatron_prores.plan.planner import make_plan
refused, warnings = {}, {}
for line in json.load(sys.stdin):
    try:
        sizes = [int(n) for n in re.findall(r"--(?:tensor|context)\S*-parallel-size (.)", line)]
        plan = make_plan(line.split(), math.prod(sizes))
        warnings[line] = plan.warnings
    except UserError as error:
        refused[line] = str(error)
print("REFUSED", json.dumps([refused, warnings]))
"""


@pytest.fixture(scope="module")
def planned() -> tuple[dict[str, str], dict[str, list[str]]]:
    """Plans all of them in one process: command line -> why it is refused, or its warnings."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE],
        input=json.dumps([*GOOD.values(), *WRONG, WARNED]),
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("REFUSED")]
    refused, warnings = json.loads(line.removeprefix("REFUSED"))
    return refused, warnings


@pytest.fixture(scope="module")
def refused(planned: tuple[dict[str, str], dict[str, list[str]]]) -> dict[str, str]:
    return planned[0]


@pytest.mark.parametrize("name", GOOD)
def test_it_can_be_planned(name: str, refused: dict[str, str]) -> None:
    assert refused.get(GOOD[name]) is None


@pytest.mark.parametrize("line", WRONG, ids=[" ".join(words) for words in WRONG.values()])
def test_it_is_refused(line: str, refused: dict[str, str]) -> None:
    assert line in refused
    assert all(word in refused[line] for word in WRONG[line])
    assert "\n" not in refused[line]


def test_a_plan_says_what_has_no_effect_and_what_nobody_has_tried(
    planned: tuple[dict[str, str], dict[str, list[str]]],
) -> None:
    said = planned[1][WARNED]
    for words in (
        "--img-h has no effect in pretrain_gpt_prores.py: it belongs to vision models",
        "--optimizer is untried: no other optimizer than adam has trained a ProRes model yet",
        "--reset-position-ids has no effect with --position-embedding-type rope",
    ):
        assert any(line.startswith(words) for line in said), said
