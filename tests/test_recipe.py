"""Recipes: every bundled one loads, overrides, messages that list the names, formats by role."""

from pathlib import Path

import pytest

from ditq import methods, recipe
from ditq.errors import UsageError
from ditq.plan import TensorFormat
from ditq.recipe import Recipe


@pytest.mark.parametrize("name", recipe.names())
def test_bundled_recipe_loads_and_says_what_its_name_says(name: str) -> None:
    r = recipe.load(name)
    assert r.name == name
    assert r.description
    assert methods.get(r.method).name == r.method
    weight_bits, activation_bits = name.rpartition("-w")[2].split("a")
    assert r.activations is not None
    assert (r.weights.bits, r.activations.bits) == (int(weight_bits), int(activation_bits))
    static = "static" in name or name.startswith("ptq4d")
    assert r.activations.dynamic == (not static)
    assert r.needs_calibration == (static or name.startswith(("viditq", "smoothquant", "gptq", "qdit")))


def test_recipe_survives_its_own_json() -> None:
    r = recipe.load("viditq-w4a8")
    assert Recipe.model_validate(r.model_dump(mode="json")) == r


def test_recipe_object_is_taken_as_it_is() -> None:
    r = recipe.load("rtn-w8a8")
    assert recipe.load(r) is r


def test_recipe_file_is_named_by_its_stem(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("method: rtn\nweights: {bits: 5, granularity: channel}\nactivations: null\n")
    r = recipe.load(path)
    assert (r.name, r.weights.bits, r.activations, r.needs_calibration) == ("mine", 5, None, False)


# -------------------------------------------------------------------------------------------- roles


@pytest.mark.parametrize("role", ["embedder", "final", "modulation", "embedder.time"])
def test_sensitive_roles_stay_in_16_bit_as_in_the_paper(role: str) -> None:
    weights, activations, reason = recipe.load("viditq-w4a8").formats("x", role)
    assert weights is None
    assert activations is None
    assert "16 bit" in reason


def test_keep_is_no_prefix_of_letters() -> None:
    assert recipe.load("rtn-w8a8").formats("x", "finalist")[0] is not None


def test_most_specific_role_wins() -> None:
    r = recipe.load("rtn-w4a8").override(
        [
            "roles.ffn={weights: {bits: 6, granularity: channel}, activations: null}",
            "roles.ffn.down.weights=null",
        ]
    )
    up, down, q = (r.formats("x", role) for role in ("ffn.up", "ffn.down", "self_attn.q"))
    assert up[0] is not None and up[0].bits == 6 and up[1] is None
    assert down[0] is None and down[1] is None and "ffn.down" in down[2]
    assert q[0] is not None and q[0].bits == 4 and q[1] is not None and q[1].bits == 8


def test_keep_layers_takes_regular_expressions() -> None:
    r = recipe.load("rtn-w4a8").override([r"keep_layers=['blocks\.0\.']"])
    assert r.formats("blocks.0.up", "ffn.up")[0] is None
    assert r.formats("blocks.10.up", "ffn.up")[0] is not None


# ---------------------------------------------------------------------------------------- overrides


def test_override_reaches_dotted_keys() -> None:
    r = recipe.load("viditq-w4a8").override(
        ["weights.bits=3", "balance.alpha=0.25", "calibration.steps = 4", "keep=[final]", "activations=null"]
    )
    assert r.weights.bits == 3
    assert r.balance.alphas == (0.25,)
    assert r.calibration.steps == 4
    assert r.keep == ("final",)
    assert r.activations is None


def test_override_leaves_the_original_alone() -> None:
    r = recipe.load("rtn-w8a8")
    r.override(["weights.bits=2"])
    assert r.weights.bits == 8


def test_override_builds_a_format_from_nothing() -> None:
    weight_only = recipe.load("rtn-w8a8").override(["activations=null"])
    r = weight_only.override(["activations.bits=6", "activations.granularity=token", "activations.dynamic=true"])
    assert r.activations is not None
    assert r.activations.bits == 6


@pytest.mark.parametrize(
    ("assignment", "complaint"),
    [
        ("weights.bits", "key=value"),
        ("weights.bitz=3", "Unknown recipe field 'weights.bitz'.*Did you mean 'weights.bits'.*calibration.steps"),
        ("wieghts.bits=3", "Unknown recipe field 'wieghts.bits'.*method"),
        ("weights.bits=9", "weights.bits.*9"),
        ("weights.bits=four", "weights.bits.*four"),
        ("balance.choose=often", "balance.choose"),
        ("clip=wide", "clip"),
        ("calibration.timesteps=some", "calibration.timesteps"),
        ("version=2", "version"),
    ],
)
def test_wrong_override_names_the_field(assignment: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        recipe.load("rtn-w8a8").override([assignment])


def test_override_takes_dotted_role_names() -> None:
    r = recipe.load("rtn-w4a8").override(
        ["roles.ffn.down.weights.bits=6", "roles.ffn.down.weights.granularity=channel"]
    )
    assert r.roles["ffn.down"].weights == TensorFormat(bits=6, granularity="channel")


@pytest.mark.parametrize("assignment", ["method.name=rtn", "weights.bits.low=3", "name.x=1"])
def test_override_below_a_plain_value_is_a_usage_error(assignment: str) -> None:
    with pytest.raises(UsageError, match="recipe"):
        recipe.load("rtn-w8a8").override([assignment])


@pytest.mark.parametrize("assignment", ["weights.bits=[", "keep_layers=['(']"])
def test_override_with_broken_value_is_a_usage_error(assignment: str) -> None:
    with pytest.raises(UsageError):
        recipe.load("rtn-w8a8").override([assignment]).formats("x", "ffn.up")


# --------------------------------------------------------------------------------------------- files


def test_unknown_recipe_lists_the_known_and_suggests() -> None:
    with pytest.raises(UsageError, match="Unknown recipe 'viditq-w4a9'. Did you mean 'viditq-w4a[48]'.*rtn-w8a8"):
        recipe.load("viditq-w4a9")


def test_missing_file_is_named() -> None:
    with pytest.raises(UsageError, match=r"no recipe file nowhere\.yaml"):
        recipe.load("nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("method: [", "not YAML"),
        ("- rtn", "mapping"),
        ("", "mapping"),
        ("method: rtn\nactivations: null", "weights"),
        ("method: rtn\nweights: {bits: 4, granularity: channel}\nactivations: null\nwieghts: 3", "wieghts"),
        ("method: rtn\nweights: {bits: 4, granularity: group}\nactivations: null", "group_size"),
    ],
    ids=["broken", "list", "empty", "missing-field", "unknown-field", "group-without-size"],
)
def test_wrong_file_names_the_file_and_the_field(text: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=complaint) as error:
        recipe.load(path)
    assert "wrong.yaml" in str(error.value)


def test_unknown_method_lists_the_known() -> None:
    with pytest.raises(UsageError, match="Unknown method 'awq'.*quarot, rtn, smoothquant, viditq"):
        methods.get("awq")
