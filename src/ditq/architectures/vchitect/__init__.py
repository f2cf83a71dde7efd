"""Latte of Vchitect without text, class-conditional and unconditional, which diffusers does not have.

Not in a package called ``latte``: diffusers would look for its classes in its own of that name.
"""

from ditq.architectures.vchitect.latte import Latte
from ditq.architectures.vchitect.pipeline import LatteClassPipeline

__all__ = ["Latte", "LatteClassPipeline"]
