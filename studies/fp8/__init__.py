"""A study of FP8 recipes under the residual warmup: what quantizing costs the branch gradients."""
