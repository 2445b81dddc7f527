"""torchrun, with the exit code of the run: ``python -m megatron_prores.launch <torchrun's flags>``.

torchrun itself ends with 1 whatever the ranks ended with, gives them 30 s to save after a signal,
dies of SIGUSR1 and leaves them behind. Here

- SIGTERM and SIGUSR1 are handed on to the ranks, which save and end, however long that takes: who
  sent the signal decides how long to wait;
- a signal that comes again meanwhile changes nothing;
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
from contextlib import suppress
from types import FrameType
from typing import Any

from torch.distributed import DistError, run
from torch.distributed.elastic.multiprocessing import SignalException, api
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from megatron_prores.errors import EXIT_INTERRUPTED, Parser, UserError
from megatron_prores.launch.network import interface_to
from megatron_prores.launch.nodes import Job, Nodes

HANDED_ON = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"

CLOSE_TIMEOUT_SECONDS = 7 * 24 * 3600
"""Seconds for the ranks to save after a signal: for ever, in effect."""

_EXPECTED = (EXIT_INTERRUPTED, 2)
"""Codes of ranks that have said themselves why they ended."""


class _Signalled:
    """What the launcher was told, and what its ranks answered."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.codes: list[int] = []
        self.ranks: list[Any] = []

    def install(self) -> None:
        """Get into torch's elastic agent, where it waits for its ranks and where it ends them."""
        raise_in_agent = api._terminate_process_handler
        start, close = api.SubprocessContext._start, api.SubprocessContext._close

        def handler(signum: int, frame: FrameType | None) -> None:
            if self.number is None:
                self.number = signum
                raise_in_agent(signum, frame)

        def patient_close(context: Any, death_sig: signal.Signals, timeout: int = 30) -> None:
            handlers = list((context.subprocess_handlers or {}).values())
            close(context, death_sig, timeout if self.number is None else CLOSE_TIMEOUT_SECONDS)
            self.codes = [each.proc.returncode or 0 for each in handlers]

        def noted_start(context: Any) -> None:
            start(context)
            self.ranks = list(context.subprocess_handlers.values())

        api._terminate_process_handler = handler
        context_class: Any = api.SubprocessContext
        context_class._start = noted_start
        context_class._close = patient_close

    def ignore_more(self) -> None:
        """End the listening: with the ranks gone nobody can save, and the exit code is settled.

        So a node that is told to end while it says how its ranks have failed still says that.
        """
        for name in HANDED_ON.split(","):
            signal.signal(getattr(signal, name), signal.SIG_IGN)

    def kill_ranks(self) -> None:
        """End the ranks of this node, without a chance to save."""
        for rank in self.ranks:
            with suppress(ProcessLookupError):
                os.killpg(rank.proc.pid, signal.SIGKILL)  # with the processes that it has started


def _as_exit_code(code: int) -> int:
    return 128 - code if code < 0 else code


def main(argv: Sequence[str]) -> int:
    """Launches the ranks and gives their exit code.

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
    signalled = _Signalled()
    signalled.install()
    if "LOGLEVEL" not in os.environ:
        # Which process was sent which signal; what ends a run is said without it.
        logging.getLogger(api.__name__).setLevel(logging.CRITICAL)
    if not any(word.startswith(("--signals-to-handle", "--signals_to_handle")) for word in argv):
        argv = ["--signals-to-handle", _unignored(HANDED_ON), *argv]
    nodes = _other_nodes(argv, own.silent_node_seconds, signalled)
    code = _run(argv, signalled, nodes)
    signalled.ignore_more()
    if nodes is not None:
        nodes.close(code)
    return code


def _other_nodes(argv: Sequence[str], silent: float, signalled: _Signalled) -> Nodes | None:
    """Get in touch with the other nodes, where there are any and their number is fixed."""
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
    nodes = Nodes(job, signalled.kill_ranks)
    nodes.start()
    return nodes


def _run(argv: Sequence[str], signalled: _Signalled, nodes: Nodes | None) -> int:
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
                print(f"error: {words}", file=sys.stderr, flush=True)
        return code
    except DistError as error:
        if nodes is None:
            raise
        print(f"error: {nodes.explain_meeting(error)}", file=sys.stderr, flush=True)
        return 1
    except SignalException:
        codes = set(signalled.codes)
        if EXIT_INTERRUPTED in codes and codes <= {0, EXIT_INTERRUPTED}:
            return EXIT_INTERRUPTED
        if codes == {0}:
            return 0
        return 128 + (signalled.number or signal.SIGTERM)
    return 0


def _unignored(names: str) -> str:
    """Leave out what this process was started to ignore, as a shell does for background jobs."""
    return ",".join(
        name
        for name in names.split(",")
        if signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN
    )
