"""The header of a safetensors file: its metadata without the tensors, and in a fixed order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import tiny_dit
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ditq
from ditq.checkpoint.header import metadata, sort_metadata

TEXTS = {"format": "pt", "zeta": '{"ä": "\\n\x01"}', "alpha": "", "μ": "µ"}


def test_sorting_changes_the_order_only(tmp_path: Path) -> None:
    contents = set()
    for _ in range(8):
        save_file({"b": torch.arange(3), "a": torch.ones(2, 2)}, tmp_path / "file.safetensors", TEXTS)
        sort_metadata(tmp_path / "file.safetensors")
        contents.add((tmp_path / "file.safetensors").read_bytes())
    assert len(contents) == 1
    assert metadata(tmp_path / "file.safetensors") == TEXTS
    assert list(metadata(tmp_path / "file.safetensors")) == sorted(TEXTS)
    with safe_open(tmp_path / "file.safetensors", "pt") as file:
        assert file.metadata() == TEXTS
    assert torch.equal(load_file(tmp_path / "file.safetensors")["b"], torch.arange(3))


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"\xff" * 40, b"\x02" + 7 * b"\0" + b"[]", b"\x09" + 7 * b"\0" + b"[" * 9]
)
def test_other_files_have_no_metadata(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    assert metadata(tmp_path / "file") == {}
    with pytest.raises(ValueError, match=r"."):
        sort_metadata(tmp_path / "file")


def test_same_quantization_gives_the_same_bytes(tmp_path: Path) -> None:
    contents = set()
    for i in range(4):
        pipe = tiny_dit()
        ditq.quantize(pipe, "rtn-w8a8")
        folder = ditq.save(pipe, tmp_path / str(i))
        contents.add(tuple(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()))
    assert len(contents) == 1
