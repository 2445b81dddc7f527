"""torchrun, with the exit code of the run: ``python -m megatron_prores.launch <torchrun's flags>``.

torchrun itself ends with 1 whatever the ranks ended with, gives them 30 s to save after a signal,
dies of SIGUSR1 and leaves them behind. Here

- SIGTERM and SIGUSR1 are handed on to the ranks, which save and end, however long that takes: who
  sent the signal decides how long to wait;
- a signal that comes again meanwhile changes nothing;
- the exit code is that of the ranks: 75 when they have saved on a signal and the job is to be
  queued again (see docs/checkpoints.md), else that of the first rank that failed, or 128 plus the
  number of the signal that ended it.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException, api
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from megatron_prores.errors import EXIT_INTERRUPTED

HANDED_ON = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"

UNHURRIED = 7 * 24 * 3600
"""Seconds for the ranks to save after a signal: for ever, in effect."""

_EXPECTED = (EXIT_INTERRUPTED, 2)
"""Codes of ranks that have said themselves why they ended."""


class _Signalled:
    """What the launcher was told, and what its ranks answered."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.codes: list[int] = []

    def install(self) -> None:
        """Gets into torch's elastic agent, where it waits for its ranks and where it ends them."""
        raise_in_agent = api._terminate_process_handler
        close = api.SubprocessContext._close

        def handler(signum: int, frame: FrameType | None) -> None:
            if self.number is None:
                self.number = signum
                raise_in_agent(signum, frame)

        def patient_close(context: Any, death_sig: signal.Signals, timeout: int = 30) -> None:
            handlers = list((context.subprocess_handlers or {}).values())
            close(context, death_sig, timeout if self.number is None else UNHURRIED)
            self.codes = [each.proc.returncode or 0 for each in handlers]

        api._terminate_process_handler = handler
        context_class: Any = api.SubprocessContext
        context_class._close = patient_close


def _as_exit_code(code: int) -> int:
    return 128 - code if code < 0 else code


def main(argv: Sequence[str]) -> int:
    """Launches the ranks and gives their exit code.

    Args:
        argv: As for torchrun.
    """
    signalled = _Signalled()
    signalled.install()
    if not any(word.startswith(("--signals-to-handle", "--signals_to_handle")) for word in argv):
        argv = ["--signals-to-handle", _unignored(HANDED_ON), *argv]
    try:
        run.main(argv)
    except ChildFailedError as failure:
        first: Any = failure.get_first_failure()[1]
        if first.exitcode not in _EXPECTED:
            print(failure, file=sys.stderr)
        return _as_exit_code(first.exitcode)
    except SignalException:
        codes = set(signalled.codes)
        if EXIT_INTERRUPTED in codes and codes <= {0, EXIT_INTERRUPTED}:
            return EXIT_INTERRUPTED
        if codes == {0}:
            return 0
        return 128 + (signalled.number or signal.SIGTERM)
    return 0


def _unignored(names: str) -> str:
    """Leaves out what this process was started to ignore, as a shell does for background jobs."""
    return ",".join(
        name
        for name in names.split(",")
        if signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
