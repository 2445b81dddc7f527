"""torchrun's elastic agent, which starts the ranks of a node, waits for them and ends them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch.distributed.elastic.multiprocessing import api

from megatron_prores.errors import EXIT_INTERRUPTED
from megatron_prores.upstream.registry import wrap

CLOSE_TIMEOUT_SECONDS = 7 * 24 * 3600
"""Seconds for the ranks to save after a signal: for ever, in effect."""

FAILED_CLOSE_SECONDS = 5.0
"""Seconds for the other ranks once one has failed, as none can save without it. The launcher has to
tell the code before batch systems kill it, and before other nodes that have failed of it end it."""


class Ranks:
    """The ranks of this node: the signal that they were handed, and their exit codes."""

    def __init__(self) -> None:
        """Know nothing yet; :meth:`watch` begins."""
        self.signal: int | None = None
        """The first signal that the launcher got."""
        self.codes: list[int] = []
        """The exit codes of ranks that have ended in order."""
        self._processes: list[Any] = []

    def watch(self) -> None:
        """Patch the agent where it gets a signal, starts its ranks and ends them.

        Raises:
            RuntimeError: The installed torch has other functions than those relied on.
        """
        wrap(api, "_terminate_process_handler", ("signum",), self._note_signal)
        wrap(api.SubprocessContext, "_start", ("self",), self._note_start)
        wrap(api.SubprocessContext, "_close", ("self", "timeout"), self._close)

    def kill(self) -> None:
        """End the ranks of this node, without a chance to save."""
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started

    def _note_signal(self, stock: Callable[[], None], named: dict[str, Any]) -> None:
        """Hand the first signal on to the ranks, and ignore those that follow."""
        if self.signal is None:
            self.signal = named["signum"]
            stock()

    def _note_start(self, stock: Callable[[], None], named: dict[str, Any]) -> None:
        """Note the processes of the ranks."""
        stock()
        self._processes = [each.proc for each in named["self"].subprocess_handlers.values()]

    def _close(self, stock: Callable[..., None], named: dict[str, Any]) -> None:
        """Wait for ranks that save after a signal, and note their exit codes."""
        processes = [each.proc for each in (named["self"].subprocess_handlers or {}).values()]
        watch = threading.Thread(target=self._kill_after_failure, args=(processes,))
        watch.start()
        stock(**({} if self.signal is None else {"timeout": CLOSE_TIMEOUT_SECONDS}))
        watch.join()
        self.codes = [process.returncode or 0 for process in processes]

    def _kill_after_failure(self, processes: list[Any]) -> None:
        """Wait for the end of the ranks, and kill those that are left once one has failed."""
        deadline = float("inf")
        while None in (codes := [process.poll() for process in processes]):
            if any(code not in (None, 0, EXIT_INTERRUPTED) for code in codes):
                deadline = min(deadline, time.monotonic() + FAILED_CLOSE_SECONDS)
            if time.monotonic() > deadline:
                self.kill()
                return
            time.sleep(0.1)
