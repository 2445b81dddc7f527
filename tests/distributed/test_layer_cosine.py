"""How layers turned between two checkpoints: the tool against hidden states of transformers."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megatron_prores.evaluation import layer_cosine
from megatron_prores.evaluation.exported import CACHE, load_model
from tests.distributed.conftest import MODEL, WARMUP, Text
from tests.distributed.launch import REPOSITORY, run_job

TEXT = "def main(argv):\n    return sorted(argv)\n" * 20
PLACES = {
    **{"checkpoints": "saved", "data/valid.jsonl": "text", "10000": "3", "100000": "6"},
    "4096": "150",  # tokens: two whole sequences of 64, and a part that is left out
}
"""Words of the page's command -> those of the test."""


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
    text: Text,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved = tmp_path / "saved"
    flags = [*MODEL, *text.flags, *WARMUP, "--train-iters", "6", "--save-interval", "3"]
    job = run_job(tmp_path, [*flags, "--save", str(saved), "--no-save-optim", "--lr", "1e-2"])
    assert job.succeeded, job.output[-3000:]
    (tmp_path / "text").write_text(TEXT)
    # The command of the page, on these files.
    page = (REPOSITORY / "docs/measurements.md").read_text()
    command = page.partition("tools/layer_cosine.py --load")[2].partition("```")[0]
    argv = [
        PLACES.get(word, word) for word in shlex.split(f"--load {command}".replace("\\\n", " "))
    ]
    monkeypatch.chdir(tmp_path)
    layer_cosine.main(argv)
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
    layer_cosine.main([*argv, "--ckpt-step", "6"])  # a checkpoint with itself
    assert json.loads((tmp_path / "cosine.json").read_text())["cosine"] == pytest.approx([1.0] * 4)
