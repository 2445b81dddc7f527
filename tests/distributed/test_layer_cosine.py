"""How layers turned between two checkpoints: the tool against hidden states of transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megatron_prores.evaluation import layer_cosine
from megatron_prores.evaluation.exported import CACHE, load_model
from tests.distributed.conftest import MODEL, WARMUP, Text
from tests.distributed.launch import run_job

TEXT = "def main(argv):\n    return sorted(argv)\n" * 20
TOKENS = 150  # two whole sequences of 64, and a part that is left out


def added(directory: Path) -> NDArray[np.float32]:
    """Compute what each layer but the last adds to the stream: [layers - 1, tokens, h]."""
    model, tokenizer = load_model(directory, "cpu")
    ids = torch.tensor(tokenizer(TEXT, add_special_tokens=False)["input_ids"][:128]).view(2, 64)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    # The last of them is behind the final norm.
    streams = np.stack([state.flatten(0, 1).numpy() for state in states[:-1]])
    return streams[1:] - streams[:-1]


def test_the_tool_prints_the_cosine_of_what_layers_add(
    text: Text, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "saved"
    flags = [*MODEL, *text.flags, *WARMUP, "--train-iters", "6", "--save-interval", "3"]
    job = run_job(tmp_path, [*flags, "--save", str(saved), "--no-save-optim", "--lr", "1e-2"])
    assert job.succeeded, job.output[-3000:]
    (tmp_path / "text").write_text(TEXT)
    argv = ["--load", str(saved), "--text", str(tmp_path / "text"), "--tokens", str(TOKENS)]
    argv += ["--json", str(tmp_path / "cosine.json"), "--output", str(tmp_path / "cosine.png")]
    layer_cosine.main([*argv, "--ckpt-step", "3", "--other-step", "6"])
    found = json.loads((tmp_path / "cosine.json").read_text())
    assert found["iterations"] == [3, 6]
    assert found["tokens"] == 128
    one, other = (added(saved / CACHE / f"iter_000000{step}-fp32") for step in (3, 6))
    norms = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    expected = ((one * other).sum(-1) / norms).mean(-1)
    assert found["cosine"][:-1] == pytest.approx(expected, abs=1e-5)
    assert all(0 < cosine < 0.999 for cosine in found["cosine"])
    printed = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert printed == [[str(n), f"{c:.4f}"] for n, c in enumerate(found["cosine"], start=1)]
    assert (tmp_path / "cosine.png").read_bytes().startswith(b"\x89PNG")
    layer_cosine.main([*argv, "--other-step", "6"])  # the newest with itself
    assert json.loads((tmp_path / "cosine.json").read_text())["cosine"] == pytest.approx([1.0] * 4)
