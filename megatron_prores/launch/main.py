"""torchrun, with the exit code of the run: ``python -m megatron_prores.launch <torchrun's flags>``.

torchrun itself ends with 1 whatever the ranks ended with, gives them 30 s to save after a signal,
dies of SIGUSR1 and leaves them behind. Here

- SIGTERM and SIGUSR1 are handed on to the ranks, which save and end, however long that takes: who
  sent the signal decides how long to wait;
- a signal that comes again meanwhile changes nothing;
- once a rank has failed, with which none can save any more, the others of its node are given 5 s;
- a node that is lost ends the job on all nodes, each of which says so in one line
  (megatron_prores/launch/nodes.py): ``--silent-node-seconds`` is how long it may be silent;
- the exit code is that of the ranks: 75 when they have saved on a signal and the job is to be
  queued again (see docs/checkpoints.md), else that of the first rank that failed, or 128 plus the
  number of the signal that ended it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from torch.distributed import DistError, run
from torch.distributed.elastic.multiprocessing import SignalException, api
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from megatron_prores.errors import EXIT_INTERRUPTED, Parser, UserError, print_own_error
from megatron_prores.launch.network import interface_to
from megatron_prores.launch.nodes import Job, Nodes
from megatron_prores.upstream.elastic_agent import Ranks

HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
"""Signals that the ranks get as well."""

_EXPECTED = (EXIT_INTERRUPTED, 2)
"""Codes of ranks that have said themselves why they ended."""


def _as_exit_code(code: int) -> int:
    return 128 - code if code < 0 else code


def main(argv: Sequence[str]) -> int:
    """Launch the ranks of this node, and return their exit code.

    Args:
        argv: As for torchrun.

    Raises:
        UserError: A flag that torchrun does not have is wrong.
    """
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--silent-node-seconds", type=float, default=600.0)
    own, argv = parser.parse_known_args(argv)
    if not own.silent_node_seconds > 0:
        raise UserError(f"--silent-node-seconds {own.silent_node_seconds:g}: must be more than 0")
    ranks = Ranks()
    ranks.watch()
    if "LOGLEVEL" not in os.environ:
        # Which process was sent which signal; what ends a run is said without it.
        logging.getLogger(api.__name__).setLevel(logging.CRITICAL)
    if not any(word.startswith(("--signals-to-handle", "--signals_to_handle")) for word in argv):
        # Not those that a shell has this process ignore, as one in the background.
        names = [each.name for each in HANDED_ON if signal.getsignal(each) is not signal.SIG_IGN]
        argv = ["--signals-to-handle", ",".join(names), *argv]
    nodes = _other_nodes(argv, own.silent_node_seconds, ranks)
    code = _run(argv, ranks, nodes)
    # With the ranks gone nobody can save. A node that is told to end while it says how its ranks
    # have failed still says that.
    for each in HANDED_ON:
        signal.signal(each, signal.SIG_IGN)
    if nodes is not None:
        nodes.close(code)
    return code


def _other_nodes(argv: Sequence[str], silent: float, ranks: Ranks) -> Nodes | None:
    """Start the heartbeats with the other nodes, where there are any and their number is fixed."""
    args = run.parse_args(argv)
    if args.standalone or args.rdzv_backend != "static" or args.nnodes in ("1", "1:1"):
        return None
    settings = dict(pair.split("=", 1) for pair in args.rdzv_conf.split(",") if "=" in pair)
    job = Job(
        node=args.node_rank,
        nodes=int(args.nnodes.rpartition(":")[2]),
        address=args.master_addr,
        port=args.master_port,
        run_id=args.rdzv_id,
        wait_seconds=float(settings.get("timeout", 600)),
        silent_seconds=silent,
    )
    if "GLOO_SOCKET_IFNAME" not in os.environ and (name := interface_to(job.address, job.port)):
        os.environ["GLOO_SOCKET_IFNAME"] = name
    nodes = Nodes(job, ranks.kill)
    nodes.start()
    return nodes


def _run(argv: Sequence[str], ranks: Ranks, nodes: Nodes | None) -> int:
    try:
        run.main(argv)
    except ChildFailedError as failure:
        if nodes is not None and nodes.code is not None:
            return nodes.code  # it has said why
        first: Any = failure.get_first_failure()[1]
        code = _as_exit_code(first.exitcode)
        if first.exitcode not in _EXPECTED:
            print(failure, file=sys.stderr)
            if nodes is not None and (words := nodes.explain_failure(code)):
                print_own_error(words)
        return code
    except DistError as error:
        if nodes is None:
            raise
        print_own_error(nodes.explain_meeting(error))
        return 1
    except SignalException:
        codes = set(ranks.codes)
        if failed := codes - {0, EXIT_INTERRUPTED}:
            # Where some died of the signal, or of another's absence, with code 1, another says why.
            return max(failed) if max(failed) > 0 else 128 + (ranks.signal or signal.SIGTERM)
        return max(codes, default=128 + (ranks.signal or signal.SIGTERM))
    return 0
