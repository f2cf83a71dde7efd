"""Forward hooks that last as long as a ``with`` block: the one place where they are registered and removed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import nn

# (module, positional arguments, keyword arguments); may return both arguments changed, as torch's own hooks do.
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
    """Inside, every call of ``module`` runs ``before`` and ``after``.

    Args:
        first: ``before`` runs ahead of the hooks that the module has already. Some of ditq's own hooks belong to a
            block (the folded modulation): only ahead of them are its arguments those that the model passes.
        always: ``after`` runs also where the call fails.
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
    """Inside, all of several :func:`hooked` are in force: ``all_hooked(hooked(m, before) for m in modules)``."""
    with ExitStack() as entered:
        for hook in hooks:
            entered.enter_context(hook)
        yield
