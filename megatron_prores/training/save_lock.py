"""The lock on ``--save``: one run at a time writes a directory of checkpoints.

The lock is a file in that directory that names its holder. Whether a holder still lives is asked of
the operating system where that can be (same host, same process namespace); elsewhere the holder
shows it by touching the file. Times are those of the file server, so that no two clocks are
compared. Nothing here needs Megatron, and flock is not used: network file systems often lack it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_prores.errors import UserError

LOCK_NAME = ".prores.lock"

HEARTBEAT_SECONDS = 30.0
"""How often the holder touches the file."""

STALE_SECONDS = 300.0
"""A lock that was not touched for so long belongs to nobody, where its holder cannot be probed."""


def _process_start(pid: int) -> str | None:
    """Read when a process started, in clock ticks since boot: with the pid it names a process."""
    try:
        # The second field is the program's name in parentheses, which may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]  # a zombie is dead


def _namespace() -> str:
    """Name the process namespace: pids of another container mean nothing here."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


@dataclass(frozen=True)
class Holder:
    """The run that holds a lock, as its file tells."""

    host: str
    job: str | None
    """SLURM's job id, the same when the job is requeued; None outside of SLURM."""
    restarts: int
    """How often SLURM has requeued the job."""
    pid: int
    namespace: str
    process_start: str | None
    started: str
    """Wall-clock time, for people."""
    token: str
    """Different for every lock ever taken."""

    @staticmethod
    def this_process(environ: Mapping[str, str] = os.environ) -> Holder:
        """Describe this process as a holder."""
        return Holder(
            host=socket.gethostname(),
            job=environ.get("SLURM_JOB_ID"),
            restarts=int(environ.get("SLURM_RESTART_COUNT") or 0),
            pid=os.getpid(),
            namespace=_namespace(),
            process_start=_process_start(os.getpid()),
            started=time.strftime("%Y-%m-%d %H:%M:%S"),
            token=secrets.token_hex(8),
        )

    def __str__(self) -> str:
        job = "" if self.job is None else f"job {self.job}, "
        return f"host {self.host}, {job}pid {self.pid}, since {self.started}"

    def stale_because(self, me: Holder, silent_for: float) -> str | None:
        """Say why this holder, who is not ``me``, no longer lives; None if it may.

        Args:
            me: The process that asks.
            silent_for: Seconds since the holder touched its lock.
        """
        if (self.host, self.namespace) == (me.host, me.namespace):
            alive = _process_start(self.pid)
            if alive is not None and self.process_start in (None, alive):
                return None
            return "that process has ended"
        if self.job is not None and self.job == me.job and self.restarts < me.restarts:
            return "that was this job, before it was requeued"
        if silent_for > STALE_SECONDS:
            return f"it was silent for {silent_for:.0f} s"
        return None


class SaveLock:
    """The lock on one directory, of the process that makes it."""

    def __init__(self, directory: str | Path, me: Holder | None = None) -> None:
        """Take the directory of ``--save``, which need not exist; for tests also the holder."""
        self.path = Path(directory) / LOCK_NAME
        self.me = me or Holder.this_process()
        self._stop = threading.Event()

    def acquire(self) -> str | None:
        """Take the lock, also from a holder that has ended, and send heartbeats.

        Returns:
            What to tell the user about a lock that was taken over; None where there was none.

        Raises:
            UserError: Another run holds it, or the directory cannot be written.
        """
        with self._readable_errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            message = self._take()
        threading.Thread(target=self._beat, name="save-lock", daemon=True).start()
        return message

    @contextlib.contextmanager
    def _readable_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"--save {self.path.parent}: cannot be written ({error.strerror})"
            ) from None

    def _take(self) -> str | None:
        mine = self.path.with_name(f"{LOCK_NAME}.{self.me.token}")
        mine.write_text(json.dumps(asdict(self.me), indent=1) + "\n")
        message = None
        try:
            while True:
                try:
                    # A link comes to be whole or not at all, also on network file systems.
                    os.link(mine, self.path)
                    return message
                except FileExistsError:
                    pass
                found = self._read()
                if found is None:
                    continue  # released just now
                holder, touched = found
                os.utime(mine)
                reason = self._reason(holder, mine.stat().st_mtime - touched)
                if self._remove(holder):
                    message = f"took over the lock of {holder or 'nobody'}: {reason}"
        finally:
            mine.unlink(missing_ok=True)

    def _reason(self, holder: Holder | None, silent_for: float) -> str:
        """Return why the lock may be taken over.

        Raises:
            UserError: It may not.
        """
        if holder is None:
            reason = "unreadable" if silent_for > STALE_SECONDS else None
        else:
            reason = holder.stale_because(self.me, silent_for)
        if reason is None:
            raise UserError(
                f"--save {self.path.parent}: another run is writing there "
                f"({holder or 'its lock cannot be read'}); stop that one, or give another "
                f"directory; if it no longer runs, remove {self.path}"
            )
        return reason

    def _read(self) -> tuple[Holder | None, float] | None:
        """Read who holds the lock (None: unreadable) and when it was touched; None: no lock."""
        try:
            touched = self.path.stat().st_mtime
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            return Holder(**json.loads(content)), touched
        except (TypeError, ValueError, RecursionError):
            return None, touched

    def _remove(self, holder: Holder | None) -> bool:
        """Remove the lock of a dead holder; False where another run was faster."""
        aside = self.path.with_name(f"{LOCK_NAME}.{self.me.token}.stale")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return False
        moved = json.loads(aside.read_text()).get("token") if holder is not None else None
        if holder is not None and moved != holder.token:
            # The faster run's new lock: back with it.
            with contextlib.suppress(FileExistsError):
                os.link(aside, self.path)
            aside.unlink()
            return False
        aside.unlink()
        return True

    def check(self) -> None:
        """Make sure, before something is written, that the lock is still this run's.

        Raises:
            UserError: Another run has it: this one was silent for too long, or a user removed it.
        """
        with self._readable_errors():
            found = self._read()
            if found is None:
                self._take()
            elif found[0] is None or found[0].token != self.me.token:
                raise UserError(
                    f"--save {self.path.parent}: this run has lost its lock, another writes there "
                    f"({found[0] or 'unreadable'}); nothing was saved over its checkpoints"
                )
            else:
                os.utime(self.path)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            found = None
            with contextlib.suppress(OSError):
                found = self._read()
            if found is not None and found[0] is not None and found[0].token == self.me.token:
                with contextlib.suppress(OSError):
                    os.utime(self.path)

    def release(self) -> None:
        """Release the lock, where it is this process's; a forked child's exit leaves it."""
        self._stop.set()
        if os.getpid() != self.me.pid:
            return
        with contextlib.suppress(OSError):
            found = self._read()
            if found is not None and found[0] is not None and found[0].token == self.me.token:
                self.path.unlink()
