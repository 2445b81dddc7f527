"""Which of the two suites is asked for."""

from __future__ import annotations

import sys

from megatron_prores.errors import Parser, UserError, split_at_dashes

SUITES = ("sizes", "placements")


def main() -> int | None:
    """Run the suite that the command line asks for: --suite, or what suits the device.

    Returns:
        The exit code.

    Raises:
        UserError: A flag is wrong.
    """
    argv = sys.argv[1:]
    own, _ = split_at_dashes(argv)
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--suite")
    parser.add_argument("--device", default="cuda")
    args, _ = parser.parse_known_args(own)
    suite = args.suite or ("placements" if args.device == "cpu" else "sizes")
    if suite not in SUITES:
        raise UserError(f"--suite {suite}: choose one of {', '.join(SUITES)}")
    if suite == "placements":
        from studies.benchmark.placements.main import main as run_placements

        run_placements(argv)
        return None
    from studies.benchmark.sizes.main import main as run_sizes

    return run_sizes(argv)
