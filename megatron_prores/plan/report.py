"""A plan as text."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import Any

from megatron_prores.plan.result import Plan
from megatron_prores.runs.plot import size_of

_WIDTH = 100


def text(plan: Plan) -> str:
    """Write a plan for a reader: what fits, who holds what, memory, time, warnings, notes."""
    model, total = plan.model, plan.parameters["total"]
    unpadded = plan.parameters["unpadded"]
    padding = f", {unpadded:,} without padded vocabulary" if unpadded != total else ""
    title = (
        f"The model: {model['layers']} layers of width {model['hidden_size']}, {total:,} "
        f"parameters{padding}, {model['precision']}, norms {model['norm_placement']}"
    )
    sections = [
        ("The layout fits", [f"  {line}" for line in plan.fits]),
        (title, _stages(plan)),
        ("Every rank", _ranks(plan)),
        ("Training", _training(plan)),
        ("Data of the training", _data(plan)),
        ("Memory of a rank of the fullest stage", _memory(plan)),
        (f"Flags for speed that it lacks: {len(plan.speed) or 'none'}", _bullets(plan.speed)),
        (f"Warnings: {len(plan.warnings) or 'none'}", _bullets(plan.warnings)),
        ("Not checked here", _bullets(plan.notes)),
    ]
    return "\n\n".join("\n".join([title, *lines]) for title, lines in sections)


def span(numbers: Sequence[int]) -> str:
    """Write numbers as spans: 1-4, 7, 9-10."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans) or "none"


def _wrapped(line: str, mark: str = "") -> str:
    return fill(
        line,
        _WIDTH,
        initial_indent=f"  {mark}",
        subsequent_indent="    ",
        break_long_words=False,
    )


def _bullets(lines: list[str]) -> list[str]:
    return [_wrapped(line, "- ") for line in lines]


def _stages(plan: Plan) -> list[str]:
    lines = [f"  {'stage':>5} {'virtual':>7}  {'layers':<14} {'opens after step':<20} parameters"]
    for stage in plan.stages:
        extra = [f"the {name}" for name in ("embedding", "output") if stage[name]]
        if stage["prediction_layers"]:
            extra.append(f"{stage['prediction_layers']} prediction layers")
        note = f"  with {' and '.join(extra)}" if extra else ""
        lines.append(
            f"  {stage['stage']:>5} {stage['virtual_stage']:>7}  {span(stage['layers']):<14} "
            f"{_openings(stage['layers'], plan):<20} {stage['parameters'] / 1e6:.1f}M{note}"
        )
    return lines


def _openings(layers: Sequence[int], plan: Plan) -> str:
    if plan.warmup["length"] is None:
        return "always open"
    steps = [plan.layers[layer - 1]["opens_after_step"] for layer in layers]
    known = [step for step in steps if step is not None]
    if not known:
        return "never" if steps else ""
    low, high = min(known), max(known)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _ranks(plan: Plan) -> list[str]:
    kinds = ", ".join(
        f"{sizes['groups']} of {sizes['ranks']} {kind}"
        for kind, sizes in plan.groups.items()
        if sizes["ranks"] > 1
    )
    pipelines = plan.groups["pipeline"]["groups"]
    per_rank = plan.parameters["per_rank"]
    low, high = min(per_rank), max(per_rank)
    parameters = f"  parameters per rank: {high:,}"
    if low != high:
        parameters += f" on stage {per_rank.index(high)}, {low:,} on stage {per_rank.index(low)}"
    return [
        _wrapped(f"process groups: {kinds or 'one rank alone'}; each kind holds every rank once"),
        f"  audit of all {plan.world_size} ranks in {pipelines} "
        f"pipeline{'s' * (pipelines > 1)}: every layer is held once in each, with its alpha",
        parameters,
    ]


def _training(plan: Plan) -> list[str]:
    training, warmup = plan.training, plan.warmup
    later = training["batch_phases"][1:]
    lines = [
        f"  {training['steps']:,} steps, {training['samples']:,} sequences, "
        f"{size_of(training['tokens'])} tokens; {training['tokens_per_step']:,} tokens a step"
        + (" at first" if later else "")
    ]
    for phase in later:
        lines.append(f"  from step {phase['first_step']:,}: batch {phase['batch_size']}")
    lines.append(
        f"  learning rate {training['learning_rate']:g} ({training['learning_rate_style']})"
    )
    if warmup["length"] is None:
        return [*lines, "  no warmup (--prores-schedule none)"]
    lines.append(
        f"  ProRes: schedule {warmup['schedule']}, W = {warmup['length']:,} {warmup['unit']}"
    )
    return lines + _layer_times(plan)


def _data(plan: Plan) -> list[str]:
    lines = [_dataset(each) for each in plan.data] or ["  made up: --mock-data"]
    if plan.cache is not None:
        lines.append(f"  Megatron's indices of it are built: {plan.cache}")
    return lines


def _dataset(data: dict[str, Any]) -> str:
    share = "" if data["share"] is None else f"{data['share']:.1%} of what is drawn"
    if data["epochs"] is None:
        return _wrapped(f"{data['path']}: {share or 'a part'}; how much it has is not known here")
    epochs = f"{data['epochs']:.3g} epochs of its {size_of(data['tokens'])} tokens"
    return _wrapped(f"{data['path']}: {share}, {epochs}")


def _layer_times(plan: Plan) -> list[str]:
    """Write when every layer opens, in columns."""
    late = any(not each["opens_in_training"] for each in plan.layers if each["opens_after_step"])
    cells = [_layer_time(layer) for layer in plan.layers]
    width = max(len(cell) for cell in cells) + 3
    rows = -(-len(cells) // max(1, (_WIDTH - 4) // width))
    return ["  layer: step after which it is fully open (tokens)" + ", * not reached" * late] + [
        "    " + "".join(cell.ljust(width) for cell in cells[row::rows]).rstrip()
        for row in range(rows)
    ]


def _layer_time(layer: dict[str, Any]) -> str:
    if (step := layer["opens_after_step"]) is None:
        return f"{layer['layer']:>3}: never"
    mark = "" if layer["opens_in_training"] else "*"
    return f"{layer['layer']:>3}: {step:,}{mark} ({size_of(layer['opens_after_tokens'])})"


def _memory(plan: Plan) -> list[str]:
    memory = plan.memory
    stage = memory["stages"][memory["fullest_stage"]]
    activations = _gigabytes(memory["upstream_activations"])
    lines = [
        f"  weights {_gigabytes(stage['weights'])}, gradients {_gigabytes(stage['gradients'])}, "
        f"optimizer {_gigabytes(stage['optimizer'])} (stage {stage['stage']}, from its parameters)",
        f"  activations {activations} (Megatron's formula, first stage)",
        f"  together {_gigabytes(memory['fullest_total'])}; Megatron's own report: "
        f"{_gigabytes(memory['upstream_weights_and_optimizer'])} + {activations}",
    ]
    lines.append(
        f"  at work about {_gigabytes(memory['at_work'])}, with what SwiGLU keeps and "
        f"{_gigabytes(memory['loss'])} of the loss;"
    )
    lines.append("  CUDA, NCCL and the allocator take a few GB more; see docs/plan.md")
    return lines


def _gigabytes(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
