"""Exports of checkpoints that real runs saved at other layouts, and what goes on from them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from megatron_prores.convert.export import export, open_checkpoint
from megatron_prores.convert.from_hugging_face import megatron_flags, read_config
from tests.distributed.conftest import OPTIMIZER, Text
from tests.distributed.export_ranks import Model
from tests.distributed.launch import REPOSITORY, Job, run_job, run_ranks
from tests.distributed.test_export import (
    BASE,
    LINEAR,
    TOLERANCE,
    difference,
    import_back,
    logits_of,
    save,
)
from tests.unit.preprocess_helpers import read_dataset

EXPERTS = """
    --num-experts 4 --moe-ffn-hidden-size 96 --moe-router-topk 2
    --moe-token-dispatcher-type allgather
""".split()

LAYOUTS = {
    "pipeline": "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
    "experts": "--expert-model-parallel-size 2",
}
"""Of two ranks each, with the distributed optimizer; name of the model -> flags."""

STEP = 4


def trained(text: Text) -> list[str]:
    """Flags of a run on text, its checkpoint holding the optimizer as well."""
    flags = [flag for flag in BASE if flag not in ("--mock-data", "--no-save-optim")]
    at = flags.index("--tokenizer-type")
    del flags[at : at + 4]
    return [*flags, *text.flags, "--exit-interval", str(STEP)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_at_another_layout(name: str, text: Text, tmp_path: Path) -> None:
    """Its export has the logits of its checkpoint, which one rank of Megatron loads."""
    table = tmp_path / "alpha.json"
    table.write_text(json.dumps({"steps": [2, 6], "alpha": [[1, 0.9, 0.5, 0.1], [1, 1, 1, 0.7]]}))
    schedule = [*LINEAR] if name == "experts" else ["--prores-schedule", f"file:{table}"]
    model = [*trained(text), *(EXPERTS if name == "experts" else []), *schedule]
    root = tmp_path / "saved"
    job = run_job(
        tmp_path / "run", [*model, *LAYOUTS[name].split(), *OPTIMIZER, "--save", str(root)], 2
    )
    assert job.succeeded, job.output[-3000:]

    tokens = torch.randint(0, 512, (2, 32), generator=torch.Generator().manual_seed(2)).tolist()
    again = Model(name, (*model, "--no-load-optim"), (STEP,), load=str(root))
    expected = save(tmp_path / "again", [again], 1, tokens).logits(name, STEP, None)
    source = open_checkpoint(root, schedule=None if name == "experts" else f"file:{table}")
    assert source.iteration == STEP
    assert min(source.alphas) < 0.6
    export(source, tmp_path / "hf", "fp32")
    assert difference(logits_of(tmp_path / "hf", tokens), expected) <= TOLERANCE


@pytest.mark.parametrize("flags", ["--prores-schedule none", "--finetune --prores-restart"])
def test_training_goes_on_from_an_import(flags: str, text: Text, tmp_path: Path) -> None:
    """As it goes on from the checkpoint that was exported, which had no warmup left."""
    model, root = trained(text), tmp_path / "saved"
    short = ["--prores-schedule", "linear", "--prores-warmup-iters", str(STEP)]
    job = run_job(tmp_path / "run", [*model, *short, "--save", str(root)])
    assert job.succeeded, job.output[-3000:]
    export(open_checkpoint(root), tmp_path / "hf", "fp32")
    imported = run_ranks(
        tmp_path / "import", import_back, (str(tmp_path / "hf"), str(tmp_path / "back"))
    )
    assert imported.succeeded, imported.output[-3000:]
    assert set(megatron_flags(read_config(tmp_path / "hf"))) - set(model) <= {
        *("--seq-length", "--norm-epsilon", "1e-05", "--kv-channels", "16", "--rotary-base"),
        *("10000", "--norm-placement", "pre"),
    }

    def go_on(place: Path) -> Job:
        # The schedule of a new run starts at 0 where it restarts.
        return run_job(
            tmp_path / f"from-{place.name}",
            [*model, *(short if "restart" in flags else []), *flags.split(),
             *("--finetune", "--load", str(place), "--no-load-optim")],
        )  # fmt: skip

    first, second = go_on(root), go_on(tmp_path / "back")
    assert first.succeeded, first.output[-3000:]
    assert second.succeeded, second.output[-3000:]
    losses = second.scalars("lm loss")
    assert list(losses) == [1, 2, 3, 4]
    assert losses == first.scalars("lm loss")
    assert losses[1] != job.scalars("lm loss")[1]
    assert second.alphas_by_step() == first.alphas_by_step()


def test_a_byte_level_tokenizer_from_text_to_export(text: Text, tmp_path: Path) -> None:
    corpus = Path(text.flags[text.flags.index("--train-data-path") + 1]).parent
    words = ["--tokenizer-type", "HuggingFaceTokenizer"]
    job = run_ranks(tmp_path / "job", tokenize_in_bytes, (str(corpus), str(tmp_path), words))
    assert job.succeeded, job.output[-3000:]
    words += ["--tokenizer-model", str(tmp_path / "bytes")]
    data = ["--data-path", str(tmp_path / "data_text_document"), "--split", "1,0,0"]
    model = trained(Text([*words, *data, "--num-workers", "0"], []))
    root = tmp_path / "saved"
    run = run_job(tmp_path / "run", [*model, *LINEAR, "--eval-iters", "0", "--save", str(root)])
    assert run.succeeded, run.output[-3000:]
    export(open_checkpoint(root), tmp_path / "hf", "fp32")
    hugging_face = AutoTokenizer.from_pretrained(tmp_path / "hf")
    kept = read_dataset(tmp_path / "data_text_document")[0]
    with (corpus / "valid.jsonl").open() as file:
        document = json.loads(next(file))["text"]
    assert kept == [*hugging_face(document)["input_ids"], hugging_face.eos_token_id]
    assert hugging_face.decode(kept[:-1]) == document
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"]) == (600, 0)


def tokenize_in_bytes(corpus: str, directory: str, words: list[str]) -> None:
    """Calls the tools where Megatron is imported already."""
    from megatron_prores.data import preprocess, tokenizer

    given, model = ["--input", f"{corpus}/valid.jsonl"], f"{directory}/bytes"
    tokenizer.main([*given, "--vocab-size", "600", *words, "--output", model])
    made = ["--output-prefix", f"{directory}/data", "--append-eod", "--workers", "1"]
    preprocess.main([*given, *words, "--tokenizer-model", model, *made])


KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_prores.convert import export as exporting
from safetensors import torch as files

exporting.SHARD_BYTES = 50_000
stock, written = files.save_file, []

def save_file(tensors, path, metadata):
    stock(tensors, path, metadata=metadata)
    written.append(path)
    if len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

files.save_file = save_file
source = exporting.open_checkpoint(Path(sys.argv[1]))
exporting.export(source, Path(sys.argv[2]), "fp32", overwrite=True)
"""


def test_a_killed_export_leaves_the_whole_one_or_none(tmp_path: Path) -> None:
    root = save(tmp_path, [Model("pre", (*BASE, *LINEAR), (4,))], 1).directory / "pre"
    output = tmp_path / "models" / "hf"

    def kill() -> None:
        command = [sys.executable, "-c", KILLED, str(root), str(output)]
        killed = subprocess.run(command, cwd=REPOSITORY, timeout=600)
        assert killed.returncode == -signal.SIGKILL

    kill()
    assert not output.exists()
    export(open_checkpoint(root), output, "fp32")
    assert [path.name for path in output.parent.iterdir()] == ["hf"]
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    kill()
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity}}
"""


def test_scores_follow_a_run(text: Text, tmp_path: Path) -> None:
    """Each checkpoint is scored as it comes; its perplexity falls as the run's loss does."""
    model = Path(text.flags[text.flags.index("--tokenizer-model") + 1])
    documents = (model.parent / "valid.jsonl").read_text().splitlines()
    (tmp_path / "valid.json").write_text(
        json.dumps({"text": json.loads(documents[0])["text"][:600]})
    )
    (tmp_path / "task.yaml").write_text(TASK.format(name="valid", data=tmp_path / "valid.json"))
    root = tmp_path / "saved"
    command = [
        *(sys.executable, "tools/evaluate.py", "--load", str(root), "--tasks", "valid"),
        *("--include-path", str(tmp_path), "--device", "cpu", "--every", "4"),
        *("--wandb-project", "test", "--wandb-exp-name", "scores"),
    ]
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True
    ) as follower:
        flags = [*trained(text)[:-2], *LINEAR, "--save-interval", "2", "--save", str(root)]
        job = run_job(tmp_path / "run", flags)
        assert job.succeeded, job.output[-3000:]
        shown = follower.communicate(timeout=600)[0]
    assert follower.returncode == 0
    assert re.findall(r"^iteration (\d+),", shown, re.MULTILINE) == ["4", "8", "12"]
    scores = json.loads((root / "evaluation" / "results.json").read_text())["scores"]
    perplexity = [scores[step]["valid"]["word_perplexity,none"] for step in ("4", "8", "12")]
    assert perplexity == sorted(perplexity, reverse=True)
    assert (root / "evaluation" / "scores.png").read_bytes().startswith(b"\x89PNG")
    (run,) = (root / "evaluation" / "wandb").glob("offline-run-*/run-*.wandb")
    logged = run.read_bytes()
    assert b"evaluation/valid/word_perplexity" in logged
    assert all(json.dumps(value).encode() in logged for value in perplexity)
