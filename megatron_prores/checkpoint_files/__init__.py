"""The files of a checkpoint: what is in them, whether they are intact, and how to read them safely.

Everything but :mod:`guard`, which is the part in a training run, works without Megatron and without
its arguments.
"""
