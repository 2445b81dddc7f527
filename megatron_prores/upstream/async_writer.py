"""The process that writes checkpoints in the background (``--async-save``), made safe.

Megatron's own outlives a killed training process for ever, waiting on its queue, or writes on into
a checkpoint that the resumed run writes as well. And it dies of the SIGTERM that a launcher sends
to the whole process group, so that the training process waits for it until it is killed itself.
"""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

from megatron_prores.system.processes import end_children_with_parent, end_with_parent
from megatron_prores.upstream.registry import replace, stock, wrap


def writer_loop(*args: Any, **kwargs: Any) -> None:
    """Run Megatron's loop of the writer; it ends with the training process, and with nothing else.

    A writer that is not forked finds this function by its name.
    """
    for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    end_with_parent()
    stock(PersistentAsyncCaller, "async_loop")(*args, **kwargs)


def end_writers_with_training() -> None:
    """Make the processes that Megatron starts for saving end with the one that trains.

    Those are its writer, which gets our loop, and the server of the queue for written files, which
    is forked here: Megatron would start a new Python for it during the first save of a run, and
    leave that behind when the run is killed.
    """
    replace(PersistentAsyncCaller, end_writers_with_training, async_loop=writer_loop)
    end_children_with_parent()
    filesystem_async.get_write_results_queue("fork")


class WriterDiedError(RuntimeError):
    """The writer died with a checkpoint half written."""


def watch_writers() -> None:
    """Start writers anew that were killed between two saves, and raise where one was in a save.

    Without the server of its queue Megatron's next save would fail; for a writer that is dead it
    would wait for ever.
    """
    purpose = watch_writers
    watched: Any = None
    pending = 0  # saves that are not known to be done on all ranks

    def results_queue(stock: Callable[..., Any], named: dict[str, Any]) -> Any:
        queue = filesystem_async._results_queue
        if queue is not None and not queue._manager._process.is_alive():
            print("> the process that collects what a save has written was killed: here is another")
            replace(filesystem_async, purpose, _results_queue=None)  # the next call makes one
        return stock(mp_mode="fork")

    def schedule_async_call(stock: Callable[[], None], named: dict[str, Any]) -> None:
        nonlocal watched, pending
        caller, rank = named["self"], torch.distributed.get_rank()
        if named["async_req"].async_fn is not None:
            caller.process = PersistentAsyncCaller._get_process(rank)
            if _is_dead(caller):
                caller.close()
                if pending:  # it cannot be told what of them is written
                    raise WriterDiedError
                print("> the process that writes checkpoints was killed: here is another")
                caller.process = PersistentAsyncCaller._get_process(rank)
            pending += 1
            if caller.process is not watched:
                watched = caller.process
                left = (watched, caller._persistent_preload_q)
                threading.Thread(target=_take_off, args=left, daemon=True).start()
        stock()

    def is_current_async_call_done(stock: Callable[..., bool], named: dict[str, Any]) -> bool:
        nonlocal pending
        # All ranks come through here together: the stock call is collective.
        while not (done := stock(blocking=False)):
            if _is_dead(caller := named["self"]) and caller.cur_item is None:
                caller._persistent_queue.cancel_join_thread()
                caller.close()
                raise WriterDiedError
            if not named.get("blocking"):
                break
            time.sleep(0.1)
        pending -= bool(done)  # a tensor
        return done

    def close(stock: Callable[..., None], named: dict[str, Any]) -> None:
        stock(**({"abort": True} if _is_dead(named["self"]) else {}))

    wrap(filesystem_async, "get_write_results_queue", ("mp_mode",), results_queue, purpose=purpose)
    for wrapper, needs in (
        (schedule_async_call, ("self", "async_req")),
        (is_current_async_call_done, ("self", "blocking")),
        (close, ("self", "abort")),
    ):
        wrap(PersistentAsyncCaller, wrapper.__name__, needs, wrapper, purpose=purpose)


def _take_off(writer: Any, tasks: Any) -> None:
    """Mark a writer's tasks as done once it has ended: who waits for one waits for ever."""
    multiprocessing.connection.wait([writer.sentinel])
    with contextlib.suppress(ValueError):  # none is left
        while True:
            tasks.task_done()


def _is_dead(caller: PersistentAsyncCaller) -> bool:
    return caller.process is not None and not caller.process.is_alive()
