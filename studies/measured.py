"""Runs a command and measures it: its seconds, and the memory of all its processes."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_prores.errors import UserError

_POLL_SECONDS = 0.2


def run_measured(command: Sequence[str]) -> tuple[float, float, str]:
    """Run a command.

    Returns:
        Its seconds, the most memory of all its processes in MB, and what it printed.

    Raises:
        UserError: It failed.
    """
    start, peak = time.monotonic(), 0.0
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        while process.poll() is None:
            peak = max(peak, _memory(process.pid))
            time.sleep(_POLL_SECONDS)
        seconds = time.monotonic() - start
        log.seek(0)
        printed = log.read().decode(errors="replace")
    if process.returncode:
        raise UserError(f"{command[1]} failed: {printed[-2000:]}")
    return seconds, peak / 1e3, printed


def _memory(pid: int) -> float:
    """Return the memory of a process and its descendants in kB; shared pages count once."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # It has ended.
        return 0
    own = next(float(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return own + sum(_memory(int(child)) for child in children)
