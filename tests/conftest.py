"""Options of the tests, for all of them: pytest reads them before it knows which it will run."""

from __future__ import annotations

import textwrap
from collections import Counter

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("random models", "tests/distributed/test_random_models.py")
    group.addoption(
        "--random-models",
        type=int,
        default=5,
        metavar="N",
        help="How many random models to train on random layouts. Default: 5.",
    )
    group.addoption(
        "--random-seed",
        type=int,
        default=1,
        metavar="S",
        help="What they are drawn from. Default: 1.",
    )
    group = parser.getgroup("data", "tests/unit/test_shards.py")
    group.addoption(
        "--kills",
        type=int,
        default=3,
        metavar="N",
        help="How often to kill the run that prepares files; 20 take more files. Default: 3.",
    )
    group = parser.getgroup("reliability", "docs/reliability.md")
    group.addoption(
        "--long",
        action="store_true",
        help="Also the tests that take minutes: a network in bad weather.",
    )
    group.addoption(
        "--mutations",
        type=int,
        default=50,
        metavar="N",
        help="How many files tests/unit/test_mutated_files.py changes. Default: 50.",
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says how many random models were run, and what they were."""
    reports = [
        (outcome, dict(report.user_properties)["features"])
        for outcome in ("passed", "failed", "skipped")
        for report in terminalreporter.stats.get(outcome, [])
        if getattr(report, "when", "") == "call" and "features" in dict(report.user_properties)
    ]
    if not reports:
        return
    counts = Counter(feature for _, features in reports for feature in features)
    failed, skipped = (sum(o == which for o, _ in reports) for which in ("failed", "skipped"))
    seed = terminalreporter.config.getoption("--random-seed")
    terminalreporter.section("random models")
    terminalreporter.write_line(
        f"{len(reports)} run, of seed {seed}: {failed} failed, {skipped} undecided. They had:"
    )
    listing = "; ".join(f"{feature} {counts[feature]}x" for feature in sorted(counts))
    terminalreporter.write_line(textwrap.fill(listing, 100, break_on_hyphens=False))
