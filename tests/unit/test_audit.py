from __future__ import annotations

from dataclasses import replace

from megatron_prores.warmup.audit import HeldLayer, RankReport, find_faults, layer_map, table

ALPHAS = [1.0, 0.5, 0.25, 0.125]


def reports() -> list[RankReport]:
    """Two pipelines (tensor-parallel ranks 0 and 1) of two stages with two layers each."""
    return [
        RankReport(
            rank=rank,
            replica=rank % 2,
            settings="linear",
            layers=tuple(
                HeldLayer(
                    layer=layer,
                    number=layer,
                    alpha=ALPHAS[layer - 1],
                    rank=rank,
                    stage=rank // 2,
                    virtual_stage=0,
                    replica=rank % 2,
                )
                for layer in ((1, 2) if rank < 2 else (3, 4))
            ),
        )
        for rank in range(4)
    ]


def changed(rank: int, index: int, **fields: object) -> list[RankReport]:
    """The reports with one layer of one rank changed."""
    result = reports()
    layers = list(result[rank].layers)
    layers[index] = replace(layers[index], **fields)  # type: ignore[arg-type]
    result[rank] = replace(result[rank], layers=tuple(layers))
    return result


def test_agreement_has_no_faults() -> None:
    assert find_faults(reports(), ALPHAS) == []


def test_a_layer_held_twice_and_one_held_by_nobody() -> None:
    assert find_faults(changed(2, 0, layer=1, alpha=1.0), ALPHAS) == [
        "pipeline 0: layer 1 is held by 0, 2",
        "pipeline 0: layer 3 is held by no rank",
    ]


def test_a_layer_that_the_model_does_not_have() -> None:
    faults = find_faults(changed(3, 1, layer=5), ALPHAS)
    assert faults == [
        "pipeline 1: layer 4 is held by no rank",
        "pipeline 1: there is no layer 5 of 4",
    ]


def test_an_alpha_that_is_not_the_schedules() -> None:
    assert find_faults(changed(1, 1, alpha=0.75), ALPHAS) == [
        "rank 1: alpha of layer 2 is 0.75, not 0.5"
    ]


def test_a_rank_started_with_other_flags() -> None:
    result = reports()
    result[3] = replace(result[3], settings="reverse")
    (fault,) = find_faults(result, ALPHAS)
    assert "rank 3 runs reverse, rank 0 runs linear" in fault


def test_alphas_are_compared_as_the_tensors_hold_them() -> None:
    third = 1.0 / 3.0
    as_float32 = 0.3333333432674408
    result = changed(0, 1, alpha=as_float32)
    result[1] = changed(1, 1, alpha=as_float32)[1]
    assert find_faults(result, [1.0, third, 0.25, 0.125]) == []


PATTERN = (1, 1, 2, 2)
"""l of the four layers, as two blocks of a hybrid model."""


def hybrid(**fields: int) -> list[RankReport]:
    """The reports of such a model, with the third layer changed on rank 2."""
    result = []
    for report in reports():
        layers = [
            replace(held, layer=depth, alpha=ALPHAS[depth - 1])
            for held in report.layers
            for depth in [PATTERN[held.number - 1]]
        ]
        if report.rank == 2:
            layers[0] = replace(layers[0], **fields)
        result.append(replace(report, layers=tuple(layers)))
    return result


def test_the_layers_of_a_block_count_as_one() -> None:
    assert find_faults(hybrid(), ALPHAS[:2], PATTERN) == []
    rows = [line.split() for line in layer_map(hybrid(), [10, 20]).splitlines()]
    assert rows[1:] == [["1", "0", "0", "10"], ["2", "1", "0", "20"]]


def test_a_layer_that_counts_as_another_than_the_pattern_says() -> None:
    assert find_faults(hybrid(layer=1, alpha=1), ALPHAS[:2], PATTERN) == [
        "rank 2: layer 3 of the pattern counts as layer 1 of 2, not 2"
    ]
    assert find_faults(hybrid(number=4), ALPHAS[:2], PATTERN) == [
        "pipeline 0: layer 3 of the pattern is held by no rank",
        "pipeline 0: layer 4 of the pattern is held by 2, 2",
    ]


def test_table_and_map_show_who_holds_what() -> None:
    rows = [line.split() for line in table(reports()).splitlines()]
    assert ["3", "1", "1", "0", "3", "(0.25),", "4", "(0.125)"] in rows
    rows = [line.split() for line in layer_map(reports(), [10, 20, 30, None]).splitlines()]
    assert rows[1:] == [
        ["1", "0", "0", "10"],
        ["2", "0", "0", "20"],
        ["3", "1", "0", "30"],
        ["4", "1", "0", "never"],
    ]
