"""The checkpoint format, and the diffusers backend that reads and writes it.

Importing this package imports neither torch nor diffusers; see ``registration``.
"""
