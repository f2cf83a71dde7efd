"""Random damage, as a pure function of a ``random.Random``: to bytes, to trees of JSON or YAML, and to tensors."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import torch
import yaml
from torch import Tensor

# A text that stands for nested lists, which neither json nor yaml can write this deep.
_DEEP = "@nested-{}@"
_DEPTHS = (40, 3000)

EXTREME: tuple[Any, ...] = (
    10**30, -(10**30), 2**63, -1, 0, 1e308, 5e-324, float("nan"), float("inf"), "", "x" * 100_000, "\x1b[31m\x00\r\n",
    "[/red]", "../../../etc/passwd", "(a+)+$", "[", None, True, [], {}, [[]], {"": ""}, [0] * 30_000, "é\u202e\ud7ff",
    *map(_DEEP.format, _DEPTHS),
)  # fmt: skip

# Fields that mean something somewhere in the files.
FIELDS = ("engine", "recipe", "overrides", "_name_or_path", "format_version", "__class__", "", "x" * 300)

YAML_LINES = (
    "bomb: &a [1, 2]\nmore: [*a, *a]\n", "when: 2001-99-99\n", "evil: !!python/object/apply:os.getpid []\n", "\t- x\n",
    "? [a]\n: b\n", "n: 0x" + "f" * 5000 + "\n", "name: a\nname: b\n", "---\n", "%TAG ! x\n", "{\n",
)  # fmt: skip


def bytes_of(random: Random, content: bytes, most: int | None = None) -> bytes:
    """Damages bytes in one place, or in a few: flipped, cut off, repeated, deleted, replaced.

    Args:
        most: changes the first bytes only (the header of a file).
    """
    end = min(len(content), most or len(content))
    for _ in range(random.choice((1, 1, 1, 4))):
        at = random.randrange(max(end, 1))
        size = random.choice((1, 2, 8, 64, 1000))
        kind = random.randrange(6)
        if kind == 0 and content:
            at = min(at, len(content) - 1)
            content = content[:at] + bytes([content[at] ^ 1 << random.randrange(8)]) + content[at + 1 :]
        elif kind == 1:
            content = content[:at]
        elif kind == 2:
            content = content[:at] + content[at : at + size] + content[at:]
        elif kind == 3:
            content = content[:at] + content[at + size :]
        elif kind == 4:
            content = content[:at] + random.randbytes(size) + content[at + size :]
        else:
            content = content[:at] + random.randbytes(size) + content[at:]
    return content


def tree(random: Random, content: Any) -> Any:
    """A copy of a tree of dictionaries and lists with one or two fields damaged."""
    content = json.loads(json.dumps(content))
    for _ in range(random.choice((1, 1, 2))):
        containers = [c for c in _containers(content) if c]
        if not containers:
            return content
        _damage(random, random.choice(containers))
    return content


def _containers(content: Any) -> list[Any]:
    found, waiting = [], [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict | list):
            found.append(value)
            waiting += value.values() if isinstance(value, dict) else value
    return found


def _damage(random: Random, inside: Any) -> None:
    key = random.choice(list(inside)) if isinstance(inside, dict) else random.randrange(len(inside))
    value = inside[key]
    kind = random.randrange(7)
    if kind == 0:
        del inside[key]
    elif kind == 1 and isinstance(inside, dict):
        inside[random.choice((key + "x", key.upper(), random.choice(FIELDS)))] = inside.pop(key)
    elif kind == 2:
        inside[key] = _other_type(value)
    elif kind == 3:
        other = random.choice(list(inside)) if isinstance(inside, dict) else random.randrange(len(inside))
        inside[key], inside[other] = inside[other], value
    elif kind == 4 and isinstance(inside, list):
        inside.extend([value] * random.choice((1, 5, 2000)))
    elif kind == 4:
        inside[random.choice(FIELDS)] = random.choice((value, *EXTREME))
    elif kind == 5:
        inside[key] = _nudged(random, value)
    else:
        inside[key] = random.choice(EXTREME)


def _other_type(value: Any) -> Any:
    if isinstance(value, str):
        return [value]
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int):
        return float(value) if value % 2 else str(value)
    return {str(i): v for i, v in enumerate(value)} if isinstance(value, list) else str(value)


def _nudged(random: Random, value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return random.choice((value + 1, value - 1, -value, value * 2))
    if isinstance(value, str) and value:
        at = random.randrange(len(value))
        return value[:at] + chr(random.randrange(32, 127)) + value[at + 1 :]
    return value


def as_json(content: Any) -> str:
    return _deepened(json.dumps(content))


def as_yaml(random: Random, content: Any) -> str:
    """YAML, sometimes with a line of what YAML can do and a plain file needs not."""
    text = _deepened(yaml.safe_dump(content, allow_unicode=True))
    if random.random() < 0.2:
        lines = text.splitlines(keepends=True)
        lines.insert(random.randrange(len(lines) + 1), random.choice(YAML_LINES))
        text = "".join(lines)
    return text


def _deepened(text: str) -> str:
    for depth in _DEPTHS:
        for quote in ('"', "'"):
            text = text.replace(f"{quote}{_DEEP.format(depth)}{quote}", "[" * depth + "]" * depth)
    return text


def tensors(random: Random, content: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy with one tensor that is missing, renamed, of another shape or dtype, or with other numbers."""
    out = {name: tensor.clone() for name, tensor in content.items()}
    name = random.choice(sorted(out))
    tensor = out[name]
    kind = random.randrange(7)
    if kind == 0:
        del out[name]
    elif kind == 1:
        out[random.choice((name + "x", "x", "é", name.upper()))] = out.pop(name)
    elif kind == 2:
        out[name] = tensor.reshape(-1)[: random.randrange(tensor.numel() + 1)].clone()
    elif kind == 3:
        out[name] = tensor.to(random.choice((torch.float64, torch.float16, torch.int64, torch.bool, torch.uint8)))
    elif kind == 4 and tensor.numel():
        flat = tensor.contiguous().view(-1)
        at = random.randrange(flat.numel())
        numbers = (0, 1) if not tensor.is_floating_point() else (float("nan"), float("inf"), -1.0, 0.0, 1e30)
        flat[at] = random.choice(numbers)
    elif kind == 5 and tensor.numel():
        raw = tensor.contiguous().view(-1).view(torch.uint8)
        raw[random.randrange(raw.numel())] ^= 1 << random.randrange(8)
    else:
        out[f"extra{random.randrange(9)}"] = torch.zeros(random.choice(((), (0,), (3, 1))))
    return out
