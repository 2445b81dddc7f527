"""Optional packages are imported to see whether they work, each in a process of its own."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
from dataclasses import dataclass

from megatron_prores.doctor.finding import MISSING, OK, Finding, Where, one_line
from megatron_prores.environment import is_installed

PROBE_SECONDS = 300
"""A cold import from a slow file system takes minutes; a hang takes for ever."""


class Probe:
    """Imports optional packages in a process of their own, which may fail in any way it likes.

    A package that was compiled for another torch can take its process down with it.
    """

    def __init__(self, code: str) -> None:
        """Start at once, in the background; ``code`` prints what was found, on the last line."""
        self._code = code
        self._answer: tuple[str | None, str] = (None, "")
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            result = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", self._code],
                capture_output=True,
                text=True,
                timeout=PROBE_SECONDS,
                stdin=subprocess.DEVNULL,
                # Or the import might take memory of a GPU, which a run may need to the last byte.
                env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            )
        except subprocess.TimeoutExpired:
            self._answer = None, f"the import took more than {PROBE_SECONDS} s"
            return
        except OSError as error:
            self._answer = None, one_line(error)
            return
        lines = result.stdout.split("\n")
        if result.returncode == 0 and result.stdout.strip():
            self._answer = [line for line in lines if line.strip()][-1].strip(), ""
        elif result.returncode < 0:
            self._answer = None, f"the import was killed by signal {-result.returncode}"
        else:
            errors = [line for line in result.stderr.splitlines() if line.strip()]
            self._answer = None, one_line(errors[-1] if errors else "the import failed")

    def answer(self) -> tuple[str | None, str]:
        """Wait, and return what was found, or None and why it was not."""
        self._thread.join()
        return self._answer


@dataclass(frozen=True)
class Optional:
    """A package that may be left out, and is imported to see that it works."""

    module: str
    code: str
    """Imports it, and prints its version."""
    cost: str
    """Of not having it."""
    missing: str = MISSING
    """The status then."""

    def __call__(self, where: Where) -> Finding:
        """Wait for its import."""
        probe = self.probe()
        if probe is None:
            return Finding(self.missing, "not installed", self.cost)
        version, error = probe.answer()
        if version is None:
            if "shared object not found" in error:
                # Transformer Engine looks for NVIDIA's libraries beside itself alone.
                error += " LD_LIBRARY_PATH over the nvidia/*/lib of torch's site-packages helps"
            return Finding(MISSING, f"broken: {error}", self.cost)
        return Finding(OK, version)

    @functools.cache  # noqa: B019, there are three of them
    def probe(self) -> Probe | None:
        """Start the import, the first time; None where nothing is installed."""
        return Probe(self.code) if is_installed(self.module) else None
