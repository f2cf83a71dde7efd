"""Transformers, VAEs and pipelines that diffusers does not have."""
