"""Checkpoints: what they remember, their manifest, saving and loading them safely."""
