"""The CPU device: Megatron's own training program on CPU tensors and gloo.

Megatron Core has no CPU path; this package gives it one, for a first run on a laptop and for tests
of every parallel layout without a GPU. It is chosen with ``--device cpu``, never silently, and
nothing of it is imported otherwise. Three parts, in the order in which they act:

- :mod:`~megatron_prores.cpu.gpu_packages`: hides what a container has for its GPUs;
- :mod:`~megatron_prores.cpu.torch_device`: what torch.cuda and device arguments mean, before
  Megatron is imported;
- :mod:`~megatron_prores.cpu.megatron_device`: the few places where Megatron itself has to differ.

The defaults for the CPU, and the flags that cannot work on it, are in ``command_line/cpu.py``.
"""
