"""Machine code for cards that are not here: every tile of the table reaches the matrix instructions, spills no
registers and fits in the shared memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from triton_helpers import why_not

from ditq.engines.triton.tiles import ARCHITECTURES, SHARED_MEMORY

if (reason := why_not()) is not None:
    pytest.skip(reason, allow_module_level=True)

from triton.backends.nvidia import compiler

if not all((Path(compiler.__file__).parent / "bin" / name).exists() for name in ("ptxas", "nvdisasm", "cuobjdump")):
    pytest.skip("this Triton brings no ptxas, nvdisasm and cuobjdump", allow_module_level=True)

MATRIX = {80: "IMMA", 89: "IMMA", 90: "IGMMA"}


@cache
def compiled(capability: int, which: str, wide: bool) -> list[dict[str, Any]]:
    """What ``triton_offline.py`` printed, kernel by kernel."""
    command = [sys.executable, Path(__file__).with_name("triton_offline.py"), str(capability), which]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [*command, *(["wide"] if wide else [])], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_the_proof(capability: int) -> None:
    """What the engine compiles to prove itself on a card, as it is specialized there."""
    found = compiled(capability, "proof", False)
    assert len(found) >= 38
    assert any("rotated" in kernel["name"] for kernel in found) == (capability >= 90)
    for kernel in found:
        if kernel["name"].startswith("int8_linear"):
            assert MATRIX[capability] in kernel["matrix"], kernel
        # Rows of odd sizes are read byte by byte, which takes registers; no layer of a model has them.
        assert kernel["spilled"] == 0 or "odd" in kernel["name"], kernel
        assert kernel["shared"] <= SHARED_MEMORY[capability], kernel


WIDE = [pytest.param(False, id="table"), pytest.param(True, id="all", marks=pytest.mark.slow)]


@pytest.mark.parametrize("wide", WIDE)
@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_products(capability: int, wide: bool) -> None:
    found = compiled(capability, "linear", wide)
    assert len(found) >= 5
    for kernel in found:
        assert MATRIX[capability] in kernel["matrix"], kernel
        assert kernel["spilled"] == 0, kernel
        assert kernel["shared"] <= SHARED_MEMORY[capability], kernel


@pytest.mark.parametrize("wide", WIDE)
@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_prologues(capability: int, wide: bool) -> None:
    found = compiled(capability, "prologue", wide)
    assert any("rotated" in kernel["name"] for kernel in found) == (capability >= 90)
    for kernel in found:
        if "rotated" in kernel["name"]:
            assert {"HMMA", "HGMMA"} & set(kernel["matrix"]), kernel
        assert kernel["spilled"] == 0, kernel
        assert kernel["shared"] <= SHARED_MEMORY[capability], kernel
