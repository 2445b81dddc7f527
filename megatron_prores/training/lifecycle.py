"""A run from start to end: the lock on ``--save``, saving on a signal, and the exit code.

Built on Megatron's ``--exit-signal-handler``, which saves after the step during which any rank got
the signal. Here it is on wherever a run saves, handles the signals that batch systems send, and the
run ends with an exit code of its own.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.training.dist_signal_handler import DistributedSignalHandler

from megatron_prores.checkpoint.saving import REMOTE
from megatron_prores.errors import EXIT_INTERRUPTED, UserError, print_own_error
from megatron_prores.training.bad_numbers import report_bad_numbers, report_different_weights
from megatron_prores.training.save_lock import SaveLock
from megatron_prores.upstream.async_writer import (
    WriterDiedError,
    end_writers_with_training,
    watch_writers,
)
from megatron_prores.upstream.registry import wrap
from megatron_prores.upstream.tracker_file import write_tracker_atomically
from megatron_prores.upstream.training_loop import ask_for_signals

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What batch systems and launchers send before they end a job."""


class ExitSignals(DistributedSignalHandler):
    """Megatron's handler, for several signals and with one small reduction per step.

    Also used in the processes that load data, where it only keeps them alive: launchers send a
    signal to all processes of a job, and a step needs its data.
    """

    def __init__(self, sig: signal.Signals = signal.SIGTERM) -> None:
        """Take one more signal, that of ``--exit-signal``."""
        self.signals = sorted({*SIGNALS, sig})
        self.agreed = 0
        """Number of the signal that some rank got, known on all; 0: none."""

    def __enter__(self) -> ExitSignals:
        """Set the handlers of the signals, which stay until the process ends."""
        self._received = 0
        for each in self.signals:
            signal.signal(each, self._note)
        return self

    def _note(self, signum: int, frame: object) -> None:
        self._received = signum

    def signals_received(self) -> list[bool]:
        """Return whether any rank got a signal; collective."""
        number = torch.tensor([self._received], dtype=torch.int32, device="cuda")
        torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
        self.agreed = int(number.item())
        return [self.agreed > 0]


class Lifecycle:
    """What a run holds from its start to its end: its lock on ``--save``, its signal handlers."""

    def __init__(self, args: Any) -> None:
        """Take Megatron's validated arguments, with ``--save`` given."""
        self.args = args
        self.signals = ExitSignals(args.exit_signal)
        local = not args.save.startswith(REMOTE)
        self.lock = SaveLock(args.save) if local and int(os.environ.get("RANK", "0")) == 0 else None
        self.saved_iteration: int | None = None
        """The newest checkpoint in ``--save`` that holds exactly what a run at it would save."""

    def install(self) -> None:
        """Put the lock, the signals and the atomic tracker file into Megatron's training program.

        Raises:
            RuntimeError: The installed Megatron has other signatures than those relied on.
        """
        from megatron.training import training

        self.args.exit_signal_handler = True
        ask_for_signals(self.signals.__enter__())
        end_writers_with_training()
        watch_writers()
        write_tracker_atomically()
        wrap(training, "initialize_megatron", (), self._initialize)
        wrap(training, "load_checkpoint", (), self._load)
        wrap(training, "save_checkpoint", ("iteration",), self._save)

    def _initialize(self, stock: Callable[[], Any], named: dict[str, Any]) -> Any:
        """Take the lock as soon as the ranks can talk, before a model is built."""
        result = stock()
        self._on_first_rank(SaveLock.acquire)
        return result

    def _on_first_rank(self, action: Callable[[SaveLock], str | None]) -> None:
        """Run an action on the lock; where it fails, all ranks stop. Collective."""
        refusal = [""]
        if self.lock is not None:
            try:
                if message := action(self.lock):
                    print(f"> --save {self.args.save}: {message}", flush=True)
            except UserError as error:
                refusal[0] = error.message()
        torch.distributed.broadcast_object_list(refusal, src=0)
        if refusal[0]:
            raise UserError(refusal[0])

    def _load(self, stock: Callable[[], Any], named: dict[str, Any]) -> Any:
        """Note the iteration of the checkpoint that the run begins from."""
        result = stock()
        load, save = self.args.load, self.args.save
        if load is not None and result[0] > 0 and os.path.realpath(load) == os.path.realpath(save):
            self.saved_iteration = result[0]
        return result

    def _save(self, stock: Callable[[], Any], named: dict[str, Any]) -> Any:
        """Save, where this run still holds the lock and the checkpoint is not there already.

        A finished run that is started again, and Megatron's check of results, would overwrite the
        checkpoint that the run began from: a kill meanwhile would leave none.
        """
        self._on_first_rank(SaveLock.check)
        if named["iteration"] == self.saved_iteration:
            if self.lock is not None:
                print(f"> the checkpoint of iteration {self.saved_iteration} is there: kept")
            return None
        result = stock()
        self.saved_iteration = named["iteration"]
        return result

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Run the training program in this: its exit code tells a signal, the lock is released.

        Raises:
            SystemExit: With :data:`EXIT_INTERRUPTED`, when a signal ended the run.
        """
        try:
            yield
        except SystemExit as end:
            if end.code in (None, 0) and self.signals.agreed:
                if int(os.environ.get("RANK", "0")) == 0:
                    name = signal.Signals(self.signals.agreed).name
                    print(
                        f"interrupted by {name}: iteration {self.saved_iteration} is saved in "
                        f"{self.args.save}; started again with --load, the run goes on "
                        f"(exit code {EXIT_INTERRUPTED})",
                        file=sys.stderr,
                        flush=True,
                    )
                sys.exit(EXIT_INTERRUPTED)
            raise
        finally:
            # Python would have the system's own handlers back while it ends, and be killed by them.
            for each in self.signals.signals:
                signal.signal(each, signal.SIG_IGN)
            # Python waits for them when it ends, having sent them the SIGTERM that they ignore;
            # the data loader's own handler would report a worker's end as an error.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for process in multiprocessing.active_children():
                if process.daemon:
                    process.kill()
            if self.lock is not None:
                self.lock.release()


@contextlib.contextmanager
def installed(args: Any) -> Iterator[None]:
    """Run the training program in this.

    Args:
        args: Megatron's validated arguments, before ``pretrain``. Without ``--save`` there is
            nothing to save or to lock, and signals end the run at once, as ever.

    Raises:
        SystemExit: A signal ended the run, or a process that the run needs was killed.
    """
    report_bad_numbers()
    report_different_weights()
    with contextlib.ExitStack() as stack:
        if args.save and not args.skip_train:
            run = Lifecycle(args)
            run.install()
            stack.enter_context(run.guard())
        try:
            yield
        except RuntimeError as error:
            if not (words := _killed_process(error)):
                raise
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
            print_own_error(
                f"rank {rank} (host {os.uname()[1]}): {words}. Out of memory, perhaps: see the "
                "host's log"
            )
            sys.exit(1)


def _killed_process(error: RuntimeError) -> str:
    """Return which process of this rank was killed; empty for another error."""
    if isinstance(error, WriterDiedError):
        return "the process that writes checkpoints died in a save, which is lost"
    # torch raises it wherever the training program is, when it hears of the worker's end.
    if str(error).startswith("DataLoader worker (pid"):
        return f"a process that loads its data: {str(error).splitlines()[0].strip(' .')}"
    return ""
