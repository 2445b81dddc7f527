"""One report: per claim of the paper its figures, ours beside them, and whether it shows here."""

from __future__ import annotations

import base64
import itertools
import json
import math
import re
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from megatron_prores.files import atomic_write
from megatron_prores.plot import save_figure
from studies.paper import pictures, recipes
from studies.paper.results import DIVERGED, Results, read_results
from studies.paper.scales import LONG, PLAIN, PRORES, Scale, flags, runs_of

SHOWN, NOT_SHOWN, NO_VERDICT = "shown", "not shown", "no verdict"


def gains(plain: Mapping[int, float], ours: Mapping[int, float]) -> list[float]:
    """Return by how much a loss is lower, for each seed that both arms have.

    The arms of a seed see the same data in the same order, in training and in evaluation: what
    seeds differ by in that is not in their gains.

    Args:
        plain: Seed -> loss.
        ours: Seed -> loss of the arm that should have the lower one.
    """
    return [plain[seed] - ours[seed] for seed in plain if seed in ours]


def verdict(gained: Sequence[float]) -> str:
    """Judge whether a loss is better: by more than the gains of the seeds spread."""
    if len(gained) < 2:
        return NO_VERDICT
    spread = max(gained) - min(gained)
    if math.isnan(spread):  # infinite for every seed: one arm always diverged
        spread = 0.0
    return SHOWN if statistics.mean(gained) > spread else NOT_SHOWN


def show(values: Collection[float], sign: str = "") -> str:
    """Write the mean over seeds and half the width of their range.

    Args:
        values: Of each seed.
        sign: "+" for a difference.
    """
    if not values:
        return ""
    if not all(map(math.isfinite, values)):
        return DIVERGED
    mean = f"{statistics.mean(values):{sign}.4f}"
    half = (max(values) - min(values)) / 2
    return f"{mean} ± {half:.4f}" if len(values) > 1 else mean


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def losses_by_placement(results: Results) -> Iterator[str]:
    """Table 2: the final loss of every placement, plain and with ProRes."""
    yield "## Better loss for every placement (Table 2)"
    yield (
        "The paper's perplexity on C4-en, plain → with ProRes, and the final validation loss here: "
        "mean over seeds ± half of their range. *Long*: plain, its learning rate warming up for as "
        "long as ProRes does."
    )
    rows = []
    for placement, layers in results.cases():
        arms = [
            results.losses(placement=placement, layers=layers, arm=arm)
            for arm in (PLAIN, LONG, PRORES)
        ]
        plain, rival, ours = arms
        if not plain or not ours:
            continue
        figures = recipes.table()["results"]["c4"].get(placement, {})
        paper = ", ".join(f"{size}: {a} → {b}" for size, (a, b) in figures.items())
        over_plain, over_rival = gains(plain, ours), gains(rival, ours)
        rows.append(
            [
                *(placement, str(layers), paper, *map(show, (a.values() for a in arms))),
                *(show(over_plain, "+"), verdict(over_plain)),
                *((show(over_rival, "+"), verdict(over_rival)) if rival else ("", "")),
            ]
        )
    head = "placement|layers|the paper|plain|long|ProRes|gain over plain||gain over long|"
    yield table(head.split("|"), rows)
    yield "![final losses](losses.png)"


def schedules(results: Results) -> Iterator[str]:
    """Table 6: schedules, and lengths of the warmup."""
    ablated = {(r["placement"], r["layers"]) for r in results.all if r["schedule"] != "linear"}
    for placement, layers in sorted(ablated):
        yield "## Schedules and lengths of the warmup (Table 6)"
        yield (
            f"{placement}, {layers} layers; the paper's perplexity is of the 350M model with 24. "
            "The lengths are shares of the training."
        )
        rows = []
        for result in results.of(placement=placement, layers=layers, seed=1):
            if result["arm"] == LONG:
                continue
            name = result["schedule"] if result["arm"] == PRORES else "none"
            share = result["warmup"] * layers if result["arm"] == PRORES else 0.0
            if name.startswith("fix_"):
                share = 0.0
            rows.append((name, share, result["validation_loss"]))
        rows.sort(key=lambda row: math.inf if row[2] is None else row[2])
        lines = []
        for name, share, loss in rows:
            ours = DIVERGED if loss is None else f"{loss:.4f}"
            width = f"{share:.0%}" if share else ""
            lines.append([name, width, _published(name, share, placement), ours])
        yield table(("schedule", "W", "the paper", "validation loss, one seed"), lines)


def _published(schedule: str, share: float, placement: str) -> str:
    """Return the paper's figure for a schedule: of the row whose length is nearest."""
    study = recipes.table()["ablation"]
    rows = [
        (row.get("warmup_iters", 0) / study["train_iters"], row[placement])
        for row in study["rows"]
        if row["schedule"] == schedule and placement in row
    ]
    if not rows:
        return ""
    length, figure = min(rows, key=lambda row: abs(row[0] - share))
    return f"{figure}" + (f" (W {length:.0%})" if length else "")


def depth(results: Results) -> Iterator[str]:
    """Figure 1: the final loss against depth."""
    yield "## Depth (Figure 1)"
    yield (
        "The paper: with ProRes the perplexity goes on falling with depth, and its lead grows. "
        "Here the gain over plain, per depth:"
    )
    rows = []
    for placement in ("post", "pre"):
        for layers in sorted({r["layers"] for r in results.of(placement=placement)}):
            arms = [
                results.losses(placement=placement, layers=layers, arm=arm)
                for arm in (PLAIN, LONG, PRORES)
            ]
            if arms[0] and arms[2]:
                gained = gains(arms[0], arms[2])
                figures = map(show, (arm.values() for arm in arms))
                rows.append([placement, str(layers), *figures, show(gained, "+"), str(len(gained))])
    yield table(("placement", "layers", "plain", "long", "ProRes", "gain", "seeds"), rows)
    yield "![loss against depth](depth.png)"


def spikes(results: Results) -> Iterator[str]:
    """Figure 2: spike scores."""
    yield "## Spikes (Figure 2)"
    yield (
        "The share of steps at least 7 standard deviations from the mean of the 1000 before, over "
        "10% to 90% of training (the paper: near 0 with ProRes), and the largest gradient norm."
    )
    rows = []
    for placement, layers in results.cases():
        row = [placement, str(layers)]
        for name in ("spike_score_loss", "spike_score_gradient_norm", "largest_gradient_norm"):
            for arm in (PLAIN, PRORES):
                found = results.of(placement=placement, layers=layers, arm=arm)
                values = [result[name] for result in found]
                share = "{:.2%}" if "score" in name else "{:.1f}"
                row.append(share.format(statistics.mean(values)) if values else "")
        if all(row[2:]):
            rows.append(row)
    head = "placement|layers|loss, plain|ProRes|gradient norm, plain|ProRes|largest, plain|ProRes"
    yield table(head.split("|"), rows)


def growth(results: Results) -> Iterator[str]:
    """Figure 3: the residual stream over depth."""
    rows = []
    for result in [r for r in results.all if r["norms"]]:
        rms = {layer: values[-1] for layer, values in pictures.rms_by_layer(result).items()}
        if rms:
            first, last = rms[min(rms)], rms[max(rms)]
            rows.append([result["arm"], f"{first:.3f}", f"{last:.3f}", f"{last / first:.2f}"])
    if rows:
        yield "## Activation growth (Figure 3)"
        yield (
            "RMS of the residual stream behind the first and the last layer at the end of the "
            "training (Pre-LN). The paper: exponential growth without ProRes, gentle with it."
        )
        yield table(("arm", "first layer", "last layer", "growth"), rows)
        yield "![activation growth](growth.png)"


def smoothness(results: Results) -> Iterator[str]:
    """Figure 4: how layers turn between an early checkpoint and the last."""
    found = {r["arm"]: r["cosine"] for r in results.all if r.get("cosine")}
    if found:
        yield "## Smoothness over depth (Figure 4)"
        yield (
            "Cosine of what each layer adds to the residual stream after a tenth of the training "
            "and at its end (Pre-LN), and the mean step from one layer to the next. The paper: "
            "smoother over depth with ProRes."
        )
        rows = []
        for arm, cosines in found.items():
            steps = [abs(b - a) for a, b in itertools.pairwise(cosines)]
            figures = (statistics.mean(cosines), min(cosines), statistics.mean(steps))
            rows.append([arm, *(f"{figure:.3f}" for figure in figures)])
        yield table(("arm", "mean", "smallest", "mean step between layers"), rows)
        yield "![cosine](cosine.png)"


def gap(results: Results) -> Iterator[str]:
    """Figure 5: the gap of the training loss over time."""
    yield "## The gap over time (Figure 5)"
    yield (
        "Training loss of ProRes minus that of plain (mean over seeds, smoothed). The paper at 7B: "
        "above 0 at first, below 0 and growing after the warmup and in the decay."
    )
    yield "![gap](gap.png)"


EXHIBITS = (losses_by_placement, schedules, depth, spikes, growth, smoothness, gap)


def write_report(root: Path, scale: Scale, directory: Path) -> list[Path]:
    """Write the report of the runs that are there.

    Args:
        root: Of the study's runs, or of a report with its runs.json.
        scale: Their size.
        directory: For report.md, report.html, runs.json and pictures; made.

    Returns:
        The files.
    """
    results = read_results(root)
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in pictures.PICTURES.items():
        figure = draw(results)
        if figure is not None:
            save_figure(figure, directory / f"{name}.png", "--report-dir")
            written.append(directory / f"{name}.png")
    there = {path.name for path in written}
    parts = [part for exhibit in EXHIBITS for part in exhibit(results)]
    parts = [p for p in parts if not (m := re.search(r"\]\((.*png)\)", p)) or m[1] in there]
    text = "\n\n".join([*_head(results, scale), *parts, *_tail(results, scale)]) + "\n"
    document = {"scale": scale.name, "runs": sorted(results.all, key=lambda r: str(r["name"]))}
    for name, content in {
        "report.md": text,
        "report.html": as_html(text, directory),
        "runs.json": json.dumps(document, separators=(",", ":")) + "\n",
    }.items():
        with atomic_write(directory / name) as file:
            file.write(content)
        written.append(directory / name)
    return written


def _head(results: Results, scale: Scale) -> Iterator[str]:
    runs = results.all
    hours = sum(result["seconds"] for result in runs) / 3600
    yield f"# The paper's claims, seen at the scale “{scale.name}”"
    yield (
        f"{len(runs)} runs of `pretrain_gpt_prores.py`, {sum(r['tokens'] for r in runs) / 1e6:.1f} "
        f"million tokens, {hours:.1f} hours of one core or GPU. Hidden size {scale.hidden}, "
        f"{scale.heads} heads, {scale.batch} x {scale.seq_length} tokens a step, "
        f"{scale.iterations} steps; text: the source code and documentation of Python, "
        f"{scale.vocabulary} SentencePiece pieces. The arms of a seed see the same data, in "
        "training and in evaluation. A gain counts as shown where its mean is larger than the "
        "width of its range over the seeds; one seed gives no verdict."
    )


def _tail(results: Results, scale: Scale) -> Iterator[str]:
    yield "## The runs"
    yield (
        "The recipe is the paper's in its ratios: AdamW (0.9, 0.95), weight decay 0.1, clipping at "
        "1; the learning rate warms up over 2% of the steps (10% for post and deepnorm) and decays "
        "over the last 10%; ProRes is `linear`, T is 1% of the steps at every depth; "
        f"weights are drawn with {scale.init_std}, which is what 0.02 is at h 768. The learning "
        "rate of a depth is the same for every arm."
    )
    rates = ", ".join(
        f"{scale.learning_rate(layers):g} at {layers} layers"
        for layers in sorted({r["layers"] for r in results.all})
    )
    commits = ", ".join(sorted({str(r["commit"]) for r in results.all}))
    yield f"Learning rates: {rates}. Commits: {commits}."
    rows = [
        [
            r["name"],
            DIVERGED if r["validation_loss"] is None else f"{r['validation_loss']:.4f}",
            f"{r['training_loss']:.4f}",
            f"{r['seconds'] / 60:.1f}",
        ]
        for r in sorted(results.all, key=lambda r: str(r["name"]))
    ]
    yield table(("run", "validation loss", "training loss, last 2%", "minutes"), rows)
    example = runs_of("main", scale)[2]
    words = flags(example, scale, Path("data"), Path(example.name))
    command = " ".join(words)
    yield f"The command of `{example.name}`:"
    yield f"```bash\npython pretrain_gpt_prores.py {command}\n```"


def as_html(markdown_text: str, directory: Path) -> str:
    """Write a report as one HTML file, its pictures within it.

    Args:
        markdown_text: The report.
        directory: Of its pictures.
    """
    import markdown  # type: ignore[import-untyped]

    def embed(match: re.Match[str]) -> str:
        data = base64.b64encode((directory / match[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{data}"'

    body = markdown.markdown(markdown_text, extensions=["tables", "fenced_code"])
    body = re.sub(r'src="([^"]+\.png)"', embed, body)
    style = (
        "body{max-width:70em;margin:2em auto;font:16px/1.5 sans-serif;padding:0 1em}"
        "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.2em .6em}"
        "img{max-width:100%}pre{white-space:pre-wrap}"
    )
    return f'<!doctype html><meta charset="utf-8"><style>{style}</style>\n{body}\n'
