"""The process that writes checkpoints in the background (``--async-save``), made safe.

Megatron's own outlives a killed training process for ever, waiting on its queue, or writes on into
a checkpoint that the resumed run writes as well. And it dies of the SIGTERM that a launcher sends
to the whole process group, so that the training process waits for it until it is killed itself.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

from megatron_prores.processes import end_children_with_parent
from megatron_prores.upstream.registry import replace, stock


def _die_with_training_process() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


def writer_loop(*args: Any, **kwargs: Any) -> None:
    """Run Megatron's loop of the writer; it ends with the training process, and with nothing else.

    A writer that is not forked finds this function by its name.
    """
    for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    threading.Thread(target=_die_with_training_process, daemon=True).start()
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
