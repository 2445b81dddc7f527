"""What casting to FP8 costs the gradients of the residual branches: ``python -m studies.fp8``.

:mod:`~studies.fp8.formats` casts, :mod:`~studies.fp8.scaling` chooses what to multiply by before a
cast, and :mod:`~studies.fp8.recipes` names the combinations of both that Megatron offers.
:mod:`~studies.fp8.linear` puts a recipe into a model, :mod:`~studies.fp8.record` keeps what became
of the gradients, and :mod:`~studies.fp8.run` trains a model with both. :mod:`~studies.fp8.report`
makes the tables of docs/fp8.md from the figures, :mod:`~studies.fp8.picture` its picture.
"""
