"""Makes shards: one process's share of the inputs that have none, in several processes.

The directory, its plan and its markers are those of ``shards``.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prores.data.encode import Encoder, encode_in_order, lost_worker, start_worker
from megatron_prores.data.inputs import STDIN, Chunk, Input, disk_size
from megatron_prores.data.output import Output, Problems
from megatron_prores.data.progress import Progress
from megatron_prores.data.readers import read_chunks
from megatron_prores.data.shards import Part, Shards, input_name, part_name
from megatron_prores.data.staging import BusyError, staging_directory, staging_path
from megatron_prores.errors import UserError
from megatron_prores.system.files import atomic_write

_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """One process's share of the work.

    Args:
        shards: The directory.
        inputs: All inputs, in the order of the plan.
        encoder: How to tokenize.
        tokens_per_shard: Close a shard with so many tokens; None: a shard for each input.
    """

    shards: Shards
    inputs: Sequence[Input]
    encoder: Encoder
    tokens_per_shard: int | None = None

    def is_done(self, number: int) -> bool:
        """Return whether an input is finished, and a run that was killed then has left nothing."""
        return self.shards.is_finished(number) and not staging_path(self._output(number)).exists()

    def make(self, number: int, workers: int, tell: Any, patient: bool = False) -> bool:
        """Make the parts of an input that are missing.

        Args:
            number: Of the input.
            workers: Processes that tokenize.
            tell: Called with documents, tokens, bytes of text and bytes of disk after each chunk;
                raises to end the work.
            patient: Wait for another process that is at it.

        Returns:
            Whether it is done; False: another process is at it.

        Raises:
            UserError: The input cannot be used, or the output not be written.
        """
        directory = self.shards.directory
        try:
            with staging_directory(self._output(number), wait=patient) as staging:
                done = self.shards.parts(number)  # Another process may have just finished it.
                if done and done[-1].last:
                    return True
                start = done[-1].next_line if done else 1
                chunks = _from_line(read_chunks([self.inputs[number]], self.encoder.keys), start)
                with closing(encode_in_order(self.encoder, chunks, workers)) as results:
                    self._write(number, len(done), start, results, staging, tell)
        except BusyError:
            return False
        except OSError as error:
            raise UserError(f"--output-dir {directory}: cannot write: {error.strerror}") from error
        return True

    def _output(self, number: int) -> Path:
        return self.shards.directory / input_name(number)

    def _write(
        self, number: int, part: int, line: int, results: Any, staging: Path, tell: Any
    ) -> None:
        problems = Problems(self.encoder.stop_at_problem, tell.message)
        first = line
        name = part_name(number, part)
        output = Output(staging, self.shards.directory / name, self.encoder)
        for result in results:
            tokens = output.summary.tokens.total()
            if self.tokens_per_shard is not None and tokens >= self.tokens_per_shard:
                self._publish(number, name, output, first, line, last=False)
                part, first = part + 1, line
                name = part_name(number, part)
                output = Output(staging, self.shards.directory / name, self.encoder)
            problems.report(result.problems)
            output.add(result)
            line = result.next_line
            tell(result.documents, result.tokens, result.text_bytes, result.disk_bytes)
        self._publish(number, name, output, first, line, last=True)

    def _publish(
        self, number: int, name: str, output: Output, first: int, line: int, last: bool
    ) -> None:
        digests = output.finish()
        output.publish()
        done = output.summary
        marker = Part(
            name, self.shards.inputs[number], self.shards.digest, first, line, last,
            done.documents, done.text_bytes, dict(done.tokens), dict(done.left_out), digests,
        )  # fmt: skip
        with atomic_write(self.shards.directory / f"{name}.json") as file:
            json.dump(vars(marker), file, indent=1)


def _from_line(chunks: Iterator[Chunk], line: int) -> Iterator[Chunk]:
    """Leave out the chunks before a line; shards end where chunks do."""
    return (chunk for chunk in chunks if chunk.first_line >= line)


def make_shards(
    job: Job, share: tuple[int, int], workers: int, log_interval: int | None, stop_after: int | None
) -> None:
    """Make this process's share of what is missing.

    Args:
        job: The work.
        share: (i, n), from 1: every n-th input, from the i-th.
        workers: Processes. With fewer inputs than these, the inputs are made one after the other,
            each by all of them; else each process makes inputs by itself.
        log_interval: See :class:`megatron_prores.data.progress.Progress`.
        stop_after: Begin no further input when the first ones together have so many tokens.

    Raises:
        UserError: See :meth:`Job.make`; whatever was finished stays.
    """
    mine = range(share[0] - 1, len(job.inputs), share[1])
    missing = [number for number in mine if not job.is_done(number)]
    size = disk_size([job.inputs[number] for number in missing])

    def numbers() -> Iterator[int]:
        tokens, whole = 0, 0  # of the first inputs, so many of which are finished
        for number in missing:
            have = tokens
            while stop_after is not None and whole < len(job.inputs):
                parts = job.shards.parts(whole)
                have += sum(sum(part.tokens.values()) for part in parts)
                if not (parts and parts[-1].last):
                    break
                tokens, whole = have, whole + 1
            if stop_after is not None and have >= stop_after:
                return
            yield number

    with Progress("tokenizing", size, log_interval, workers) as progress:
        if len(missing) < workers or workers == 1 or job.inputs[missing[0]].name == STDIN:
            busy = [each for each in numbers() if not job.make(each, workers, progress)]
        else:
            busy = _in_processes(job, numbers(), workers, progress)
        # Other processes have these. Should one of them die, its work is done here.
        for number in busy:
            job.make(number, workers, progress, patient=True)
    print(
        f"{progress.documents} documents, {progress.tokens} tokens in {progress.seconds:.1f} s "
        f"({progress.megabytes_per_second:.1f} MB/s)"
    )
    print(f"{job.shards.directory}: {job.shards.contents()}")


def _in_processes(job: Job, numbers: Iterator[int], workers: int, progress: Progress) -> list[int]:
    """Make each input in a process; return those that another run is at."""
    context = multiprocessing.get_context("fork")
    shared = context.Array("q", 5)
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start, initargs=(job, shared)
    )
    running: dict[Future[bool], int] = {}
    seen = [0, 0, 0, 0]
    busy: list[int] = []
    try:
        while True:
            while len(running) < workers and (number := next(numbers, None)) is not None:
                running[pool.submit(_make, number)] = number
            if not running:
                return busy
            done, _ = wait(running, _POLL_SECONDS, FIRST_COMPLETED)
            now = list(shared[:4])
            progress(*(a - b for a, b in zip(now, seen, strict=True)))
            seen = now
            busy += [running[each] for each in done if not each.result()]
            for each in done:
                del running[each]
    except BrokenProcessPool as error:
        raise lost_worker(workers) from error
    finally:
        shared[4] = 1
        pool.shutdown(cancel_futures=True)


class _Teller:
    """Adds a worker's progress to the shared counts."""

    def __init__(self, shared: Any) -> None:
        self._shared = shared

    def __call__(self, *counts: int) -> None:
        with self._shared.get_lock():
            for at, count in enumerate(counts):
                self._shared[at] += count
            if self._shared[4]:
                raise UserError("the run has ended")

    def message(self, text: str) -> None:
        """Print a line."""
        os.write(2, f"{text}\n".encode(errors="replace"))


_job: Job
_teller: _Teller


def _start(job: Job, shared: Any) -> None:
    global _job, _teller
    _job, _teller = job, _Teller(shared)
    start_worker(job.encoder)


def _make(number: int) -> bool:
    return _job.make(number, 1, _teller)
