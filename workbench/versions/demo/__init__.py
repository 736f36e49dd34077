"""The bundled demo models: a generator of verifiable tasks, a tokenizer, training, evaluation and export.

Commands: `python -m workbench.versions.demo.train`, `.evaluate` and `.export`. Nothing here serves a
model.
"""
