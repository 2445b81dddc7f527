"""The command line: Megatron's flags and ours, and everything that is refused before any work."""
