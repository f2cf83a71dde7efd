"""Transformers, VAEs and pipelines that diffusers does not have.

A folder here must not be called like one of ``diffusers.pipelines`` (``latte``): diffusers would look there for the
classes that ``model_index.json`` names.
"""
