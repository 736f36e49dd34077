"""Benchmarks of engine and kernels: ``python -m engine.bench NAME``. One benchmark a module.

A benchmark module has a docstring that explains its physics, ``run(args) -> dict`` that measures, prints a table and returns
plain figures, and, where it takes options, ``add_arguments(parser)``. ``engine.bench.record`` adds machine, versions and
commit, and the last line of output is that record as JSON.

Those that measure a GPU also have ``measure(session, args) -> dict``, which takes a device that was measured already, so that
``gpu`` can run them one after another; ``--tiny`` runs them at reduced size on any device.
"""
