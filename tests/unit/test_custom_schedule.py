"""A user's own schedule from a file: what it gives, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from megatron_prores.command_line.arguments import read_prores_flags
from megatron_prores.config.prores_config import ProResConfig
from megatron_prores.schedule.custom import MAX_FILE_BYTES, load_schedule
from megatron_prores.schedule.formulas import alphas
from megatron_prores.warmup.audit import report_of
from megatron_prores.warmup.residual_warmup import ResidualWarmup
from tests.unit.complaints import complaint_of

STEPS = [10, 20, 50]
TABLE = [[0.1, 0.0, 0.3], [1.0, 0.7, 0.3], [1.0, 1.0, 0.2]]
CSV = "step,1,2,3\n10,0.1,0,0.3\n20,1,0.7,0.3\n50,1.0,1.0,2e-1\n"
JSON = json.dumps({"steps": STEPS, "alpha": TABLE})


def file_config(directory: Path, text: str | bytes, name: str = "alpha.csv") -> ProResConfig:
    path = directory / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    config = ProResConfig(schedule=f"file:{path}")
    config.load()
    return config


@pytest.mark.parametrize(("name", "text"), [("a.csv", CSV), ("a.json", JSON), ("A.JSON", JSON)])
def test_a_row_is_given_exactly_and_between_rows_a_straight_line(
    name: str, text: str, tmp_path: Path
) -> None:
    config = file_config(tmp_path, text, name)
    for step, row in zip(STEPS, TABLE, strict=True):
        assert config.alphas(step, 3).tolist() == row
    assert config.alphas(15, 3) == pytest.approx([0.55, 0.35, 0.3], abs=1e-15)
    assert config.alphas(23, 3) == pytest.approx([1.0, 0.73, 0.29], abs=1e-15)
    assert config.alphas(15, 3).dtype == np.float64


def test_the_first_row_holds_before_it_and_the_last_after_it(tmp_path: Path) -> None:
    config = file_config(tmp_path, CSV)
    for step in (0, 9):
        assert config.alphas(step, 3).tolist() == TABLE[0]
    for step in (51, 10**12):
        assert config.alphas(step, 3).tolist() == TABLE[-1]


def test_csv_and_json_with_the_same_numbers_are_the_same_schedule(tmp_path: Path) -> None:
    csv, json_ = file_config(tmp_path, CSV), file_config(tmp_path, JSON, "alpha.json")
    for step in range(60):
        assert csv.alphas(step, 3).tolist() == json_.alphas(step, 3).tolist()


def test_a_spreadsheets_csv_is_read(tmp_path: Path) -> None:
    text = "\ufeff" + CSV.replace("\n", "\r\n").replace("10,", " 10.0 , ") + "\r\n"
    assert file_config(tmp_path, text).alphas(10, 3).tolist() == TABLE[0]


def test_the_corners_of_linear_give_linear(tmp_path: Path) -> None:
    rows = [[step, *alphas("linear", step, 4, 400)] for step in (0, 100, 200, 300, 400)]
    text = "\n".join(",".join(map(str, row)) for row in [["step", 1, 2, 3, 4], *rows])
    config = file_config(tmp_path, text)
    for step in range(500):
        assert config.alphas(step, 4) == pytest.approx(alphas("linear", step, 4, 400), abs=1e-15)
    assert config.opening_steps(4) == [100, 200, 300, 400]
    assert config.total_warmup(4) == 400


def test_a_layer_opens_where_it_stays_open(tmp_path: Path) -> None:
    text = "step,1,2,3,4,5\n5,1,1,1,0,1\n8,1,0.5,1,0.5,0.999\n13,1,1,0.9,1,1\n20,1,1,0.9,1,0.5\n"
    assert file_config(tmp_path, text).opening_steps(5) == [0, 13, None, 13, None]


def test_rounding_neither_moves_a_row_nor_leaves_the_range(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    table = random.choice([0.0, 5e-324, 1e-17, 0.1, 0.7, 1 - 2**-53, 1.0], (40, 6))
    steps = np.cumsum(random.integers(1, 1000, 40)).tolist()
    text = json.dumps({"steps": steps, "alpha": table.tolist()})
    config = file_config(tmp_path, text, "a.json")
    values = np.array([config.alphas(step, 6) for step in range(steps[-1] + 2)])
    assert (values[steps] == table).all()
    assert values.min() >= 0
    assert values.max() <= 1


def test_what_a_caller_does_to_the_alphas_does_not_reach_the_table(tmp_path: Path) -> None:
    config = file_config(tmp_path, CSV)
    for step in (0, 10, 15, 99):
        before = config.alphas(step, 3).tolist()
        config.alphas(step, 3)[:] = 7
        assert config.alphas(step, 3).tolist() == before


def test_the_file_is_read_once(tmp_path: Path) -> None:
    config = file_config(tmp_path, CSV)
    (tmp_path / "alpha.csv").unlink()
    assert config.alphas(20, 3).tolist() == TABLE[1]


# --- files: what is refused

WRONG_FILES: dict[str, tuple[str, str | bytes, list[str]]] = {
    "empty": ("a.csv", "", ["a.csv: the file is empty"]),
    "blank": ("a.csv", "\n  \n", ["a.csv: the file is empty"]),
    "binary": ("a.csv", b"\x80\x04\x95\xff", ["not UTF-8 text (byte 0)"]),
    "zeros": ("a.csv", bytes(1000), ["the first line must be step,1,2,...,L"]),
    "other ending": ("a.txt", CSV, ["must end in .csv or .json"]),
    "no header": ("a.csv", "0,0.5\n", ["the first line must be step,1,2,...,L", "it is 0,0.5"]),
    "layers from 0": ("a.csv", "step,0,1\n0,0,0\n", ["the first line must be step,1,2,...,L"]),
    "no layer": ("a.csv", "step\n0\n", ["the first line must be step,1,2,...,L"]),
    "semicolons": ("a.csv", CSV.replace(",", ";"), ["first line", "it is step;1;2;3"]),
    "header only": ("a.csv", "step,1,2,3\n", ["no rows"]),
    "short row": ("a.csv", "step,1,2\n0,0,0\n\n5,1\n", ["line 4 has 2 values", "line has 3"]),
    "long row": ("a.csv", "step,1,2\n0,0,0,0\n", ["line 2 has 4 values, the first line has 3"]),
    "open quote": ("a.csv", 'step,1\n0,"0\n', ["not CSV"]),
    "word": ("a.csv", "step,1,2\n0,0,0\n5,1,half\n", ["line 3, layer 2: alpha 'half'", "0 to 1"]),
    "empty cell": ("a.csv", "step,1,2\n0,,0\n", ["line 2, layer 1: alpha ''"]),
    "NaN": ("a.csv", "step,1,2\n0,0,nan\n", ["line 2, layer 2: alpha nan"]),
    "inf": ("a.csv", "step,1,2\n0,inf,0\n", ["line 2, layer 1: alpha inf"]),
    "above 1": ("a.csv", "step,1\n0,1.0000001\n", ["line 2, layer 1: alpha 1.0000001"]),
    "below 0": ("a.csv", "step,1\n0,-0.1\n", ["line 2, layer 1: alpha -0.1"]),
    "step twice": ("a.csv", "step,1\n5,0\n5,1\n", ["line 3: step 5 comes after step 5", "rise"]),
    "steps fall": ("a.csv", "step,1\n5,0\n4,1\n", ["line 3: step 4 comes after step 5"]),
    "negative step": ("a.csv", "step,1\n-5,0\n", ["line 2: step -5", "whole number"]),
    "half a step": ("a.csv", "step,1\n0.5,0\n", ["line 2: step 0.5", "whole number"]),
    "step NaN": ("a.csv", "step,1\nnan,0\n", ["line 2: step nan", "whole number"]),
    "endless step": ("a.csv", "step,1\n1e300,0\n", ["line 2: step 1e+300", "whole number"]),
    "too large": ("a.csv", b"step,1\n" + b"\n" * MAX_FILE_BYTES, ["more than 64 MiB"]),
    "no JSON": ("a.json", CSV, ["not JSON", "line 1 column 1"]),
    "JSON, deep": ("a.json", "[" * 10**6, ["not JSON"]),
    "JSON list": ("a.json", "[[0, 0.5]]", ['must be {"steps"']),
    "JSON other name": ("a.json", '{"step": [0], "alpha": [[0]]}', ['must be {"steps"']),
    "JSON no list": ("a.json", '{"steps": 0, "alpha": [[0]]}', ["'steps' must be a list"]),
    "JSON no rows": ("a.json", '{"steps": [], "alpha": []}', ["no rows"]),
    "JSON fewer steps": ("a.json", '{"steps": [0], "alpha": [[0], [1]]}', ["1 steps", "2 rows"]),
    "JSON flat": ("a.json", '{"steps": [0, 1], "alpha": [0, 1]}', ["row 1 of 'alpha' must be"]),
    "JSON no layer": ("a.json", '{"steps": [0], "alpha": [[]]}', ["row 1 of 'alpha' must be"]),
    "JSON ragged": ("a.json", '{"steps": [0, 1], "alpha": [[0, 0], [1]]}', ["row 2", "1 values"]),
    "JSON NaN": ("a.json", '{"steps": [0], "alpha": [[0, NaN]]}', ["row 1, layer 2: alpha nan"]),
    "JSON inf": ("a.json", '{"steps": [0], "alpha": [[1e999]]}', ["row 1, layer 1: alpha inf"]),
    "JSON text": ("a.json", '{"steps": [0], "alpha": [["0.5"]]}', ["layer 1: alpha '0.5'"]),
    "JSON true": ("a.json", '{"steps": [0], "alpha": [[true]]}', ["layer 1: alpha True"]),
    "JSON null": ("a.json", '{"steps": [null], "alpha": [[0]]}', ["row 1: step None"]),
    "JSON step text": ("a.json", '{"steps": ["0"], "alpha": [[0]]}', ["row 1: step '0'"]),
    "JSON steps fall": ("a.json", '{"steps": [5, 4], "alpha": [[0], [1]]}', ["row 2: step 4"]),
    "JSON huge": ("a.json", '{"steps": [0], "alpha": [[1%s]]}' % ("0" * 400), ["layer 1: alpha 1"]),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_a_wrong_file_is_refused_with_the_place_of_the_fault(case: str, tmp_path: Path) -> None:
    name, text, words = WRONG_FILES[case]
    complaint = complaint_of(file_config, tmp_path, text, name)
    assert str(tmp_path / name) in complaint
    assert all(word in complaint for word in words), complaint
    assert len(complaint) < len(str(tmp_path)) + 250


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    def load(name: str) -> str:
        return complaint_of(load_schedule, f"file:{tmp_path / name}")

    assert "No such file" in load("absent.csv")
    (tmp_path / "folder.csv").mkdir()
    assert "not a file" in load("folder.csv")
    os.mkfifo(tmp_path / "pipe.csv")  # reading it would wait for ever
    assert "not a file" in load("pipe.csv")
    assert "must end in .csv or .json" in complaint_of(load_schedule, "file:")


def test_a_table_for_another_number_of_layers_is_refused_as_soon_as_both_are_known(
    tmp_path: Path,
) -> None:
    schedule = file_config(tmp_path, CSV).schedule
    flags = ["--prores-schedule", schedule]
    complaint = complaint_of(read_prores_flags, [*flags, "--num-layers", "4"])
    assert "3 layers, the model has 4 (--num-layers)" in complaint
    config, _ = read_prores_flags([*flags, "--num-layers", "3"])
    assert "has 4" in complaint_of(config.alphas, 0, 4)
    assert "has 4" in complaint_of(config.check_layers, 4)


@pytest.mark.parametrize("flag", ["--prores-warmup-iters", "--prores-warmup-iters-per-layer"])
def test_a_warmup_length_beside_a_file_is_refused(flag: str, tmp_path: Path) -> None:
    schedule = file_config(tmp_path, CSV).schedule
    complaint = complaint_of(read_prores_flags, ["--prores-schedule", schedule, flag, "5"])
    assert flag in complaint
    assert "steps are those of the file" in complaint


def test_the_digest_is_that_of_the_file(tmp_path: Path) -> None:
    assert file_config(tmp_path, CSV).schedule_digest == hashlib.sha256(CSV.encode()).hexdigest()
    assert ProResConfig(schedule="linear").schedule_digest is None


def test_the_audit_tells_apart_two_files_of_the_same_name(tmp_path: Path) -> None:
    reports = []
    for text in (CSV, CSV.replace("50,", "51,"), CSV):
        config = file_config(tmp_path, text)
        reports.append(report_of(ResidualWarmup(config, 3, []), 0, 0, [0]))
    assert reports[0].settings == reports[2].settings
    assert reports[0].settings != reports[1].settings
