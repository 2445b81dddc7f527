"""The command ``tools/plan.py``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

from megatron_prores.plan.options import read_options
from megatron_prores.plan.planner import make_plan


def main(argv: Sequence[str] | None = None) -> None:
    """Plan a run: prints the plan, and draw it where that is asked for.

    Args:
        argv: Arguments; those of the process by default.

    Raises:
        UserError: An option is wrong, or the main program would refuse the command line.
    """
    options = read_options(sys.argv[1:] if argv is None else argv, os.environ)
    plan = make_plan(
        options.argv,
        options.world_size,
        gpus_per_node=options.gpus_per_node,
        time_limit=options.time_limit,
        seconds_per_step=options.seconds_per_step,
    )
    if options.json:
        print(json.dumps(plan.as_dict(), indent=2))
    else:
        from megatron_prores.plan.report import text

        print(text(plan))
    if options.picture is not None:
        from megatron_prores.plan.picture import draw_plan, save

        save(draw_plan(plan), options.picture)
        if not options.json:
            print(f"\npicture: {options.picture}")
