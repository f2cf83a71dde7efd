"""Arguments of a module's call: by name, as flat leaves, and with some leaves replaced."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ditq.errors import DitqError

Leaves = dict[str, Any]


def parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's forward, without ``*args`` and ``**kwargs``."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return tuple(n for n, p in inspect.signature(module.forward).parameters.items() if p.kind not in variadic)


def bound(module: nn.Module, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call by the parameter names of the module's forward, defaults included.

    Numbers and None that only ``*args`` takes are left out: HunyuanVideo passes them to all of its blocks, and the
    blocks with ``*args`` ignore them.

    Raises:
        DitqError: a tensor is passed through ``*args``, so it has no name.
    """
    names = parameters(module)
    arguments = inspect.signature(module.forward).bind(*args, **kwargs)
    arguments.apply_defaults()
    variadic = {key: arguments.arguments.pop(key) for key in list(arguments.arguments) if key not in names}
    if any(isinstance(value, Tensor) for extra in variadic.values() if isinstance(extra, tuple) for value in extra):
        raise DitqError(f"{name} is called with arguments that have no name, so the call cannot be replayed.")
    keywords = {key: value for extra in variadic.values() if isinstance(extra, dict) for key, value in extra.items()}
    return {**arguments.arguments, **keywords}


def leaves(value: Any, name: str = "") -> Leaves:
    """Tensors and plain values of nested arguments by dotted names: ``{"rotary.0": ..., "timestep": ...}``."""
    if isinstance(value, Mapping):
        items: Any = value.items()
    elif isinstance(value, (tuple, list)):
        items = enumerate(value)
    else:
        return {name: value}
    flat: Leaves = {}
    for key, inner in items:
        flat |= leaves(inner, f"{name}.{key}" if name else str(key))
    return flat


def filled(value: Any, new: Mapping[str, Any], name: str = "") -> Any:
    """A copy of ``value`` in which the leaves named in ``new`` are replaced."""
    if isinstance(value, Mapping):
        return {key: filled(inner, new, f"{name}.{key}" if name else str(key)) for key, inner in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(filled(inner, new, f"{name}.{i}" if name else str(i)) for i, inner in enumerate(value))
    return new.get(name, value)


def handed_over(before: Mapping[str, Any], outputs: Sequence[Any], after: Mapping[str, Any]) -> dict[str, int]:
    """Maps arguments of a block to the outputs of the block before it.

    Args:
        before: arguments of the first block, nested or flat.
        outputs: of the first block.
        after: arguments of the second block, nested or flat.

    Returns:
        ``{leaf of the arguments: index of the output}``. Empty if the second block reads no output of the first, or
        if another argument differs, so that the outputs alone do not determine the second call.
    """
    earlier, later = leaves(before), leaves(after)
    output_index = {id(output): i for i, output in enumerate(outputs)}
    link = {name: output_index[id(value)] for name, value in later.items() if id(value) in output_index}
    if earlier.keys() != later.keys():
        return {}
    return link if all(_same(later[name], earlier[name]) for name in later.keys() - link.keys()) else {}


def _same(a: Any, b: Any) -> bool:
    """Whether two leaves are the same tensor object, or equal plain values."""
    return a is b if isinstance(a, Tensor) or isinstance(b, Tensor) else bool(a == b)
