"""Calls of modules: recorded, batched and replayed."""
