"""What a checkpoint can do: text that it writes, and scores by lm-evaluation-harness."""
