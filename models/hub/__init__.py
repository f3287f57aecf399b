"""Diffusers pipelines as teachers: one file a family, found by the pipeline class that a folder names."""
