"""The table of the paper's runs: what is wrong in it is found, and README says the same."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_prores.config.placement import PLACEMENTS
from megatron_prores.evaluation import harness
from megatron_prores.schedule.formulas import SCHEDULES
from studies.paper import recipes

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text()


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A table that a test writes in place of the real one."""
    path = tmp_path / "runs.toml"
    monkeypatch.setattr(recipes, "TABLE", path)
    recipes.table.cache_clear()
    yield path
    recipes.table.cache_clear()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("hidden_size = 768", "hiden_size = 768", "hiden_size"),
        ("heads = 12\n", "", "heads"),
        ("post = 5e-4", "peri = 5e-4", "350m"),
        ("{ default = 2, post", "{ pre = 2, post", "by placement, with a default"),
        ("pre = 15.21, post", "pre = 15.21, past", "ablation"),
    ],
)
def test_a_broken_table_is_refused(old: str, new: str, words: str, broken: Path) -> None:
    text = (Path(recipes.__file__).parent / "runs.toml").read_text()
    assert old in text
    broken.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=words):
        recipes.table()


def test_its_words_are_the_programs() -> None:
    assert set(recipes.PLACEMENTS) == {*PLACEMENTS, "scaled", "ds"}
    for study in ("depth", "ablation", "c4"):
        for job in recipes.jobs(study):
            assert job.schedule in {*SCHEDULES, recipes.PLAIN}
            assert recipes.settings(job.run, job.placement, job.schedule)["LEARNING_RATE"]
    with pytest.raises(ValueError, match="2b: no such run"):
        recipes.settings("2b", "pre", "linear")
    with pytest.raises(ValueError, match="width: no such study"):
        recipes.jobs("width")


def test_the_results_have_the_means_that_the_paper_prints() -> None:
    results = recipes.table()["results"]
    gains = [after - before for before, after in harness.PAPER["average"].values()]
    assert sum(gains) / 7 == pytest.approx(1.27, abs=0.005)
    # ProRes lowers the perplexity of every model, and each is in the table with it and without.
    pairs = [
        pair
        for table in ("c4", "climbmix")
        for row in results[table].values()
        for pair in row.values()
    ]
    assert len(pairs) == 7 * 3 + 3
    assert all(after < before for before, after in pairs)
    perplexities = [job.perplexity for job in recipes.jobs("ablation")]
    assert len(perplexities) == 65
    assert perplexities.count("diverged") == 6
    assert min(p for p in perplexities if isinstance(p, float)) == 14.41  # pre, linear, 12k


def test_readme_shows_the_table() -> None:
    rows = {
        cells[0]: cells[1:]
        for line in README.splitlines()
        if len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 8
    }
    for key, size in recipes.table()["sizes"].items():
        parameters, *rates, warmup, script, nodes = rows[size.name]
        assert parameters == size.parameters
        shown = dict(zip(("default", "post", "deepnorm"), rates, strict=True))
        assert {name: float(rate) for name, rate in shown.items() if rate} == size.learning_rate
        per_layer = recipes.settings(key, "pre", "linear")["WARMUP_ITERS_PER_LAYER"]
        assert int(warmup) == int(per_layer) * size.layers
        assert f"examples/pretrain_{key}.sh" in script
        assert int(nodes) == size.nodes
    (depth,) = [name for name in rows if name.startswith("depth study")]
    depths = [row["layers"] for row in recipes.table()["depth"]["depths"]]
    assert [int(number) for number in re.findall(r"\d+", depth)] == depths
    (ablation,) = [name for name in rows if name.startswith("ablation")]
    assert f"{len(recipes.jobs('ablation'))} runs" in ablation
