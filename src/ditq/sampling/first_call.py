"""The first call of a pipeline's transformer: an example of the inputs that a pipeline gives it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ditq.architectures import Architecture
from ditq.sampling.sample import batches, call_arguments, quiet, resolve_conditions

Call = dict[str, Any]


class _Recorded(Exception):  # noqa: N818 - ends a pipeline call early, nothing went wrong
    pass


@torch.no_grad()
def first_call(
    pipe: Any, architecture: Architecture, conditions: Sequence[str], arguments: Mapping[str, Any] | None = None
) -> Call:
    """The keyword arguments of the first call of a pipeline's transformer, which is not carried out.

    Args:
        conditions: what to draw at once, prompts or names or numbers of classes; as many of them as go together.
        arguments: of the pipeline's call.
    """
    found: list[Call] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append({**dict(zip([architecture.forward.sample], args, strict=False)), **kwargs})
        raise _Recorded

    hook = pipe.transformer.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        resolved = resolve_conditions(pipe, architecture, conditions)
        first = [resolved[i] for i in batches(pipe, resolved, len(resolved))[0]]
        with quiet(pipe):
            chosen = call_arguments(pipe, architecture, first, steps=2, guidance_scale=None)
            pipe(**{**chosen, **(arguments or {})})
    except _Recorded:
        pass
    finally:
        hook.remove()
    return found[0]
