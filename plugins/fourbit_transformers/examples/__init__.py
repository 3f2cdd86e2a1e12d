"""Whole programs on fourbit, transformers and its neighbours: `python -m fourbit_transformers.examples.qlora`."""
