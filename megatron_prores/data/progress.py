"""Progress of a pass over text: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType

from tqdm import tqdm

_LOG_SECONDS = 10.0


class Progress:
    """Shows how far a pass over the inputs has come.

    Args:
        title: What is being done, one or two words.
        disk_bytes: Bytes of all inputs on disk, or None when not known (standard input).
        log_interval: Documents between two lines when standard error is no terminal; None for a
            line every ten seconds.
        processes: Processes that share the work.
    """

    def __init__(
        self,
        title: str,
        disk_bytes: int | None,
        log_interval: int | None = None,
        processes: int = 1,
    ) -> None:
        self.documents = 0
        self.tokens = 0
        self.text_bytes = 0
        self._processes = processes
        self._title = title
        self._total = disk_bytes
        self._disk_bytes = 0
        self._log_interval = log_interval
        self._start = self._last_time = time.monotonic()
        self._last_documents = 0
        self._bar = None
        if sys.stderr.isatty():
            # Containers' terminals may claim 0 rows and columns, where tqdm hides its bar.
            size = shutil.get_terminal_size()
            tqdm.monitor_interval = 0  # Its watcher is a thread, and worker processes are forked.
            self._bar = tqdm(
                total=disk_bytes,
                desc=title,
                unit="B",
                unit_scale=True,
                ncols=size.columns,
                nrows=size.lines,
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    @property
    def megabytes_per_second(self) -> float:
        """Text done per second so far, in 10^6 bytes (after decompression)."""
        return self.text_bytes / 1e6 / max(self.seconds, 1e-9)

    def __call__(self, documents: int, tokens: int, text_bytes: int, disk_bytes: int) -> None:
        """Count work that is finished, and show it when it is time to.

        Args:
            documents: Documents finished since the last call.
            tokens: Their tokens.
            text_bytes: Their size in bytes.
            disk_bytes: What was read from the disk for them, in bytes.
        """
        self.documents += documents
        self.tokens += tokens
        self.text_bytes += text_bytes
        self._disk_bytes += disk_bytes
        if self._bar is not None:
            text = f"{self.documents} documents, {self._speed()}"
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(disk_bytes)
        elif self._line_due():
            self._last_time = time.monotonic()
            self._last_documents = self.documents
            print(self._line(), file=sys.stderr, flush=True)

    def message(self, text: str) -> None:
        """Print a line on standard error without tearing the bar."""
        tqdm.write(text, file=sys.stderr)

    def _line_due(self) -> bool:
        if self._log_interval is not None:
            return self.documents - self._last_documents >= self._log_interval
        return time.monotonic() - self._last_time >= _LOG_SECONDS

    def _line(self) -> str:
        share = f"{100 * self._disk_bytes / self._total:.0f} %, " if self._total else ""
        return (
            f"{self._title}: {share}{self.documents} documents, {self.text_bytes / 1e6:.1f} MB, "
            f"{self._speed()}"
        )

    def _speed(self) -> str:
        """Return the speed of text, in all and of each process, and of tokens."""
        speed = f"{self.megabytes_per_second:.1f} MB/s of text"
        if self._processes > 1:
            speed += f" ({self.megabytes_per_second / self._processes:.1f} per process)"
        if self.tokens:
            speed += f", {self.tokens / 1e6 / max(self.seconds, 1e-9):.2f}M tokens/s"
        return speed
