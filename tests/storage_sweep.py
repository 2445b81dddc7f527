#!/usr/bin/env python3
"""Saves and loads checkpoints on a disk that fails, one call after the other, in every way.

    python tests/storage_sweep.py           # every call of a save and of a load, with every error
    python tests/storage_sweep.py --short   # as the tests run it

A run on the CPU device saves a checkpoint again and again. Each time one more of its calls (open,
write, fsync, close, rename) fails, is short, or takes long; then it loads one, with reads that
fail. ``faulty_storage.c`` does that, preloaded. Prints a table. Exit code 0: whatever failed, the
run said so in one line or the checkpoint was whole; the tracker file never named one that is not
whole, and no manifest ever stood in one that it contradicts; and each save went well once the disk
did; else 1.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    root = str(Path(__file__).resolve().parents[1])
    sys.path.insert(0, root)
    # The fork server that starts the ranks finds the project as well.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))

from tests.distributed.launch import run_job

SOURCE = Path(__file__).resolve().with_name("faulty_storage.c")

SAVING = ("open", "write", "sync", "close", "rename")
ERRORS = ("EIO", "ENOSPC", "EDQUOT", "EROFS", "ESTALE", "EMFILE")
SHORT = "short"
"""A call that takes or brings half of what it was asked for, which is no error."""
SLOW = "slow"
"""Every call takes 20 ms."""

RUN = """
    --device cpu --num-layers 1 --hidden-size 16 --ffn-hidden-size 16 --num-attention-heads 2
    --seq-length 16 --max-position-embeddings 16 --micro-batch-size 2 --global-batch-size 4
    --normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --lr 2e-3 --lr-decay-style constant --log-interval 1 --eval-interval 1000 --eval-iters 0
    --mock-data --tokenizer-type NullTokenizer --vocab-size 127 --num-workers 0
    --prores-schedule linear --prores-warmup-iters 16
""".split()
ASYNC = "--async-save --use-persistent-ckpt-worker --async-strategy mcore".split()


@dataclass(frozen=True)
class Fault:
    """What happens to the calls of one kind, on files below a directory."""

    kind: str
    call: int
    """Which of them, counted from 1; 0: all."""
    how: str
    """Name of an errno, SHORT, or SLOW."""

    def begin(self, directory: Path) -> None:
        """Let it happen from now on."""
        number = {SHORT: -1, SLOW: 0}.get(self.how) or getattr(errno, self.how, 0)
        wait = 20_000 if self.how == SLOW else 0
        last = self.call or 10**9
        arm(self.kind, directory, self.call, last, number, wait)

    @contextmanager
    def on(self, directory: Path) -> Iterator[None]:
        """Let it happen meanwhile."""
        self.begin(directory)
        try:
            yield
        finally:
            arm("", directory)


def arm(
    kind: str, path: Path, first: int = 0, last: int = 0, error: int = 0, wait: int = 0
) -> None:
    """Call ``faulty_storage`` of the preloaded library."""
    arguments = (kind.encode(), os.fsencode(path), *map(ctypes.c_long, (first, last)))
    ctypes.CDLL(None).faulty_storage(*arguments, ctypes.c_int(error), ctypes.c_long(wait))


def calls() -> int:
    """Return how many calls were looked at since the last arming."""
    counted: int = ctypes.CDLL(None).faulty_storage_calls()
    return counted


def faults(kind: str, count: int, short: bool) -> Iterator[Fault]:
    """Draw up the faults of one kind of call, of which a save or a load makes ``count``."""
    if kind in ("read", "write"):
        yield Fault(kind, 0, SHORT)
    yield Fault(kind, 0, SLOW)
    numbers = range(1, count + 1)
    if short:  # the first, the last, and some between; each error is somebody's
        numbers = sorted({1, count, *range(3, count, max(1, count // 4))})
    for turn, number in enumerate(numbers):
        for how in ERRORS if not short else (ERRORS[turn % len(ERRORS)],):
            yield Fault(kind, number, how)


@dataclass
class Sweep:
    """Put into a rank: saves and loads under faults where the run would save its checkpoint."""

    save: Path
    report: Path
    short: bool

    def __call__(self) -> None:
        from megatron.training import training

        from megatron_prores.upstream.registry import wrap

        wrap(training, "save_checkpoint", ("iteration",), self._save)

    def _save(self, stock: Callable[..., Any], named: dict[str, Any]) -> Any:
        if self.report.exists():  # within the sweep
            return stock()
        self.report.touch()
        self.named = named
        rows: list[tuple[str, str, str]] = []
        iteration = self._save_well(named["iteration"])
        for kind in SAVING:
            arm(kind, self.save, 1, 0)
            iteration = self._save_well(iteration)
            for fault in faults(kind, calls(), self.short):
                rows.append((kind, fault.how, self._save_badly(fault, iteration)))
                iteration = self._save_well(iteration)
        for name in os.listdir(self.save / f"iter_{iteration - 1:07d}"):
            arm("sync", Path(f"{iteration:07d}", name), 1, 0)
            iteration = self._save_well(iteration)
            rows.append(("files synced", name, "whole" if calls() else "WRONG: it was not"))
        rows += self._load_all(iteration - 1)
        self.report.write_text(json.dumps(rows))
        return None

    def _call_save(self, iteration: int) -> None:
        from megatron.training import training

        training.save_checkpoint(**{**self.named, "iteration": iteration})

    def _save_well(self, iteration: int) -> int:
        """Save an iteration, perhaps over what an interrupted save has left; return the next."""
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        queue = filesystem_async.get_write_results_queue()
        while not queue.empty():  # what a run that has ended does not leave
            queue.get()
        self._call_save(iteration)
        assert self._problem(iteration) == "", self._problem(iteration)
        for old in sorted(self.save.glob("iter_*"))[:-1]:
            shutil.rmtree(old)
        return iteration + 1

    def _problem(self, tracked_at_least: int) -> str:
        """Say what a checkpoint that claims to be whole is not; empty where all are."""
        from megatron_prores.checkpoint import manifest, reader
        from megatron_prores.checkpoint.verify import verify

        tracked = reader.tracked(self.save)
        if not isinstance(tracked, int) or tracked < tracked_at_least:
            return f"the tracker names {tracked}, not {tracked_at_least}"
        for iteration, directory in reader.iterations(self.save).items():
            claims = iteration == tracked or (directory / manifest.NAME).exists()
            if claims and (damage := verify(directory).damage):
                return f"{directory.name} claims to be whole: {damage[0]}"
        return ""

    def _save_badly(self, fault: Fault, iteration: int) -> str:
        from megatron_prores.errors import StopRun

        outcome = "whole"
        try:
            with fault.on(self.save):
                self._call_save(iteration)
        except StopRun as error:
            outcome = "told" if "could not be saved: " in str(error) else f"told: {error}"
            if fault.how in (SHORT, SLOW):
                outcome = f"WRONG: {error}"
        except BaseException as error:
            return f"WRONG: {type(error).__name__}: {error}"
        problem = self._problem(iteration if outcome == "whole" else iteration - 1)
        return f"WRONG: {problem}" if problem else outcome

    def _load_all(self, iteration: int) -> list[tuple[str, str, str]]:
        rows = []
        for kind in ("open", "read"):
            arm(kind, self.save, 1, 0)
            assert self._load(iteration) == "whole"
            for fault in faults(kind, calls(), self.short):
                with fault.on(self.save):
                    outcome = self._load(iteration)
                rows.append((f"{kind} at load", fault.how, outcome))
        return rows

    def _load(self, iteration: int) -> str:
        """Load into weights that were set to zero."""
        import torch
        from megatron.training import training

        from megatron_prores.checkpoint import guard
        from megatron_prores.errors import StopRun

        model = self.named["model"]
        before = [parameter.detach().clone() for parameter in model[0].parameters()]
        guard._verified.clear()
        with torch.no_grad():
            for parameter in model[0].parameters():
                parameter.zero_()
        rest = (self.named["optimizer"], self.named["opt_param_scheduler"])
        try:
            loaded, *_ = training.load_checkpoint(model, *rest)
            same = all(map(torch.equal, before, model[0].parameters()))
            return "whole" if same and loaded == iteration else "WRONG: other weights"
        except StopRun:
            return "told"
        except BaseException as error:
            return f"WRONG: {type(error).__name__}: {error}"
        finally:
            with torch.no_grad():
                for parameter, old in zip(model[0].parameters(), before, strict=True):
                    parameter.copy_(old)


@dataclass(frozen=True)
class FailLater:
    """Put into the ranks of a real run: a fault that lies in wait for its first checkpoint."""

    fault: Fault
    save: Path

    def __call__(self) -> None:
        self.fault.begin(self.save / "iter_0000004")


def run_once(work: Path, fault: Fault, more: list[str]) -> str:
    """Run two ranks whose checkpoint of iteration 4 meets a fault, and say what came of it."""
    from megatron_prores.checkpoint import reader
    from megatron_prores.checkpoint.verify import verify

    save = work / "save"
    flags = [*RUN, *more, "--pipeline-model-parallel-size", "1", "--train-iters", "6"]
    flags += ["--use-distributed-optimizer", "--save", str(save), "--save-interval", "2"]
    job = run_job(work, flags, ranks=2, prepare=FailLater(fault, save))
    told = job.errors
    whole = {i for i, path in reader.iterations(save).items() if verify(path).intact}
    if job.succeeded and reader.tracked(save) == 6 and whole == {2, 4, 6}:
        return "whole"
    if job.exit_codes == [1, 1] and len(told) == 1 and reader.tracked(save) == 2 and whole == {2}:
        return "told"
    return f"WRONG: codes {job.exit_codes}, whole {whole}, said {told}; see {work}"


def sweep(work: Path, short: bool) -> Counter[tuple[str, str, str]]:
    """Run all of it in a directory; needs the library preloaded.

    Returns:
        (which call, what happened to it, what came of it) -> how often.
    """
    save, report = work / "save", work / "report.json"
    flags = [*RUN, "--train-iters", "1", "--save", str(save), "--load", str(save)]
    flags += ["--save-interval", "1"]
    timeout = 240 if short else 7200
    job = run_job(work / "job", flags, prepare=Sweep(save, report, short), timeout=timeout)
    assert job.succeeded, job.output[-3000:]
    rows = Counter(tuple(row) for row in json.loads(report.read_text()))
    runs = [("write", 3, "EIO", ASYNC), ("sync", 1, "ENOSPC", []), ("write", 0, SLOW, ASYNC)]
    for number, (kind, call, how, more) in enumerate(runs if not short else runs[:1]):
        outcome = run_once(work / f"run{number}", Fault(kind, call, how), more)
        saving = "2 ranks, async" if more else "2 ranks"
        rows[f"{kind}, {saving}", how, outcome] += 1
    return rows


def table(rows: Counter[tuple[str, str, str]]) -> str:
    """Lay the outcomes out: a row per kind of call, and what is wrong in full."""
    lines = [f"{'call':<22}{'faults':>8}{'said so':>9}{'whole':>7}{'WRONG':>7}"]
    for kind in dict.fromkeys(row[0] for row in rows):
        mine = {row[1:]: count for row, count in rows.items() if row[0] == kind}
        told, whole, wrong = (
            sum(count for (_, outcome), count in mine.items() if outcome.startswith(word))
            for word in ("told", "whole", "WRONG")
        )
        lines.append(f"{kind:<22}{sum(mine.values()):>8}{told:>9}{whole:>7}{wrong:>7}")
    lines += [f"{kind}, {how}: {what}" for kind, how, what in rows if what.startswith("WRONG")]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    made.add_argument("--short", action="store_true", help="some calls, each with one error")
    made.add_argument("--work", type=Path, help="keep everything in this new directory")
    return made


def main() -> int:
    """Compile and preload the library, and run the sweep."""
    args = parser().parse_args()
    work = (args.work or Path(tempfile.mkdtemp(prefix="storage-sweep-"))).absolute()
    library = work / "faulty_storage.so"
    if os.environ.get("LD_PRELOAD") != str(library):
        work.mkdir(parents=True, exist_ok=True)
        build = ["gcc", "-O1", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"]
        subprocess.run(build, check=True)
        os.environ["LD_PRELOAD"] = str(library)
        os.execv(
            sys.executable,
            [sys.executable, *sys.argv, *([] if args.work else ["--work", str(work)])],
        )
    rows = sweep(work, args.short)
    print(table(rows))
    return any(outcome.startswith("WRONG") for *_, outcome in rows)


if __name__ == "__main__":
    sys.exit(main())
