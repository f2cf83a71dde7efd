"""Options of an export, by the names of the API, the CLI and the ``engine`` field of a config.

* ``shapes``: "dynamic" compiles one graph for calls of any size, "static" compiles a graph for each size.
* ``attention``: how its products are computed. "f32": in float32, like all other operations; "bf16": long ones in
  bf16, with static shapes; "auto": bf16 on CPUs with bf16 instructions; "int8": queries and keys in 8 bits, the rest
  as with "auto".
* ``steps``: of a plan whose activation grids change with the timestep, which a graph does not have. "exact": such a
  plan is refused; "finest": every layer uses its most precise grid at all timesteps.
"""

from __future__ import annotations

from typing import Literal, get_args

Shapes = Literal["dynamic", "static"]
Attention = Literal["auto", "f32", "bf16", "int8"]
Steps = Literal["exact", "finest"]

SHAPES: tuple[Shapes, ...] = get_args(Shapes)
ATTENTIONS: tuple[Attention, ...] = get_args(Attention)
STEPS: tuple[Steps, ...] = get_args(Steps)
