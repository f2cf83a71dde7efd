"""Plan: validation that names the field, JSON, hash, diff, and arithmetic checked by hand and against files."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from helpers import layer_plan, tiny_model, tiny_statistics, token_format, weight_format
from pydantic import ValidationError
from safetensors import safe_open

import ditq
from ditq.errors import CheckpointError, UsageError
from ditq.numerics import Grid
from ditq.plan import FORMAT_VERSION, Branch, Fold, LayerPlan, Plan, Rotate, Smooth, StepFormat

STEP = StepFormat(begin=0, end=9, activation=token_format(4))


def small_plan(**fields: Any) -> Plan:
    layers = (
        layer_plan("blocks.0.up", k=64, n=32),
        layer_plan("blocks.0.down", k=32, n=64, weight=weight_format(3, symmetric=True), activation=None, bias=False),
        LayerPlan(name="head", role="final", in_features=32, out_features=16, reason="role final is kept in 16 bit"),
    )
    defaults: dict[str, Any] = {
        "method": "rtn", "recipe": "mine", "architecture": "dit", "layers": layers,
        "nominal_weight_bits": 4, "nominal_activation_bits": 8, "other_parameters": 1000,
    }  # fmt: skip
    return Plan(**{**defaults, **fields})


# --------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize("bits", [0, 1, 9, 16])
def test_format_refuses_bits(bits: int) -> None:
    with pytest.raises(ValidationError, match="bits"):
        Grid(bits=bits, granularity="token")


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"granularity": "group"}, "group_size"),
        ({"granularity": "token", "group_size": 32}, "group_size"),
        ({"granularity": "group", "group_size": 0}, "group_size"),
        ({"granularity": "row"}, "granularity"),
        ({"granularity": "channel", "levels": "cubic"}, "levels"),
        ({"granularity": "channel", "full": True, "symmetric": False}, "full is for symmetric grids"),
        ({"granularity": "channel", "full": True, "levels": "normal"}, "full is for symmetric grids"),
        ({"granularity": "channel", "levels": "normal", "symmetric": False}, "have no zero point: symmetric must be"),
        ({"granularity": "token", "wide": True}, "wide"),
    ],
)
def test_format_names_the_wrong_field(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        Grid(bits=4, **fields)


@pytest.mark.parametrize("bits", [7, 8])
def test_normal_levels_of_many_bits_are_refused(bits: int) -> None:
    with pytest.raises(ValidationError, match=f"'normal' have 2 to 6 bits, got bits={bits}; set levels to 'uniform'"):
        Grid(bits=bits, granularity="channel", levels="normal")
    grid = Grid(bits=4, granularity="group", group_size=32, levels="normal")
    assert grid.with_bits(3) == Grid(bits=3, granularity="group", group_size=32, levels="normal")
    assert grid.with_bits(bits) == Grid(bits=bits, granularity="group", group_size=32)
    assert grid.code_range == (-104, 104) and str(grid) == "int4 normal/group 32, static"


def test_uniform_grids_are_written_as_before_levels_existed() -> None:
    assert Grid(bits=4, granularity="channel").model_dump() == {
        "bits": 4, "symmetric": True, "granularity": "channel", "group_size": None, "dynamic": False
    }  # fmt: skip
    assert Grid(bits=4, granularity="channel", levels="normal").model_dump()["levels"] == "normal"
    assert (small_plan().hash(), small_plan().binding()) == ("7ad09472332675ec", "92a92e5a6ab1c284")  # ditq 0.2


def test_group_size_that_does_not_divide_names_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"the 96 columns, got 64; possible: 16, 32, 48, 96"):
        weight_format(granularity="group", group=64).groups(96)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"weight": None, "activation": token_format()}, "keeps 16-bit weights"),
        ({"weight": None, "activation": None, "rotate": Rotate(block=32)}, "keeps 16-bit weights"),
        ({"weight": token_format(4)}, "weights are static"),
        ({"activation": weight_format(8)}, "no granularity 'channel'"),
        ({"activation": Grid(bits=8, granularity="token")}, "static activation scales are per tensor"),
        ({"activation": Grid(bits=8, granularity="tensor", symmetric=False)}, "static .* are symmetric"),
        ({"activation": Grid(bits=4, granularity="token", dynamic=True, full=True)}, "full is for weights"),
        ({"activation": Grid(bits=4, granularity="tensor", levels="normal")}, "'normal' have dynamic scales"),
        ({"weight": weight_format(granularity="group", group=4)}, "groups of weights must have at least 8"),
        ({"activation": token_format(granularity="group", group=4)}, "groups of activations must have at least 8"),
        ({"weight": weight_format(granularity="group", group=24)}, "group_size must divide the 32 columns"),
        ({"activation": token_format(granularity="group", group=24)}, "group_size must divide the 32 columns"),
        ({"rotate": Rotate(block=64)}, "rotation block 64"),
        ({"branch": Branch(rank=64, svd=64)}, "cannot hold 64 singular values"),
        ({"rotate": Rotate(kind="regular", block=64)}, "rotation block 64"),
        ({"timesteps": ((0, 10), (30, 20))}, r"timestep range \[30, 20\]"),
        ({"steps": (STEP.model_copy(update={"end": -1}),)}, "the steps from 0 to -1 are none"),
        ({"steps": (StepFormat(begin=0, end=5), StepFormat(begin=5, end=9))}, "must be the most precise one"),
        ({"steps": (STEP, STEP.model_copy(update={"end": 20}))}, "two of its steps are at timestep 0"),
        ({"steps": (STEP,), "timesteps": ((0, 10),)}, "cannot have steps too"),
        ({"steps": (STEP,), "activation": Grid(bits=8, granularity="tensor")}, "static .* cannot change"),
        ({"steps": (StepFormat(begin=0, end=9, activation=weight_format(4)),)}, "no granularity 'channel'"),
        ({"steps": ()}, "steps"),
        ({"steps": (STEP,), "weight": None, "activation": None}, "its plan changes its inputs"),
        ({"range_weights": (weight_format(4),)}, "0 timestep ranges and 1 weight grids"),
        ({"timesteps": ((0, 1),), "range_weights": (weight_format(8),)}, "must be the most precise one of its ranges"),
        ({"timesteps": ((0, 1),), "range_weights": (token_format(4),)}, "weights are static"),
        ({"smooth": {"alpha": 1.5}}, r"smooth\.alpha"),
        ({"out_features": 0}, "out_features"),
        ({"rounding": "gptq!"}, "rounding"),
        ({"name": ""}, "name"),
    ],
)
def test_layer_plan_names_the_wrong_field(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises((ValidationError, UsageError), match=complaint):
        layer_plan(**fields)


def test_layers_named_twice_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"layers named twice: a, b"):
        small_plan(layers=tuple(layer_plan(name) for name in "abcba"))


def test_plans_are_frozen() -> None:
    plan = small_plan()
    with pytest.raises(ValidationError):
        plan.seed = 3
    with pytest.raises(ValidationError):
        plan.layers[0].role = "ffn.down"


# --------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    "plan",
    [
        small_plan(),
        small_plan(
            layers=(
                layer_plan(smooth=Smooth(alpha=0.35, folded="norm"), rotate=Rotate(block=32, seed=7)),
                layer_plan("t", timesteps=((0, 499), (500, 999)), smooth=Smooth(alpha=0.1, power_of_two=True)),
            ),
            folds=(Fold(norm="blocks.0.norm1", width=64, block="blocks.0", argument="timestep"),),
        ),
    ],
    ids=["plain", "with-everything"],
)
def test_json_round_trip(plan: Plan) -> None:
    again = Plan.from_dict(json.loads(plan.to_json()))
    assert again == plan
    assert again.hash() == plan.hash()


def test_newer_format_version_names_the_ditq_to_install() -> None:
    data = {**json.loads(small_plan().to_json()), "format_version": FORMAT_VERSION + 2, "unheard": "of"}
    with pytest.raises(CheckpointError, match=rf"format_version {FORMAT_VERSION + 2}.*pip install 'ditq>=0"):
        Plan.from_dict(data)


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("layers", 0, "weight", "bits"), 12, r"layers\.0\.weight\.bits.*12"),
        (("layers", 1, "out_features"), "many", r"layers\.1\.out_features"),
        (("method",), None, "method"),
        (("storage_dtype",), "int8", "storage_dtype"),
        (("format_version",), 0, "format_version"),
        (("extra",), 1, "extra"),
    ],
)
def test_damaged_json_names_the_field(path: tuple[Any, ...], value: object, complaint: str) -> None:
    data = target = json.loads(small_plan().to_json())
    for part in path[:-1]:
        target = target[part]
    target[path[-1]] = value
    with pytest.raises(CheckpointError, match=complaint):
        Plan.from_dict(data)


@pytest.mark.parametrize("data", [None, [], "plan", 3])
def test_something_else_than_a_plan_is_refused(data: object) -> None:
    with pytest.raises(CheckpointError, match="a JSON object"):
        Plan.from_dict(data)


# ------------------------------------------------------------------------------------- hash and diff


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "quarot"},
        {"recipe": "yours"},
        {"architecture": "pixart"},
        {"seed": 1},
        {"nominal_weight_bits": 5},
        {"nominal_activation_bits": 6},
        {"other_parameters": 1001},
        {"float32_parameters": 1},
        {"trajectory": (1.0, 0.0)},
        {"storage_dtype": "float16"},
        {"time_argument": "t"},
        {"calibration_timesteps": "normal"},
        {"folds": (Fold(norm="n", width=8),)},
        {"layers": (*small_plan().layers[:2], small_plan().layers[2].model_copy(update={"reason": "other"}))},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_hash_changes_with_every_field_of_a_plan(fields: dict[str, Any]) -> None:
    assert small_plan(**fields).hash() != small_plan().hash()


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "b"},
        {"role": "ffn.down"},
        {"in_features": 64},
        {"out_features": 25},
        {"bias": False},
        {"weight": weight_format(5)},
        {"weight": weight_format(symmetric=True)},
        {"weight": weight_format(levels="normal", symmetric=True)},
        {"weight": Grid(bits=4, granularity="channel", full=True)},
        {"weight": weight_format(granularity="group", group=16)},
        {"activation": None},
        {"activation": Grid(bits=8, granularity="tensor")},
        {"smooth": Smooth(alpha=0.5)},
        {"smooth": Smooth(alpha=0.5, folded="norm")},
        {"smooth": Smooth(alpha=0.5, salience="spearman")},
        {"rotate": Rotate(block=32)},
        {"rotate": Rotate(block=32, seed=1)},
        {"rotate": Rotate(kind="regular", block=16)},
        {"branch": Branch(rank=8)},
        {"branch": Branch(rank=8, svd=8)},
        {"branch": Branch(rank=8, svd=8, iterations=1)},
        {"clip": "mse"},
        {"timesteps": ((0, 9),)},
        {"timesteps": ((0, 9), (10, 20)), "range_weights": (weight_format(4), weight_format(3))},
        {"steps": (STEP,)},
        {"reason": "because"},
    ],
    ids=str,
)
def test_hash_changes_with_every_field_of_a_layer(fields: dict[str, Any]) -> None:
    base = small_plan(layers=(layer_plan("a"),))
    assert small_plan(layers=(layer_plan(**{"name": "a", **fields}),)).hash() != base.hash()


def test_diff_lists_what_changed_appeared_and_vanished() -> None:
    a = small_plan(layers=(layer_plan("same"), layer_plan("bits"), layer_plan("gone")))
    b = small_plan(layers=(layer_plan("same"), layer_plan("bits", weight=weight_format(8)), layer_plan("new")))
    diff = a.diff(b)
    assert list(diff) == ["bits", "gone", "new"]
    assert "int4" in diff["bits"][0]
    assert "int8 asym/channel" in diff["bits"][1]
    assert diff["gone"][1] == diff["new"][0] == "absent"
    assert a.diff(a) == {}


# -------------------------------------------------------------------------------- bits and memory


def test_average_bits_by_hand() -> None:
    # 64*32 at 4 bits, 32*64 at 3, 32*16 at 16, 1000 others at 16.
    expected = (2048 * 4 + 2048 * 3 + 512 * 16 + 1000 * 16) / (2048 + 2048 + 512 + 1000)
    assert small_plan().average_bits == pytest.approx(expected)
    assert small_plan().average_activation_bits == pytest.approx((2048 * 8 + 2048 * 16 + 512 * 16) / 4608)


def test_memory_by_hand() -> None:
    up = 32 * 64 * 4 // 8 + 32 * (4 + 1) + 32 * 2  # codes, scales and zero points, bias
    down = 64 * 32 * 3 // 8 + 64 * 4  # symmetric, no bias
    head = 2 * (32 * 16 + 16)
    others = 2 * (1000 - 32 - 16)  # biases are counted with their layers
    assert small_plan().memory() == (up + down + head + others, 2 * (4608 + 1000))


def test_parameters_in_float32_have_two_bytes_more() -> None:
    plain, plan = small_plan(), small_plan(float32_parameters=48)  # e.g. the biases of "up" and "head"
    assert plan.memory() == (plain.memory()[0] + 2 * 48, plain.memory()[1])
    assert Plan.from_dict(json.loads(plan.to_json())) == plan
    assert "float32_parameters" not in json.loads(plain.to_json())
    assert plain.hash() == small_plan(float32_parameters=0).hash()
    with pytest.raises(CheckpointError, match="float32_parameters must be at least 0, got -1"):
        Plan.from_dict({**json.loads(plan.to_json()), "float32_parameters": -1})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"weight": weight_format(3)}, 24 * 12 + 24 * 5 + 48),
        ({"weight": weight_format(3), "k": 33, "bias": False}, 24 * 13 + 24 * 5),  # 99 bits take 13 bytes
        ({"weight": weight_format(8, "tensor", symmetric=True)}, 24 * 32 + 4 + 48),
        ({"weight": weight_format(2, "group", group=16)}, 24 * 8 + 24 * 2 * 5 + 48),
        ({"smooth": Smooth(alpha=0.5)}, 24 * 16 + 24 * 5 + 4 * 32 + 48),
        ({"smooth": Smooth(alpha=0.5, folded="v")}, 24 * 16 + 24 * 5 + 48),
        ({"activation": Grid(bits=8, granularity="tensor")}, 24 * 16 + 24 * 5 + 4 + 48),
        ({"timesteps": ((0, 1), (2, 3), (4, 5)), "bias": False}, 3 * (24 * 16 + 24 * 5)),
    ],
    ids=str,
)
def test_stored_bytes_by_hand(fields: dict[str, Any], expected: int) -> None:
    assert layer_plan(**fields).stored_bytes() == expected


def stored_bytes_of_0_1(layer: LayerPlan) -> int:
    """The formula of ditq 0.1, which knew every tensor by itself."""
    if layer.weight is None:
        return 2 * (layer.parameters + (layer.out_features if layer.bias else 0))
    scales = layer.weight.groups(layer.in_features) * (
        1 if layer.weight.granularity == "tensor" else layer.out_features
    )
    n = layer.out_features * ((layer.in_features * layer.weight.bits + 7) // 8)
    n += scales * (4 if layer.weight.symmetric else 5)
    if layer.smooth and layer.smooth.folded is None:
        n += 4 * layer.in_features
    if layer.activation and not layer.activation.dynamic:
        n += 4 * layer.activation.groups(layer.in_features)
    n += 2 * layer.out_features if layer.bias else 0
    return n * (len(layer.timesteps) if layer.timesteps else 1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("granularity", "group"), [("tensor", None), ("channel", None), ("group", 16)])
def test_bytes_follow_from_the_stored_tensors(granularity: str, group: int | None, symmetric: bool) -> None:
    inputs = [
        None,
        token_format(),
        Grid(bits=8, granularity="tensor"),
        Grid(bits=6, granularity="group", group_size=8),
    ]
    balances = [None, Smooth(alpha=0.5), Smooth(alpha=0.5, folded="norm")]
    layers = [
        layer_plan(f"layer{i}", k=k, weight=weight_format(bits, granularity, symmetric, group), activation=activation,
                   smooth=smooth, timesteps=timesteps, bias=bias)
        for i, (bits, k, activation, smooth, timesteps, bias) in enumerate(
            itertools.product(range(2, 9), (32, 48), inputs, balances, (None, ((0, 9), (10, 99))), (True, False))
        )
    ]  # fmt: skip
    for layer in layers:
        assert layer.stored_bytes() == stored_bytes_of_0_1(layer), layer
    folds = (Fold(norm="a.n1", width=32, block="a"), Fold(norm="a.n2", width=32, block="a"), Fold(norm="b.n", width=8))
    plan = small_plan(layers=tuple(layers), folds=folds)
    biases = sum(layer.out_features for layer in layers if layer.bias)
    expected = sum(map(stored_bytes_of_0_1, layers)) + 2 * (plan.other_parameters - biases) + 4 * 6 * 32
    assert plan.memory()[0] == expected
    quantized = sum(tensor.bytes for tensor in plan.tensors().values())
    assert plan.memory()[0] == quantized + 2 * plan.other_parameters + 2 * sum(
        layer.out_features for layer in layers if layer.bias and layer.timesteps
    )


@pytest.mark.parametrize("recipe", ["rtn-static-w8a8", "quarot-w4a4", "smoothquant-w4a8"])
@pytest.mark.parametrize("architecture", ["pixart", "dit"])
def test_memory_is_the_bytes_of_the_saved_file(architecture: str, recipe: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    statistics = tiny_statistics(model, architecture)
    plan = ditq.quantize(model, recipe, statistics=statistics).plan
    model.save_pretrained(tmp_path)
    stored = 0
    with safe_open(tmp_path / "diffusion_pytorch_model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            stored += tensor.numel() * tensor.element_size()
    assert plan.memory()[0] == stored


def test_average_bits_lie_between_nominal_and_16() -> None:
    model = tiny_model("dit")
    plan = ditq.quantize(model, "rtn-w4a8").plan
    assert plan.nominal_weight_bits == 4
    assert 4 < plan.average_bits < 16
    assert len(plan.quantized) + len(plan.kept) == len(plan.layers)
    assert all(layer.reason for layer in plan.kept)


LAYER = {"name": "a", "role": "ffn.up", "in_features": 16, "out_features": 16}
PLAN = {
    "method": "rtn",
    "recipe": "rtn",
    "architecture": "dit",
    "nominal_weight_bits": 8,
    "nominal_activation_bits": 8,
}
GRID = {"bits": 8, "granularity": "channel"}


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"layers": [LAYER] * 10_001}, "layers has 10001 items"),
        ({"layers": [LAYER] * 9_000}, "layers named twice: a"),
        ({"layers": [LAYER], "folds": [{}] * 10**6}, "has 1000000 items"),
        ({"layers": [{**LAYER, "weight": GRID, "timesteps": [[0, 1]] * 10**5}]}, r"layers\.0\.timesteps"),
        (
            {"layers": [{**LAYER, "name": str(i), "weight": GRID, "timesteps": [[0, 1]] * 100} for i in range(501)]},
            "50100 timestep ranges",
        ),
        ({"layers": [{**LAYER, "in_features": 10**30}]}, r"layers\.0\.in_features"),
        ({"layers": [{**LAYER, "out_features": 10**5000}]}, r"layers\.0\.out_features"),
        ({"layers": [], "other_parameters": 10**30}, "other_parameters"),
        ({"layers": [{**LAYER, "weight": GRID, "rotate": {"block": 16, "seed": 2**64}}]}, "seed"),
        ({"layers": [{**LAYER, "weight": GRID, "rotate": {"kind": "regular", "block": 8}}]}, "16, 64 or 256, got 8"),
        ({"layers": [{**LAYER, "weight": GRID, "rotate": {"kind": "regular", "block": 16, "seed": 1}}]}, "must be 0"),
        ({"layers": [{**LAYER, "weight": GRID, "branch": {"rank": 4, "svd": 5}}]}, "at most the rank"),
        ({"layers": [{**LAYER, "weight": GRID, "branch": {"rank": 4, "iterations": 1}}]}, "need svd"),
        ({"layers": [{**LAYER, "weight": GRID, "branch": {"rank": 2**25}}]}, "rank"),
        ({"layers": [{**LAYER, "weight": GRID, "rounding_gain": float("nan")}]}, "rounding_gain"),
        ({"layers": "x" * 10**6}, "layers"),
        ({"layers": [], "format_version": 10**5000}, "format_version"),
        ({"layers": [], "x" * 10**6: 1}, "xxx"),
    ],
    ids=["layers", "twice", "folds", "ranges", "ranges-of-all", "inputs", "outputs", "parameters", "seed",
         "regular-block", "regular-seed", "svd", "iterations", "rank", "nan",
         "text", "version", "field"],
)  # fmt: skip
def test_plans_beyond_the_limits_are_refused(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint) as error:
        Plan.from_dict({**PLAN, **fields})
    assert len(str(error.value)) < 400


def test_binding_survives_the_file_and_sees_every_field() -> None:
    layer = {**LAYER, "weight": GRID, "rotate": {"block": 16, "seed": 3}, "timesteps": [[0, 9]], "rounding_gain": 0.1}
    plan = Plan.from_dict({**PLAN, "layers": [layer]})
    assert Plan.from_dict(json.loads(plan.to_json())).binding() == plan.binding()
    assert Plan.from_dict(plan.model_dump(mode="json", exclude_none=True)).binding() == plan.binding()
    changes: list[dict[str, Any]] = [
        {"rotate": {"block": 8, "seed": 3}},
        {"timesteps": [[0, 8]]},
        {"name": "b"},
        {"clip": "mse"},
    ]
    others = [Plan.from_dict({**PLAN, "layers": [{**layer, **change}]}).binding() for change in changes]
    assert len({plan.binding(), *others}) == 5
