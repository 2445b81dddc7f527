"""The tool for checkpoints: what it shows, what damage it finds, and that it executes nothing."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prores.checkpoint import tool
from megatron_prores.errors import UserError
from tests.unit import stored

NONFINITE = {"decoder.weight": torch.tensor([1.0, float("nan"), float("inf")])}


@pytest.fixture(autouse=True)
def _restore(monkeypatch: pytest.MonkeyPatch) -> None:
    stored.unguard_loading(monkeypatch)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two checkpoints, of iterations 2 and 4."""
    return stored.make_two(tmp_path / "saved")


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str]:
    code = tool.main([str(word) for word in argv])
    return code, capsys.readouterr().out


def run_json(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, dict[str, Any]]:
    code, output = run(capsys, *argv, "--json")
    return code, json.loads(output)


def test_list_shows_layout_and_the_warmup_of_each_layer(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, output = run(capsys, "list", root)
    assert code == 0
    assert "TP 2, PP 1, DP 3, ranks 6" in output
    # W = 8 over 4 layers, linear: layer l opens at iteration 2 l.
    assert "after 4 iterations 2 of 4 layers are fully open" in output
    assert "alpha of layer 1-2: 1, 3: 0.6667, 4: 0.5" in output
    assert output.count("the newest, by the tracker file") == 1


def test_list_as_json(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, content = run_json(capsys, "list", root)
    assert content["newest"] == "iter_0000004"
    first, second = content["checkpoints"]
    assert first["warmup"]["alphas"] == pytest.approx([1, 0.5, 1 / 3, 0.25])
    assert second["warmup"]["opens_at"] == [2, 4, 6, 8]
    assert second["size"] == sum(p.stat().st_size for p in (root / "iter_0000004").iterdir())


def test_a_checkpoint_that_the_tracker_does_not_name_yet_is_the_newest(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "latest_checkpointed_iteration.txt").write_text("2")
    code, output = run(capsys, "verify", root)
    assert code == 0
    assert "note: latest_checkpointed_iteration.txt still names iteration 2" in output
    output = run(capsys, "list", root)[1]
    assert output.count("the newest, by its manifest") == 1
    assert run(capsys, "diff", root, root / "iter_0000004")[0] == 0


def test_list_runs_no_code_that_a_checkpoint_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "harmful.py").write_text(f"import os; os.mkdir({str(tmp_path / 'marker')!r})")
    monkeypatch.syspath_prepend(tmp_path)
    settings = {"--prores-schedule": "harmful:alpha"}
    stored.make(tmp_path / "saved", 2, prores_schedule="harmful:alpha", prores_settings=settings)
    _, output = run(capsys, "list", tmp_path / "saved")
    assert "the code of harmful:alpha is not run" in output
    assert not (tmp_path / "marker").exists()


def test_list_of_stock_megatrons_checkpoint(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "Namespace", lambda **_: Namespace(num_layers=4))
    stored.make(tmp_path / "stock", 2)
    assert "saved by stock Megatron" in run(capsys, "list", tmp_path / "stock")[1]


def test_verify_an_intact_directory(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = stored.snapshot(root)
    code, content = run_json(capsys, "verify", root)
    assert code == 0
    assert content["newest_intact"] == "iter_0000004"
    for report in content["checkpoints"].values():
        assert report["intact"]
        assert report["by_manifest"]
        assert report["tensors"] == 2
    assert stored.snapshot(root) == before


SHARD = "__0_0.distcp"
FILES = (SHARD, ".metadata", "metadata.json", "integrity.json")
DAMAGES = {"flipped": stored.flip_bit, "truncated": stored.truncate, "missing": Path.unlink}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", DAMAGES)
def test_verify_finds_every_damage(
    name: str, how: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGES[how](root / "iter_0000004" / name)
    code, output = run(capsys, "verify", root)
    if (name, how) == ("integrity.json", "missing"):
        assert code == 0
        assert "no integrity.json in it" in output
        return
    assert code == 1
    named = [line for line in output.splitlines() if line.startswith("DAMAGED iter_0000004: ")]
    # A flipped bit in the manifest may sit in the sum of another file.
    assert named
    assert name in named[0] or name == "integrity.json"
    assert "intact  iter_0000002" in output
    assert output.endswith("The newest intact checkpoint is iter_0000002.\n")


# A flipped bit in the other files is told by nothing but the manifest.
@pytest.mark.parametrize(
    ("name", "how"),
    [
        (SHARD, stored.flip_weight),
        *((name, how) for name in FILES[:-1] for how in (stored.truncate, Path.unlink)),
    ],
)
def test_verify_finds_damage_without_a_manifest(
    name: str, how: Callable[[Path], None], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "iter_0000004" / "integrity.json").unlink()
    how(root / "iter_0000004" / name)
    code, output = run(capsys, "verify", root)
    assert code == 1
    assert "DAMAGED iter_0000004: " in output


def test_verify_finds_values_that_are_not_finite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored.make(tmp_path / "saved", 2, NONFINITE)
    code, output = run(capsys, "verify", tmp_path / "saved")
    assert code == 1
    assert "decoder.weight has 2 values that are not finite" in output


def test_verify_one_iteration(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored.flip_bit(root / "iter_0000004" / SHARD)
    assert run(capsys, "verify", root, "--ckpt-step", 2)[0] == 0
    assert run(capsys, "verify", root / "iter_0000002")[0] == 0
    assert run(capsys, "verify", root / "iter_0000004")[0] == 1
    with pytest.raises(UserError, match="no checkpoint of that iteration"):
        tool.main(["verify", str(root), "--ckpt-step", "3"])


def test_diff(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "diff", root, root / "iter_0000004")[0] == 0
    code, content = run_json(capsys, "diff", root / "iter_0000002", root / "iter_0000004")
    assert code == 1
    assert content["values"] == [{"name": "step", "count": 1, "largest": 2.0}]
    assert content["equal"] == 1
    other = {"decoder.weight": torch.zeros(3, 2), "head": torch.ones(1)}
    stored.make(tmp_path / "other", 4, other, prores_warmup_iters=12)
    code, content = run_json(capsys, "diff", root, tmp_path / "other")
    assert code == 1
    assert content["arguments"] == {"prores_warmup_iters": ["8", "12"]}
    assert (content["only_a"], content["only_b"]) == (["step"], ["head"])
    assert content["kinds"] == {"decoder.weight": ["torch.float32 [2, 3]", "torch.float32 [3, 2]"]}


@pytest.mark.parametrize("command", ["list", "verify", "diff"])
def test_no_checkpoint(command: str, tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "absent", tmp_path / "iter_0000002"):
        with pytest.raises(UserError, match=r"no checkpoint|cannot be read"):
            tool.main([command, str(place), *([str(place)] if command == "diff" else [])])


@pytest.mark.parametrize("where", stored.PLANTS)
def test_nothing_in_a_checkpoint_is_executed_by_the_tool(
    where: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "marker"
    stored.plant(root / "iter_0000004", where, marker)
    code, output = run(capsys, "verify", root)
    assert code == 1
    if where in (".metadata", "arguments in a shard", "tensor in a shard", "common.pt"):
        assert "io.open, which no checkpoint needs" in output
    assert run(capsys, "list", root)[0] == 0
    for path in (root, root / "iter_0000004"):
        if where not in ("metadata.json", "integrity.json") and (
            where != "tracker" or path == root
        ):
            with pytest.raises(UserError):
                tool.main(["diff", str(path), str(root / "iter_0000002")])
    assert not marker.exists()
