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

from megatron_prores.runs.plot import save_figure
from megatron_prores.system.files import atomic_write
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
    """Judge whether something is better: on average by more than its gains spread over the seeds.

    Of pure noise that holds with two seeds in 15% of the cases, with three in 4%: fewer than three
    give no verdict.
    """
    if len(gained) < 3:
        return NO_VERDICT
    spread = max(gained) - min(gained)
    if math.isnan(spread):  # infinite for every seed: one arm always diverged
        spread = 0.0
    return SHOWN if statistics.mean(gained) > spread else NOT_SHOWN


def tally(claim: str, verdicts: Sequence[str]) -> str:
    """Write in how many cases a claim shows."""
    counts = (f"{verdicts.count(each)} {each}" for each in (SHOWN, NOT_SHOWN, NO_VERDICT))
    return f"**{claim}: {', '.join(counts)}.**"


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
    rivals: list[bool] = []
    verdicts: tuple[list[str], list[str]] = ([], [])
    for placement, layers in results.cases():
        arms = [
            results.losses(placement=placement, layers=layers, arm=arm)
            for arm in (PLAIN, LONG, PRORES)
        ]
        plain, rival, ours = arms
        if not plain or not ours:
            continue
        figures = recipes.table()["results"]["c4"].get(placement, {})
        row = [
            placement,
            str(layers),
            ", ".join(f"{n}: {a} → {b}" for n, (a, b) in figures.items()),
        ]
        row += [show(arm.values()) for arm in arms]
        over_plain, over_rival = gains(plain, ours), gains(rival, ours)
        row += [str(len(over_plain)), show(over_plain, "+"), verdict(over_plain)]
        verdicts[0].append(row[-1])
        row += [show(over_rival, "+"), verdict(over_rival)] if rival else ["", ""]
        if rival:
            rivals.append(statistics.fmean(rival.values()) < statistics.fmean(plain.values()))
            verdicts[1].append(row[-1])
        rows.append(row)
    head = "placement|layers|the paper|plain|long|ProRes|seeds|gain over plain||gain over long|"
    yield table(head.split("|"), rows)
    yield "![final losses](losses.png)"
    if rivals:
        yield (
            f"Mean over seeds, long is better than plain in {sum(rivals)} of {len(rivals)} cases. "
            "Where it is not, plain is the rival that counts."
        )
    yield tally("A lower loss than plain", verdicts[0])
    yield tally("A lower loss than with a long learning-rate warmup", verdicts[1])


def schedules(results: Results) -> Iterator[str]:
    """Table 6: schedules, and lengths of the warmup."""
    ablated = {(r["placement"], r["layers"]) for r in results.all if r["schedule"] != "linear"}
    for placement, layers in sorted(ablated):
        yield "## Schedules and lengths of the warmup (Table 6)"
        yield (
            f"{placement}, {layers} layers; the paper's perplexity is of the 350M model with 24. "
            "W is a share of the training. The gains are over no schedule, the largest first."
        )
        case = {"placement": placement, "layers": layers}
        plain = results.losses(**case, arm=PLAIN)
        kinds = {
            (r["schedule"], r["warmup"]): results.losses(
                **case, arm=PRORES, schedule=r["schedule"], warmup=r["warmup"]
            )
            for r in results.all
            if r["arm"] == PRORES and (r["placement"], r["layers"]) == (placement, layers)
        }
        rows = [["none", "", _published("none", 0.0, placement), show(plain.values())]]
        rows[0] += [str(len(plain)), "", ""]
        gained = {kind: gains(plain, losses) for kind, losses in kinds.items()}
        for kind in sorted(kinds, key=lambda kind: -statistics.fmean(gained[kind] or [0.0])):
            schedule, warmup = kind
            share = 0.0 if schedule.startswith("fix_") else warmup * layers
            row = [
                schedule,
                f"{share:.0%}" if share else "",
                _published(schedule, share, placement),
            ]
            row += [show(kinds[kind].values()), str(len(gained[kind]))]
            rows.append([*row, show(gained[kind], "+"), verdict(gained[kind])])
        yield table(("schedule", "W", "the paper", "validation loss", "seeds", "gain", ""), rows)
        yield tally("A lower loss than without a schedule", [row[-1] for row in rows[1:]])


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
    rows = []
    for placement in ("post", "pre"):
        depths = sorted({layers for name, layers in results.cases() if name == placement})
        for fewer, layers in itertools.pairwise(depths):
            (few_plain, few), (plain, ours) = (
                [results.losses(placement=placement, layers=n, arm=arm) for arm in (PLAIN, PRORES)]
                for n in (fewer, layers)
            )
            fall = gains(few, ours)
            lead = [
                few[seed] - ours[seed] - (few_plain[seed] - plain[seed])
                for seed in plain
                if seed in ours and seed in few and seed in few_plain
            ]
            row = [placement, f"{fewer} → {layers}", show(gains(few_plain, plain), "+")]
            row += [show(fall, "+"), verdict(fall), show(lead, "+"), verdict(lead)]
            rows.append([*row, str(len(lead))])
    if rows:
        yield "## Depth (Figure 1)"
        yield (
            "The paper: with ProRes the perplexity goes on falling with depth, and its lead over "
            "plain grows. Here from one depth to the next; the learning rates, below, are not the "
            "same at every depth, so a fall is not of depth alone. The arms of a depth have one."
        )
        head = "placement|layers|loss falls, plain|with ProRes||the lead grows by||seeds"
        yield table(head.split("|"), rows)
        yield "![loss against depth](depth.png)"
        yield tally("The loss falls with depth", [row[4] for row in rows])
        yield tally("The lead grows with depth", [row[6] for row in rows])


def spikes(results: Results) -> Iterator[str]:
    """Figure 2: spike scores."""
    yield "## Spikes (Figure 2)"
    yield (
        "The share of steps at least 7 standard deviations from the mean of the 1000 before, over "
        "10% to 90% of training (the paper: near 0 with ProRes), and the largest gradient norm."
    )
    rows, verdicts = [], []
    for placement, layers in results.cases():
        row = [placement, str(layers)]
        for name in ("spike_score_loss", "spike_score_gradient_norm", "largest_gradient_norm"):
            arms = [
                {
                    r["seed"]: r[name]
                    for r in results.of(placement=placement, layers=layers, arm=arm)
                }
                for arm in (PLAIN, PRORES)
            ]
            share = "{:.2%}" if "score" in name else "{:.1f}"
            row += [share.format(statistics.mean(arm.values())) if arm else "" for arm in arms]
            if "score" in name:
                row.append(verdict(gains(*arms)))
        if all(row):
            rows.append(row)
            verdicts += [(row[4], row[7])]
    head = "placement|layers|loss, plain|ProRes||gradient norm, plain|ProRes||largest, plain|ProRes"
    yield table(head.split("|"), rows)
    yield tally("Fewer spikes of the loss", [loss for loss, _ in verdicts])
    yield tally("Fewer spikes of the gradient norm", [norm for _, norm in verdicts])


def growth(results: Results) -> Iterator[str]:
    """Figure 3: the residual stream over depth."""
    rows = []
    growths: dict[str, dict[int, float]] = {PLAIN: {}, PRORES: {}}
    for result in [r for r in results.all if r["norms"]]:
        rms = {layer: values[-1] for layer, values in pictures.rms_by_layer(result).items()}
        if rms:
            first, last = rms[min(rms)], rms[max(rms)]
            growths[result["arm"]][result["seed"]] = last / first
            rows.append([result["arm"], f"{first:.3f}", f"{last:.3f}", f"{last / first:.2f}"])
    if rows:
        yield "## Activation growth (Figure 3)"
        yield (
            "RMS of the residual stream behind the first and the last layer at the end of the "
            "training (Pre-LN, a row per seed). The paper: exponential growth without ProRes, "
            "gentle with it."
        )
        yield table(("arm", "first layer", "last layer", "growth"), rows)
        yield "![activation growth](growth.png)"
        yield tally("Gentler growth", [verdict(gains(growths[PLAIN], growths[PRORES]))])


def smoothness(results: Results) -> Iterator[str]:
    """Figure 4: how layers turn between an early checkpoint and the last."""
    rows = []
    turns: dict[str, dict[int, float]] = {PLAIN: {}, PRORES: {}}
    for result in [r for r in results.all if r.get("cosine")]:
        cosines = result["cosine"]
        step = statistics.mean(abs(b - a) for a, b in itertools.pairwise(cosines))
        turns[result["arm"]][result["seed"]] = step
        figures = (statistics.mean(cosines), min(cosines), step)
        rows.append([result["arm"], *(f"{figure:.3f}" for figure in figures)])
    if rows:
        yield "## Smoothness over depth (Figure 4)"
        yield (
            "Cosine of what each layer adds to the residual stream after a tenth of the training "
            "and at its end (Pre-LN, a row per seed), and the mean step from one layer to the "
            "next. The paper: smoother over depth with ProRes."
        )
        yield table(("arm", "mean", "smallest", "mean step between layers"), rows)
        yield "![cosine](cosine.png)"
        yield tally("Smoother over depth", [verdict(gains(turns[PLAIN], turns[PRORES]))])


def gap(results: Results) -> Iterator[str]:
    """Figure 5: the gap of the training loss over time."""
    yield "## The gap over time (Figure 5)"
    yield (
        "Training loss of ProRes minus that of plain (mean over seeds). The paper at 7B: above 0 "
        "at first, below 0 and growing after the warmup and in the decay. Here over the first half "
        "of the warmup, over as long behind its end, and over the last tenth of the run. The "
        "picture is cut off at 0.25."
    )
    rows = []
    for placement, layers in results.cases():
        runs = {
            arm: {r["seed"]: r for r in results.of(placement=placement, layers=layers, arm=arm)}
            for arm in (PLAIN, PRORES)
        }
        by_part: tuple[list[float], ...] = ([], [], [])
        for seed in [seed for seed in runs[PLAIN] if seed in runs[PRORES]]:
            ours = runs[PRORES][seed]
            (steps, plain), (those, values) = (
                run["curves"]["training loss"] for run in (runs[PLAIN][seed], ours)
            )
            if steps != those:  # one of them diverged
                continue
            warm = ours["warmup"] * layers * steps[-1]
            parts = ((0.0, warm / 2), (warm, 1.5 * warm), (0.9 * steps[-1], steps[-1]))
            for found, (low, high) in zip(by_part, parts, strict=True):
                curve = zip(steps, plain, values, strict=True)
                found.append(statistics.fmean(b - a for at, a, b in curve if low < at <= high))
        if by_part[0]:
            grows = [middle - last for middle, last in zip(*by_part[1:], strict=True)]
            row = [placement, str(layers), str(len(grows)), *(show(p, "+") for p in by_part)]
            rows.append([*row, verdict([-each for each in by_part[2]]), verdict(grows)])
    head = "placement|layers|seeds|at first|behind the warmup|at the end|below 0 at the end|grows"
    yield table(head.split("|"), rows)
    yield "![gap](gap.png)"
    yield tally("Below 0 at the end", [row[6] for row in rows])
    yield tally("Grows from behind the warmup to the end", [row[7] for row in rows])


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
    claims = "\n".join(f"- {part.strip('*')}" for part in parts if part.startswith("**"))
    text = "\n\n".join([*_head(results, scale), claims, *parts, *_tail(results, scale)]) + "\n"
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
        f"million tokens, {hours:.1f} hours by the clock, added up. Hidden size {scale.hidden}, "
        f"{scale.heads} heads, {scale.batch} x {scale.seq_length} tokens a step, "
        f"{scale.iterations} steps; text: the source code and documentation of Python, "
        f"{scale.vocabulary} SentencePiece pieces. The arms of a seed see the same data, in "
        "training and in evaluation. A gain counts as shown where its mean is larger than the "
        "width of its range over the seeds; fewer than three seeds give no verdict, as noise alone "
        "would pass in 15% of the cases with two (4% with three)."
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
    yield table(("run", "validation loss", "training loss, last 1%", "minutes"), rows)
    missing: dict[str, list[str]] = {}
    known = {r["name"] for r in results.all}
    everything = runs_of("all", scale)
    for run in everything:
        if run.name not in known:
            name, seed = run.name.rsplit("-seed", 1)
            missing.setdefault(name, []).append(seed)
    if missing:
        count = sum(map(len, missing.values()))
        names = ", ".join(f"`{name}` ({', '.join(seeds)})" for name, seeds in missing.items())
        yield f"Not made, {count} of the study's {len(everything)} runs (seeds): {names}."
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
