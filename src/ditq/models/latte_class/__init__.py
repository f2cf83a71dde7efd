"""Latte of Vchitect without text, class-conditional and unconditional, which diffusers does not have.

Not in a package called ``latte``: diffusers would look for its classes in its own of that name.
"""

from ditq.models.latte_class.pipeline import LatteClassPipeline
from ditq.models.latte_class.transformer import Latte

__all__ = ["Latte", "LatteClassPipeline"]
