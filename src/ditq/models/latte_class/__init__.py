"""Vchitect's Latte without text, class-conditional and unconditional, which diffusers does not provide.

The package is not called ``latte``, because diffusers would look for the classes in its own package of that name.
"""

from ditq.models.latte_class.pipeline import LatteClassPipeline
from ditq.models.latte_class.transformer import Latte

__all__ = ["Latte", "LatteClassPipeline"]
