"""Progressive Residual Warmup (ProRes, arXiv 2603.05369) for Megatron Core."""

__version__ = "0.1.0"
