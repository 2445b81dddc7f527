"""Ends a run whose numbers are bad, with one line that says where.

Bad is a loss or a gradient that is NaN or infinite, and a weight that differs between ranks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_prores.errors import print_own_error
from megatron_prores.upstream.registry import wrap


def report_bad_numbers() -> None:
    """Report in one line where a loss or a gradient was NaN or infinite, in any iteration.

    Megatron's check reports it among many lines, and does not look at the first iteration of a run,
    whose update would ruin the weights that are saved next.

    Raises:
        RuntimeError: The installed Megatron has other signatures than those relied on.
    """
    from megatron.core.rerun_state_machine import RerunMode, RerunStateMachine

    def validate_result(stock: Callable[[], Any], named: dict[str, Any]) -> Any:
        machine, fatal = named["self"], named.get("fatal", True)
        known = machine.rerun_requested
        unchecked = machine.mode == RerunMode.DISABLED or not machine.first_iteration_complete
        if fatal and unchecked and machine.mode != RerunMode.REPORT_DETERMINISM_STATS:
            if bool(named["rejection_func"](named["result"])):
                _tell(machine.current_iteration, named, "the run stops")
                # The other ranks wait for this one, and are ended with it.
                sys.exit(1)
            return None
        result = stock()
        if fatal and machine.rerun_requested and not known:
            _tell(
                machine.current_iteration,
                named,
                "Megatron repeats the step to tell bad numbers from bad hardware, then stops",
            )
        return result

    needs = ("self", "result", "rejection_func", "message", "fatal")
    wrap(RerunStateMachine, "validate_result", needs, validate_result, purpose=report_bad_numbers)


def report_different_weights() -> None:
    """Report in one line where data-parallel ranks have come to hold different weights.

    Megatron's check, --check-weight-hash-across-dp-replicas-interval, ends every rank with a
    traceback that does not say which weights.

    Raises:
        RuntimeError: The installed Megatron has other signatures than those relied on.
    """
    from megatron.training import get_args, training

    def check(stock: Callable[[], bool], named: dict[str, Any]) -> bool:
        if stock():
            return True
        group = parallel_state.get_data_parallel_group()
        if torch.distributed.get_rank(group) == 0:
            ranks = torch.distributed.get_process_group_ranks(group)
            print_own_error(
                f"iteration {get_args().curr_iteration + 1}: the weights of the data-parallel "
                f"ranks {ranks} differ ('Hash not matching' in their logs names them); the run "
                "stops"
            )
        sys.exit(1)

    where = (training, "check_param_hashes_across_dp_replicas")
    wrap(*where, ("model",), check, purpose=report_different_weights)


def _tell(iteration: int, named: dict[str, Any], consequence: str) -> None:
    # The iteration as the log counts it; Megatron's own lines about it say one more.
    rank = torch.distributed.get_rank()
    print_own_error(
        f"iteration {iteration}, rank {rank} (host {os.uname()[1]}): {named['message']} "
        f"(value {float(named['result'])}); {consequence}"
    )
