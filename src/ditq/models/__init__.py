"""Transformers, VAEs and pipelines that diffusers does not have.

A folder in this package must not have the name of a module of ``diffusers.pipelines`` (such as ``latte``): diffusers
would look there for the classes that ``model_index.json`` names.
"""
