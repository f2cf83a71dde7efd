"""Whether OpenVINO can run here. It executes whole transformers, so it is a runtime, not an engine for linears."""

from __future__ import annotations

import importlib.util
from functools import cache

from ditq.errors import DitqError

NAME = "openvino"
NOTE = "runs exported pipelines on a CPU: ditq export DIR --out DIR"


def why_unavailable() -> str | None:
    """Why OpenVINO cannot execute integers on this machine, and what to do about it; or None."""
    if importlib.util.find_spec("openvino") is None:
        return "OpenVINO is not installed: pip install 'ditq[openvino]'"
    return _why_no_integers()


def require() -> None:
    """Raises if OpenVINO cannot execute integers here.

    Raises:
        DitqError: with the reason.
    """
    reason = why_unavailable()
    if reason is not None:
        raise DitqError(f"Runtime 'openvino' is not available: {reason}.")


@cache
def _why_no_integers() -> str | None:
    """Compiles one small layer: only OpenVINO itself shows whether it has integer kernels for this CPU."""
    import openvino as ov

    from ditq.openvino.linear import Kernel
    from ditq.openvino.probe import execution

    try:
        executed = execution(Kernel(64, 32, "i8"), 64)
    except RuntimeError as error:  # no CPU plugin for this machine, or one that cannot compile a product
        return f"OpenVINO {ov.__version__} cannot run here: {str(error).strip().splitlines()[0]}"
    except DitqError as error:  # without VNNI, sums of two 8-bit products are clipped to 16 bits
        return f"{error} It needs a CPU with AVX2-VNNI or AVX512-VNNI"
    if executed == "float":
        return f"OpenVINO {ov.__version__} has no 8-bit products for this CPU (it needs AVX2-VNNI or AVX512-VNNI)"
    return None
