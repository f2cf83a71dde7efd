"""The measured shapes: linear layers of published transformers at the sizes of their usual images and videos."""

from __future__ import annotations

from typing import NamedTuple


class Model(NamedTuple):
    """Tokens of a call with classifier-free guidance, width, and width of the feed-forward."""

    tokens: int
    width: int
    inner: int


MODELS = {
    "DiT-XL/2 256, 8 pictures": Model(16 * 256, 1152, 4608),
    "PixArt-Sigma 1024": Model(2 * 4096, 1152, 4608),
    "Latte 16x512": Model(2 * 16 * 1024, 1152, 4608),
    "STDiT 16x512": Model(2 * 16 * 1024, 1152, 4608),
    "CogVideoX-2B 49x480x720": Model(2 * (13 * 30 * 45 + 226), 1920, 7680),
    "FLUX 1024": Model(4096 + 512, 3072, 12288),
}


class Product(NamedTuple):
    """A linear layer [N, K] on M tokens, and the models and layers that have it."""

    m: int
    k: int
    n: int
    where: tuple[str, ...]

    @property
    def operations(self) -> int:
        return 2 * self.m * self.k * self.n


def products() -> list[Product]:
    """Attention projections, and the two layers of the feed-forward; those of equal shape once."""
    found: dict[tuple[int, int, int], list[str]] = {}
    for name, (m, d, inner) in MODELS.items():
        for layer, k, n in (("attention", d, d), ("up", d, inner), ("down", inner, d)):
            found.setdefault((m, k, n), []).append(f"{name} {layer}")
    return [Product(*shape, tuple(where)) for shape, where in found.items()]


def widths() -> list[tuple[int, int, int]]:
    """Tokens, width and width of the feed-forward of the quantizers, each once."""
    return list(dict.fromkeys(tuple(model) for model in MODELS.values()))
