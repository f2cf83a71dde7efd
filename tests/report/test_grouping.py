"""Equal blocks as one row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ditq.plan import Branch, LayerPlan, Rotate, Smooth, TensorFormat
from ditq.report.grouping import Row, ranges, sections, within_block

W4 = TensorFormat(bits=4, symmetric=False, granularity="group", group_size=64)
A8 = TensorFormat(bits=8, granularity="token", dynamic=True)


def layer(name: str, role: str = "ffn.up", **fields: Any) -> LayerPlan:
    return LayerPlan(
        name=name, role=role, in_features=128, out_features=128, **({"weight": W4, "activation": A8} | fields)
    )


def rows(layers: list[LayerPlan], **options: Any) -> Iterator[tuple[str, str, Row]]:
    for section in sections(layers, **options):
        for row in section.rows:
            yield section.title, row.label, row


def test_within_block() -> None:
    assert within_block("transformer_blocks.3.ff.net.0.proj") == ("transformer_blocks", 3, "ff.net.0.proj")
    assert within_block("embedder.refiner_blocks.0.attn.to_q") == ("embedder.refiner_blocks", 0, "attn.to_q")
    assert within_block("t_block.1") == ("", 0, "t_block.1")
    assert within_block("proj_out") == ("", 0, "proj_out")


def test_ranges() -> None:
    assert ranges([7, 0, 1, 2, 2, 9, 8]) == ["0-2", "7-9"]
    assert ranges([4]) == ["4"]
    assert ranges([]) == []


def test_equal_blocks_are_one_row_for_each_layer() -> None:
    layers = [layer(f"blocks.{i}.{name}", smooth=Smooth(alpha=i / 10)) for i in range(10) for name in ("q", "k")]
    found = list(rows([layer("embed"), *layers, layer("out")]))
    assert [(title, label, len(row.layers)) for title, label, row in found] == [
        ("", "embed", 1), ("blocks.0-9", "q", 10), ("blocks.0-9", "k", 10), ("", "out", 1),
    ]  # fmt: skip
    assert all(row.total == len(row.blocks) for *_, row in found)


def test_blocks_that_differ_stand_below_their_like() -> None:
    special = {3: {"rotate": Rotate(block=64)}, 4: {"weight": None, "activation": None, "reason": "because"}}
    layers = [layer(f"blocks.{i}.{name}", **special.get(i, {})) for i in range(6) for name in ("q", "k")]
    found = [(label, sorted(row.blocks)) for _, label, row in rows(layers)]
    assert found == [(name, blocks) for name in ("q", "k") for blocks in ([0, 1, 2, 5], [3], [4])]


def test_formats_roles_rounding_and_reasons_tell_rows_apart() -> None:
    changes: list[dict[str, Any]] = [
        {}, {"weight": W4.model_copy(update={"group_size": 32})}, {"activation": None}, {"role": "ffn.down"},
        {"rounding": "gptq"}, {"reason": "x"}, {"smooth": Smooth(alpha=0.5, folded="norm")},
        {"smooth": Smooth(alpha=0.5)}, {"timesteps": ((0, 1), (2, 3))}, {"branch": Branch(rank=8)},
        {"rotate": Rotate(block=64)}, {"rotate": Rotate(kind="regular", block=64)},
    ]  # fmt: skip
    layers = [layer(f"blocks.{i}.q", **change) for i, change in enumerate(changes)]
    assert len(list(rows(layers))) == len(changes)


def test_rows_of_one_role_stand_together() -> None:
    layers = [
        layer(f"blocks.{i}.{r}", role=r, **({"rotate": Rotate(block=64)} if i else {})) for i in (0, 1) for r in "qk"
    ]
    assert [label for _, label, _ in rows(layers, by="roles")] == ["q", "q", "k", "k"]


def test_every_layer_is_in_one_row_however_they_are_grouped() -> None:
    layers = [layer(f"{stack}.{i}.q", role=stack) for i in range(3) for stack in ("a", "b")] + [layer("c")]
    for by in ("blocks", "layers", "roles"):
        assert sorted(x.name for *_, row in rows(layers, by=by) for x in row.layers) == sorted(x.name for x in layers)
    assert [label for _, label, _ in rows(layers, by="roles")] == ["a", "b", "ffn.up"]
    assert [label for _, label, _ in rows(layers, by="layers")] == [x.name for x in layers]
