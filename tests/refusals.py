"""Makes the files that the rows of tests/wrong_invocations.py name, runs rows, and judges them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from tests.distributed.launch import REPOSITORY, fork, launcher_variables, run_job, run_ranks
from tests.wrong_invocations import MAIN, MOCK, Row

SECONDS = 240.0
"""Until a program that has not refused its input counts as hung, on a crowded machine too."""

_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class Ending:
    """How a row ended."""

    exit_codes: list[int | None]
    output: str
    """Of all ranks."""


def prepare_files(directory: Path) -> None:
    """Makes data, tokenizers and schedules, whole and damaged; no checkpoint."""
    from megatron_prores.data import tokenizer

    lines = [f"{n} {n + 1} {n + 2}" for n in range(10, 60)]
    text = "".join(json.dumps({"text": line}) + "\n" for line in lines)
    (directory / "text.jsonl").write_text(text)
    words = [f"the {n}th line of a text, with words number {n * 7919}" for n in range(400)]
    (directory / "pieces.model").write_bytes(tokenizer.train_model(words, 340))
    (directory / "fewer.model").write_bytes(tokenizer.train_model(words, 300))
    (directory / "empty.model").touch()
    (directory / "folder.csv").mkdir()
    (directory / "alpha.csv").write_text("step,1,2\n0,0,0\n9,1,1\n")
    (directory / "above.csv").write_text("step,1,2,3,4\n0,1.5,0,0,0\n")
    for suffix in (".bin", ".idx"):
        (directory / f"there_text_document{suffix}").write_bytes(b"precious")
    _prepare_datasets(directory)


def _prepare_datasets(directory: Path) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(3, 340, 50) for _ in range(20)]
    _write(directory / "good", documents)
    names = "cut_bin cut_idx empty_bin empty_idx text_idx no_bin no_idx far"
    for name in names.split():
        for suffix in (".bin", ".idx"):
            shutil.copy(directory / f"good{suffix}", directory / f"{name}{suffix}")
    _cut(directory / "cut_bin.bin", 30)
    _cut(directory / "cut_idx.idx", 30)
    (directory / "empty_bin.bin").write_bytes(b"")
    (directory / "empty_idx.idx").write_bytes(b"")
    (directory / "text_idx.idx").write_text("no index\n" * 9)
    (directory / "no_bin.bin").unlink()
    (directory / "no_idx.idx").unlink()
    # The pointer of the second of 20 sequences, behind a header of 34 bytes and 20 lengths.
    content = bytearray((directory / "far.idx").read_bytes())
    content[34 + 80 + 8 : 34 + 80 + 16] = (10**9).to_bytes(8, "little")
    (directory / "far.idx").write_bytes(content)
    _write(directory / "no_documents", [])
    (directory / "no_documents.bin").write_bytes(b"\0\0")
    _write(directory / "negative", [np.array([5, -1, 7])], np.int32)


def _write(prefix: Path, documents: list[np.ndarray], dtype: type[np.generic] = np.uint16) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(document.astype(dtype), [len(document)])
    builder.finalize(f"{prefix}.idx")


def _cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:-size])


def prepare_checkpoints(directory: Path, scratch: Path) -> None:
    """Saves a checkpoint, and damages copies of it."""
    saved = directory / "saved"
    argv = [*shlex.split(MOCK), "--save", str(saved)]
    job = run_job(scratch, argv)
    assert job.succeeded, job.output[-3000:]
    for name, tracker in {"astray": "9", "babble": "yesterday", "cut_saved": "2"}.items():
        shutil.copytree(saved, directory / name)
        (directory / name / "latest_checkpointed_iteration.txt").write_text(tracker)
    old = directory / "old" / "iter_0000002" / "mp_rank_00"
    old.mkdir(parents=True)
    (old / "model_optim_rng.pt").touch()
    shutil.copy(saved / "latest_checkpointed_iteration.txt", directory / "old")
    _cut(directory / "cut_saved" / "iter_0000002" / ".metadata", 2000)


def command_line(row: Row, files: Path) -> list[str]:
    """Gives the arguments of a row."""
    argv = shlex.split(row.argv.format(w=files))
    for flag in row.without:
        at = argv.index(flag)
        del argv[at : at + 2]
    return argv


def clean_environment() -> dict[str, str]:
    """Gives this process's environment without a launcher's, and without GPUs."""
    environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHER}
    return environment | {"CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}


def run_alone(row: Row, files: Path, cwd: Path) -> Ending:
    """Starts a row as a user does."""
    environment = clean_environment() | dict(row.environment)
    program = [str(REPOSITORY / row.program)]
    if row.program.startswith("-m "):
        program = row.program.split()
        environment["PYTHONPATH"] = str(REPOSITORY)
    result = subprocess.run(
        [sys.executable, "-B", *program, *command_line(row, files)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=cwd,
        timeout=SECONDS,
        stdin=subprocess.DEVNULL,
    )
    return Ending([result.returncode], result.stdout + result.stderr)


def run_launched(row: Row, files: Path, cwd: Path, logs: Path) -> Ending:
    """Starts all ranks of a row at once, from the fork server."""
    args = (row.program, command_line(row, files), dict(row.environment), str(cwd))
    job = run_ranks(logs, _start_in, args, row.ranks, timeout=SECONDS)
    return Ending(job.exit_codes, job.output)


def _start_in(program: str, argv: list[str], environment: dict[str, str], cwd: str) -> None:
    os.environ.update(environment)
    os.chdir(cwd)
    _run_program(program, argv)


def _run_program(program: str, argv: list[str]) -> None:
    sys.argv = [program, *argv]
    if program.startswith("-m "):
        runpy.run_module(program.removeprefix("-m "), run_name="__main__", alter_sys=True)
    else:
        # As for a script that is started: its own folder comes first.
        path = REPOSITORY / program
        sys.path.insert(0, str(path.parent))
        runpy.run_path(str(path), run_name="__main__")


class OneProcess:
    """A process that runs one row after the other, each as if it were the first.

    The CPU device and Megatron are imported in it already. Ranks of a row take their turns: none
    of them gets as far as to look for another. What does not end as a refusal may have left
    anything behind, so that the process ends with it, and the next row gets a new one.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: Any = None
        self._connection: Any = None

    def run(self, row: Row, files: Path, cwd: Path) -> Ending:
        """Runs a row, rank by rank."""
        codes: list[int | None] = []
        output = ""
        for rank in range(row.ranks):
            environment = dict(row.environment)
            if row.program == MAIN:  # the others are started without a launcher
                environment = launcher_variables(rank, row.ranks, port=29500) | environment
            codes.append(self._ask(row.program, command_line(row, files), environment, str(cwd)))
            output += self._log.read_text()
        return Ending(codes, output)

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None

    def _ask(self, *request: Any) -> int | None:
        if self._process is None:
            self._process, self._connection = fork(_answer, str(self._log))
        self._connection.send(request)
        code = None
        with contextlib.suppress(EOFError):
            if self._connection.poll(SECONDS):
                code = self._connection.recv()
        if code != 2:
            self.close()
        return code


def _answer(requests: Connection, log: str) -> None:
    """Runs the programs that are asked for, and answers with their exit codes."""
    for name in _LAUNCHER:
        os.environ.pop(name, None)
    output = os.open(log, os.O_RDWR | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    with contextlib.suppress(EOFError):
        while True:
            program, argv, environment, cwd = requests.recv()
            os.ftruncate(output, 0)
            os.lseek(output, 0, os.SEEK_SET)
            with _as_new(environment, cwd):
                code = _exit_code(program, argv)
            requests.send(code)


def _exit_code(program: str, argv: list[str]) -> Any:
    try:
        _run_program(program, argv)
    except SystemExit as end:
        return end.code
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


@contextlib.contextmanager
def _as_new(environment: dict[str, str], cwd: str) -> Iterator[None]:
    """Takes back afterwards what a program sets in its process before it trains."""
    import torch
    from megatron.core import parallel_state
    from megatron.training import global_vars

    from megatron_prores.upstream.registry import undone_afterwards

    before = dict(os.environ), os.getcwd(), sys.argv, list(sys.path)
    os.environ.update(environment)
    os.chdir(cwd)
    try:
        with undone_afterwards():
            yield
    finally:
        global_vars.unset_global_variables()
        if torch.distributed.is_initialized():  # a refusal of --save comes after it
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os.environ.clear()
        os.environ.update(before[0])
        os.chdir(before[1])
        sys.argv, sys.path[:] = before[2], before[3]


def listing(*directories: Path) -> dict[str, str]:
    """Lists everything below the directories, files with their content."""
    found = {}
    for directory in directories:
        for path in sorted(directory.rglob("*")):
            content = path.read_bytes() if path.is_file() else b"directory"
            found[str(path)] = hashlib.sha256(content).hexdigest()
    return found


def shown_difference(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Names what was written, changed or removed between two listings."""
    return sorted({path for path, _ in before.items() ^ after.items()})


def assert_refused(row: Row, ending: Ending) -> None:
    """Judges how a row ended."""
    shown = ending.output[-3000:]
    assert ending.exit_codes == [2] * row.ranks, shown
    assert "Traceback" not in ending.output, shown
    # One node: one line, whatever the number of ranks.
    errors = [line for line in ending.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, shown
    assert all(word in errors[0] for word in row.words), errors[0]
