from __future__ import annotations

import numpy as np
import pytest

from megatron_prores.schedule.formulas import SCHEDULES, alphas, opening_steps
from tests.golden import load_json

GOLDEN = load_json("alpha.json")
MOVING = [name for name in SCHEDULES if not name.startswith("fix_")]
SIZES = [(1, 1), (4, 12), (7, 1000), (24, 24000), (120, 60000), (10000, 10**9)]


@pytest.mark.parametrize("schedule", GOLDEN)
def test_equal_to_the_authors_figures(schedule: str) -> None:
    for case in GOLDEN[schedule]:
        for step, expected in case["alpha"].items():
            values = alphas(schedule, float(step), case["num_layers"], case["total_warmup"])
            assert values.dtype == np.float64
            np.testing.assert_allclose(values, expected, rtol=0, atol=1e-12)


def test_every_schedule_has_golden_figures() -> None:
    assert set(GOLDEN) == set(SCHEDULES)
    assert len(SCHEDULES) == 12


@pytest.mark.parametrize("schedule", MOVING)
@pytest.mark.parametrize(("num_layers", "warmup"), SIZES)
def test_open_exactly_from_the_end_of_the_warmup_on(
    schedule: str, num_layers: int, warmup: int
) -> None:
    for step in (warmup, warmup + 1, 10 * warmup):
        assert (alphas(schedule, step, num_layers, warmup) == 1.0).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("num_layers", "warmup"), SIZES)
def test_within_bounds_and_never_falling(schedule: str, num_layers: int, warmup: int) -> None:
    steps = np.unique(np.linspace(0, 1.1 * warmup, 50).astype(int))
    table = np.array([alphas(schedule, int(t), num_layers, warmup) for t in steps])
    assert table.shape == (len(steps), num_layers)
    assert np.isfinite(table).all()
    assert (table >= 0).all()
    assert (table <= 1).all()
    assert (np.diff(table, axis=0) >= 0).all()


def test_linear_starts_closed_and_opens_shallow_layers_first() -> None:
    assert (alphas("linear", 0, 12, 12000) == 0).all()
    assert (np.diff(alphas("linear", 5000, 12, 12000)) <= 0).all()
    assert opening_steps("linear", 12, 12000) == [1000 * layer for layer in range(1, 13)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("num_layers", "warmup"), [(1, 1), (4, 12), (5, 17), (12, 12000)])
def test_opening_step_is_the_first_at_which_alpha_is_one(
    schedule: str, num_layers: int, warmup: int
) -> None:
    for layer, step in enumerate(opening_steps(schedule, num_layers, warmup)):
        if step is None:
            assert alphas(schedule, 10 * warmup, num_layers, warmup)[layer] < 1.0
            continue
        assert alphas(schedule, step, num_layers, warmup)[layer] == 1.0
        assert step == 0 or alphas(schedule, step - 1, num_layers, warmup)[layer] < 1.0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("sqrt", 0, 4, 12), "unknown schedule 'sqrt'"),
        (("linear", -1, 4, 12), "step must be"),
        (("linear", float("nan"), 4, 12), "step must be"),
        (("linear", 0, 0, 12), "num_layers must be"),
        (("linear", 0, 2.5, 12), "num_layers must be"),
        (("linear", 0, 4, 0), "warmup must be"),
        (("linear", 0, 4, -12), "warmup must be"),
        (("linear", 0, 4, float("inf")), "warmup must be"),
    ],
)
def test_nonsense_is_refused(arguments: tuple[object, ...], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        alphas(*arguments)  # type: ignore[arg-type]
