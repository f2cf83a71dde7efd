"""Round to nearest: no balancing at all. With static per-tensor activations, the papers' "naive" rows."""

from __future__ import annotations

from typing import Any

from ditq.methods.base import Method


class RoundToNearest(Method):
    name = "rtn"

    def balance(self, *args: Any) -> tuple[None, None]:
        return None, None


METHOD = RoundToNearest()
