"""Flags in, refusals out: Megatron's command line, the group ProRes, and what cannot work."""
