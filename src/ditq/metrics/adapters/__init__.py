"""Adapters for metrics of other projects: VBench in its own environment, ImageReward from its package."""
