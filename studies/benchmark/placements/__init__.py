"""The norm placements at one size: stock Megatron, or the schedule ``none``, against ProRes."""
