"""What is chosen when a pipeline is exported, in the words of the API, the CLI and the ``engine`` field of a config.

* ``shapes``: "dynamic" compiles one graph for calls of any size, "static" another for each size that comes.
* ``attention``: how its products are computed. "f32" as everything else in float32; "bf16" where they are long, with
  static shapes; "auto": bf16 on CPUs that have the instructions; "int8": queries and keys in 8 bits, else as "auto".
"""

from __future__ import annotations

from typing import Literal, get_args

Shapes = Literal["dynamic", "static"]
Attention = Literal["auto", "f32", "bf16", "int8"]

SHAPES: tuple[Shapes, ...] = get_args(Shapes)
ATTENTIONS: tuple[Attention, ...] = get_args(Attention)
