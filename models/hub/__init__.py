"""Diffusers pipelines as teachers: one file per family, selected by the pipeline class in ``model_index.json``."""
