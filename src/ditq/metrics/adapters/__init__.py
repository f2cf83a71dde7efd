"""Metrics of other projects, run as they are: VBench in its own environment, ImageReward from its package."""
