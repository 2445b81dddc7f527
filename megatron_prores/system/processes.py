"""Processes that end with the one that started them, however that one ends. Linux only.

A launcher that is killed cannot end its ranks, nor a rank the processes that load data and write
checkpoints. They would train on with nobody waiting for them, and hold the lock on ``--save``.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def end_with_launcher() -> None:
    """Let the kernel kill this rank when its launcher dies; does nothing without a launcher.

    Who starts a run by hand, without one, may leave the shell that it was started from.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or _name(os.getppid()) == "slurmstepd":
        _kill_when_it_dies(os.getppid())


def end_with_parent() -> None:
    """End this process of ``multiprocessing`` when the one that asked for it dies.

    That may be another than the kernel's parent, which can be a fork server. What is killed
    outright leaves its workers waiting for ever.
    """
    if (parent := multiprocessing.parent_process()) is None:
        return

    def wait() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def end_children_with_parent() -> None:
    """Let every process that is forked from now on be killed when the one that forked it dies."""
    parent = os.getpid()

    def in_child() -> None:
        nonlocal parent
        _kill_when_it_dies(parent)
        parent = os.getpid()

    os.register_at_fork(after_in_child=in_child)


def _kill_when_it_dies(parent: int) -> None:
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has died before the call
        os.kill(os.getpid(), signal.SIGKILL)


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""
