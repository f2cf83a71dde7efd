"""Forward hooks that are removed at the end of a ``with`` block. All forward hooks are registered here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import nn

# (module, positional arguments, keyword arguments); may return both kinds of arguments changed, as in torch.
Before = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]] | None]
# (module, positional arguments, keyword arguments, output); may return another output.
After = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]


@contextmanager
def hooked(
    module: nn.Module,
    before: Before | None = None,
    after: After | None = None,
    *,
    first: bool = False,
    always: bool = False,
) -> Iterator[None]:
    """Runs ``before`` and ``after`` around every call of ``module`` inside the ``with`` block.

    Args:
        module: the module to hook.
        before: forward pre-hook.
        after: forward hook.
        first: runs ``before`` ahead of the module's existing hooks. Some hooks of ditq change a block's arguments
            (the folded modulation); ahead of them, the arguments are still those that the model passes.
        always: runs ``after`` even if the call fails.
    """
    with ExitStack() as handles:
        if before is not None:
            handle = module.register_forward_pre_hook(before, with_kwargs=True, prepend=first)
            handles.callback(handle.remove)
        if after is not None:
            handle = module.register_forward_hook(after, with_kwargs=True, always_call=always)
            handles.callback(handle.remove)
        yield


@contextmanager
def all_hooked(hooks: Iterable[AbstractContextManager[None]]) -> Iterator[None]:
    """Applies several :func:`hooked` at once: ``all_hooked(hooked(m, before) for m in modules)``."""
    with ExitStack() as entered:
        for hook in hooks:
            entered.enter_context(hook)
        yield
