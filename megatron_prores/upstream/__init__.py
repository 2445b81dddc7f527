"""Every run-time replacement of a function of Megatron or torch, in one registry."""
