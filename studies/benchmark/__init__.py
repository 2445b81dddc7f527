"""What ProRes costs, and how fast training is: ``python -m studies.benchmark``.

A case is a model, a precision and the sides that are compared; :mod:`~studies.benchmark.cases` is
the table of them. :mod:`~studies.benchmark.main` runs one after the other, each by
:mod:`~studies.benchmark.worker` in a process of its own, which builds the models
(:mod:`~studies.benchmark.trainee`), counts their memory and times them in turn
(:mod:`~studies.benchmark.measure`). In two cases :mod:`~studies.benchmark.rival` times the whole
main program against a plain PyTorch loop, :mod:`~studies.benchmark.plain`.
:mod:`~studies.benchmark.report` makes the table and the verdicts from what they have measured.
"""
