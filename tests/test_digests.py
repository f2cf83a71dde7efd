"""Digests are part of formats on disk: written out once by hand."""

import hashlib
from pathlib import Path

import pytest
import torch

from ditq import digests


def test_text_and_json() -> None:
    assert digests.of_text("a") == "ca978112ca1bbdca"
    assert digests.of_text("a", 32) == "ca978112ca1bbdcafac231b39a23dc4d"
    assert digests.of_json({"b": 1, "a": [None]}) == digests.of_text('{"a": [null], "b": 1}')


def test_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    assert digests.of_file(tmp_path / "a") == digests.of_text("a")


@pytest.mark.parametrize(
    ("tensor", "raw", "kind"),
    [
        (torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).T, b"\1\3\2\4", "torch.uint8(2, 2)"),
        (torch.tensor([1.0], dtype=torch.bfloat16), b"\x80\x3f", "torch.bfloat16(1,)"),
        (torch.tensor(-1, dtype=torch.int8), b"\xff", "torch.int8()"),
        (torch.empty(0, 3), b"", "torch.float32(0, 3)"),
    ],
    ids=["not-contiguous", "bfloat16", "number", "empty"],
)
def test_tensor(tensor: torch.Tensor, raw: bytes, kind: str) -> None:
    assert digests.tensor_bytes(tensor) == raw
    assert digests.of_tensor(tensor) == hashlib.sha256(raw + kind.encode()).hexdigest()[:16]
