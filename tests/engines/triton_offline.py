"""Compiles the kernels for cards that are not there, and reads the machine code. A program of its own, since the
tests around it run Triton's interpreter: ``python tests/engines/triton_offline.py 80 linear`` prints JSON.

Triton's wheel brings what it takes: ptxas, nvdisasm and cuobjdump.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ditq.engines.triton import tuning
from ditq.engines.triton.activation import activation_kernel
from ditq.engines.triton.expand import expand_kernel
from ditq.engines.triton.linear import linear_kernel
from ditq.engines.triton.norm import norm_kernel
from ditq.engines.triton.quantize import quantize_kernel
from ditq.engines.triton.rows import rows_per_program
from ditq.engines.triton.tiles import LARGEST, Tile, Work, tiles

# Types of pointers by the beginning of their name; the rest is 16-bit activations, and integers.
_TYPES = {
    "x_ptr": "*bf16", "w_ptr": "*i8", "y_ptr": "*bf16", "codes_ptr": "*i8", "packed_ptr": "*u8",
    "x_scale_ptr": "*fp32", "w_scale_ptr": "*fp32", "scale_ptr": "*fp32", "given_ptr": "*fp32", "smooth_ptr": "*fp32",
    "signs_ptr": "*fp32", "x_zero_ptr": "*i16", "w_zero_ptr": "*i8", "zero_ptr": "*i16",
    "x_sum_ptr": "*i32", "sums_ptr": "*i32", "eps": "fp32",
}  # fmt: skip

PLAIN = ("w8asym", "w4asym", "int8", "w4asym-g128")

_DTYPES = {
    torch.int8: "*i8", torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32", torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
}  # fmt: skip

Case = tuple[str, Any, dict[str, Any], int, int]
"""Name, kernel, what is constant or absent (None), warps, stages."""


def linear_cases(capability: int, wide: bool) -> Iterator[Case]:
    """Every tile of the table; the formats in full for the widest, which needs the most registers."""
    plain = {"gate_ptr": None, "residual_ptr": None, "low_ptr": None, "up_ptr": None}
    absent = {**plain, "x_zero_ptr": None}
    gated = {"low_ptr": None, "up_ptr": None, "x_zero_ptr": None}
    formats: dict[str, dict[str, Any]] = {
        "w8asym": {"BITS": 8, **absent},
        "int8": {"BITS": 0, "w_zero_ptr": None, "x_sum_ptr": None, **absent},
    }
    more: dict[str, dict[str, Any]] = {
        "w4asym": {"BITS": 4, **absent},
        "w4asym-gate-one-sample": {"BITS": 4, "ONE_SAMPLE": True, **gated},
        "w8asym-low-rank-gate-one-sample": {"BITS": 8, "BR": 32, "ONE_SAMPLE": True, "x_zero_ptr": None},
    }
    most: dict[str, dict[str, Any]] = {
        "w8asym-gate": {"BITS": 8, **gated},
        "w4asym-a8asym": {"BITS": 4, **plain},
    }
    groups = {"w4asym-g128": {"BITS": 4, **absent}}
    most_groups = {"w4asym-a8asym-g128": {"BITS": 4, **plain}}
    k = 1152
    tables: tuple[tuple[Any, int, dict[Work, dict[str, dict[str, Any]]]], ...] = (
        (tiles(capability, False), k, {"plain": formats, "more": more, "most": most}),
        (tiles(capability, True), 128, {"plain": groups, "more": {}, "most": most_groups}),
    )
    for table, step, works in tables:
        for work, kinds in works.items():
            fit = [tile for _, tile in table if LARGEST[work][capability] >= tile.BM * tile.BN]
            # Layers without extras, with all tiles; with extras, with the one that takes most registers.
            for name, fixed in kinds.items():
                tried = tuning.candidates(capability, work) if wide and step == k else fit
                for tile in tried if name in PLAIN else fit[: 1 if wide or work == "more" else 0]:
                    yield _linear(f"{name} {_words(tile)}", fixed, tile, parts=k // step, step=step)


def _words(tile: Tile) -> str:
    return f"{tile.BM}x{tile.BN}x{tile.BK} w{tile.warps} s{tile.stages}"


def _linear(name: str, fixed: dict[str, Any], tile: Tile, parts: int, step: int) -> Case:
    constants = {
        "PARTS": parts, "STEP": 0 if parts == 1 else step, "EVEN": step % tile.BK == 0, "X_EACH": 1, "W_EACH": 1,
        "BM": tile.BM, "BN": tile.BN, "BK": tile.BK, "BR": 16, "ONE_SAMPLE": False, **fixed,
    }  # fmt: skip
    return name, linear_kernel, constants, tile.warps, tile.stages


def prologue_cases(capability: int, wide: bool) -> Iterator[Case]:
    plain: dict[str, Any] = {
        "smooth_ptr": None, "signs_ptr": None, "hadamard_ptr": None, "given_ptr": None, "zero_ptr": None, "BITS": 8
    }  # fmt: skip
    rotated = {"given_ptr": None, "zero_ptr": None, "BITS": 8}
    # The engine rotates by torch on older cards, see ``engine.rotates``.
    labels = [("plain", plain, 0), ("rotated", rotated, 128)][: 2 if capability >= 90 else 1]
    for label, fixed, block in labels:
        for width in (1152, 3072) if wide else (1152,):
            r, c, warps = rows_per_program(width, block)
            # Triton takes an argument of 1 as a constant at run time, too.
            own: dict[str, Any] = {**fixed, "BLOCK": block, "R": r, "C": c, "G": 1}
            yield f"quantize {label} {width}", quantize_kernel, own, warps, 1
            norm = {"weight_ptr": None, "bias_ptr": None, "GROUP": c}
            yield f"norm {label} {width}", norm_kernel, {**norm, **own}, warps, 1
            r, c, warps = rows_per_program(4 * width, block)
            own |= {"R": r, "C": c}
            gelu = {"NAME": "gelu_tanh", "gate_ptr": None, "GROUP": c}
            yield f"gelu {label} {4 * width}", activation_kernel, {**gelu, **own}, warps, 1
    yield "expand", expand_kernel, {"BITS": 3, "BN": 16, "BK": 256}, 4, 1


def proof_kernels(capability: int) -> Iterator[tuple[str, Any]]:
    """Names of checks and the kernels that they launch, compiled as the launch on a GPU would, once each."""
    from triton.runtime import JITFunction

    from ditq.engines.triton import linear, proof
    from ditq.engines.triton.engine import rotates

    launched: list[Any] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = [parameter.name for parameter in self.params]
        own = {name: kwargs[name] for name in names if name in kwargs}
        own.update(zip([name for name in names if name not in own], args, strict=True))
        options = {k: v for k, v in kwargs.items() if k not in own}
        launched.append((self, [own[name] for name in names], options))

    cpu = torch.device("cpu")
    linear.capability_of = lambda device: capability
    proof.rotates = lambda *arguments: capability >= 90 and rotates(*arguments)
    JITFunction.run = run
    done = set()
    for check in proof.checks(cpu):
        launched.clear()
        check.run(cpu)  # its outputs are never written
        for kernel, values, options in launched:
            source = _source(kernel, values)
            if (key := (kernel.fn.__name__, str(source.signature), str(source.constants), str(options))) not in done:
                done.add(key)
                yield check.name, triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _source(kernel: Any, values: list[Any]) -> ASTSource:
    """Types, constants and alignment as Triton finds them at a launch."""
    types, constants, aligned = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(kernel.params, values, strict=True)):
        one = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or one:
            types[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        size = value.data_ptr() if isinstance(value, torch.Tensor) else value
        types[parameter.name] = (
            _DTYPES[value.dtype] if isinstance(value, torch.Tensor) else "fp32" if type(value) is float else "i32"
        )
        if type(size) is int and size % 16 == 0 and not parameter.do_not_specialize:
            aligned[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)


def machine_code(kernel: Any, constants: dict[str, Any], capability: int, warps: int, stages: int) -> dict[str, Any]:
    """Registers, spilled bytes, shared memory and matrix instructions of a kernel."""
    names = list(inspect.signature(kernel.fn).parameters)
    own = {"x_ptr": "*i8"} if kernel is linear_kernel else {}
    types = {name: "constexpr" if name in constants else own.get(name, _type(name)) for name in names}
    aligned = [i for i, name in enumerate(names) if _aligned(types[name], name)]
    source = ASTSource(
        fn=kernel, signature=types, constexprs=constants, attrs={(i,): [["tt.divisibility", 16]] for i in aligned}
    )
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return _usage(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options))


def _usage(compiled: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    return {
        "registers": registers,
        "spilled": stack,
        "shared": compiled.metadata.shared,
        "matrix": sorted(set(re.findall(r"\b(?:IGMMA|HGMMA|IMMA|HMMA)\b", code))),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4}\*/", code, re.MULTILINE)),
    }


def _type(name: str) -> str:
    return _TYPES.get(name, "*bf16" if name.endswith("_ptr") else "i32")


def _aligned(kind: str, name: str) -> bool:
    # As at run time: pointers, and sizes that are multiples of 16; M and T are never specialized.
    return kind.startswith("*") or (kind == "i32" and name not in ("M", "T", "G", "given_stride"))


def _tool(name: str, *arguments: str) -> str:
    from triton.backends.nvidia import compiler

    path = Path(compiler.__file__).parent / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def main(capability: int, which: str, wide: bool) -> None:
    if which == "proof":
        for name, compiled in proof_kernels(capability):
            print(json.dumps({"name": name, **_usage(compiled)}), flush=True)
        return
    cases = linear_cases(capability, wide) if which == "linear" else prologue_cases(capability, wide)
    for name, kernel, constants, warps, stages in cases:
        found = machine_code(kernel, constants, capability, warps, stages)
        print(json.dumps({"name": name, **found}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], "wide" in sys.argv[3:])
