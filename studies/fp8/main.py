"""The study: trains every combination in a process of its own, then writes what was found."""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_prores.errors import UserError
from studies.fp8 import report
from studies.fp8.options import VOCAB_SIZE, Options, read_options
from studies.fp8.run import Spec, train

_REPOSITORY = Path(__file__).resolve().parents[2]


def main() -> None:
    """Run what the command line asks for, and write NAME.json, NAME.md and NAME.png.

    Raises:
        UserError: A flag is wrong, or a run failed.
    """
    argv = sys.argv[1:]
    options = read_options(argv)
    _check_device(options.device)
    try:
        options.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {options.output_dir}: {error.strerror}") from error
    _make_data(options.data_dir, options.counts["corpus-megabytes"])
    document: dict[str, Any] = {"header": _header(options, argv), "runs": []}
    specs = options.specs()
    for number, spec in enumerate(specs, start=1):
        start = time.monotonic()
        with tempfile.TemporaryDirectory(dir=options.output_dir) as directory:
            run = _run_apart(spec, Path(directory), options.counts["threads"])
        document["runs"].append(run)
        # What is there is kept, should a later run fail.
        report.write_json(options.output_dir / f"{options.name}.json", document)
        words = f"{spec.placement}, {spec.schedule}, {spec.recipe}, seed {spec.seed}"
        print(f"{number}/{len(specs)} {words}: {time.monotonic() - start:.0f} s", flush=True)
    text = report.as_text(document)
    (options.output_dir / f"{options.name}.md").write_text(text)
    print(text)

    from studies.fp8 import picture

    picture.draw(document, options.output_dir / f"{options.name}.png")


def _check_device(name: str) -> None:
    from megatron_prores.environment import is_installed

    if name == "cpu":
        return
    import torch

    if not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU here; --device cpu emulates the recipes")
    if not is_installed("transformer_engine"):
        raise UserError("--device cuda needs Transformer Engine; --device cpu emulates the recipes")


def _make_data(folder: Path, megabytes: int) -> None:
    """Make a small corpus, its tokenizer and its tokens with the project's tools, if missing."""
    if (folder / "train_text_document.idx").is_file() and (folder / "tokenizer.model").is_file():
        return

    def tool(name: str, *args: object) -> None:
        command = [sys.executable, str(_REPOSITORY / "tools" / name), *map(str, args)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            last = (result.stderr.strip() or "no reason given").splitlines()[-1]
            raise UserError(f"--data-dir {folder}: tools/{name} failed: {last}")

    model, text = folder / "tokenizer.model", folder / "train.jsonl"
    size = ("--min-megabytes", megabytes / 2, "--max-megabytes", megabytes)
    tool("build_corpus.py", "--output-dir", folder, *size)
    tool("train_tokenizer.py", "--input", text, "--vocab-size", VOCAB_SIZE, "--output", model)
    tokenizer = ("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model)
    tool(
        *("preprocess_data.py", "--input", text, "--output-prefix", folder / "train"),
        *(*tokenizer, "--append-eod", "--workers", 1),
    )


def _run_apart(spec: Spec, directory: Path, threads: int) -> dict[str, Any]:
    """Train in a new process: Megatron keeps its state for the life of one."""
    # Read by the fork server and by its children alike, wherever the study was started from.
    paths = [str(_REPOSITORY), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, paths)))
    context: Any = multiprocessing.get_context("spawn" if spec.device == "cuda" else "forkserver")
    if spec.device == "cpu":
        context.set_forkserver_preload(["studies.fp8.preload"])
    process = context.Process(target=_child, args=(spec, directory, threads))
    process.start()
    process.join()
    result = directory / "run.json"
    if process.exitcode != 0 or not result.is_file():
        log = (directory / "log").read_text() if (directory / "log").is_file() else ""
        print(log[-4000:], file=sys.stderr)
        raise UserError(
            f"the run with {spec.recipe} on {spec.placement}, {spec.schedule} failed with exit "
            f"code {process.exitcode}; the end of its log is above"
        )
    return dict(json.loads(result.read_text()))


def _child(spec: Spec, directory: Path, threads: int) -> None:
    log = os.open(directory / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import torch

    torch.set_num_threads(threads)
    (directory / "run.json").write_text(json.dumps(train(spec, directory)))


def _header(options: Options, argv: list[str]) -> dict[str, Any]:
    import torch

    real = options.device == "cuda"
    return {
        "command": f"python tools/fp8_study.py {shlex.join(argv)}",
        "recipes are": "Transformer Engine's" if real else "emulated, on the CPU",
        "torch": torch.__version__,
        "megatron-core": importlib.metadata.version("megatron-core"),
        **options.counts,
    }
