"""A distributed optimizer goes on only where its parameters lie in the same order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_prores.command_line.saved_run import SavedRun, _check_optimizer_layout
from megatron_prores.command_line.setup_checks import _check_experts_optimizer
from megatron_prores.errors import UserError


def run_of(**changes: Any) -> SimpleNamespace:
    values: dict[str, Any] = {
        "use_distributed_optimizer": True,
        "dist_ckpt_optim_fully_reshardable": False,
        "no_load_optim": None,
        "skip_train": False,
        "use_checkpoint_args": False,
        "transformer_impl": "local",
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "num_virtual_stages_per_pipeline_rank": None,
        "num_layers_per_virtual_pipeline_stage": None,
    }
    return SimpleNamespace(**values | changes)


def check(there: dict[str, Any], here: dict[str, Any]) -> None:
    saved: Any = SavedRun("saved/iter_0000004", 4, run_of(**there))
    _check_optimizer_layout(run_of(**here), saved)


OTHER = [
    {"transformer_impl": "transformer_engine"},
    {"tensor_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2},
]


@pytest.mark.parametrize("other", OTHER)
def test_another_order_is_refused(other: dict[str, Any]) -> None:
    ((name, value),) = other.items()
    flag = "--" + name.replace("_", "-")
    with pytest.raises(UserError, match=f"{flag} .* lays it out, and this run has {value}"):
        check({}, other)


@pytest.mark.parametrize("other", OTHER)
def test_what_does_not_depend_on_it_is_not(other: dict[str, Any]) -> None:
    check({"dist_ckpt_optim_fully_reshardable": True}, other)
    check({"use_distributed_optimizer": False}, other)
    check({}, other | {"no_load_optim": True})
    check({}, other | {"skip_train": True})


def test_the_layout_that_a_checkpoint_brings_is_not_compared() -> None:
    brought = {"use_checkpoint_args": True}
    check({"tensor_model_parallel_size": 2}, brought)
    with pytest.raises(UserError, match="--transformer-impl"):
        check({"transformer_impl": "transformer_engine"}, brought)


EXPERTS_APART = [{"expert_model_parallel_size": 2}, {"expert_tensor_parallel_size": 2}]


def check_experts(there: dict[str, Any], here: dict[str, Any]) -> None:
    experts = {"num_experts": 4, "expert_model_parallel_size": 1, "finetune": False}
    saved: Any = SavedRun("saved/iter_0000004", 4, run_of(**experts | there))
    args: Any = run_of(**experts | here)
    _check_experts_optimizer(args, saved)


@pytest.mark.parametrize("apart", EXPERTS_APART)
def test_the_optimizer_of_experts_is_not_made_out_of_another_or_turned_back(
    apart: dict[str, Any],
) -> None:
    for there, here in (({}, apart), (apart, {})):
        with pytest.raises(UserError, match="--expert-model-parallel-size"):
            check_experts(there, here)
        for without in ("no_load_optim", "skip_train", "finetune"):
            check_experts(there, here | {without: True})
        check_experts(there | {"no_save_optim": True}, here)


def test_the_optimizer_of_experts_goes_to_any_layout_of_its_kind() -> None:
    for there in EXPERTS_APART:
        for here in EXPERTS_APART:
            check_experts(there, here)
    check_experts({}, {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2})
    check_experts({"num_experts": None}, {"num_experts": None, "expert_model_parallel_size": 1})
