"""Recipes: every bundled one loads, overrides, messages that list the names, formats by role."""

from pathlib import Path

import pytest
import yaml

from ditq import recipe
from ditq.errors import UsageError
from ditq.numerics import Grid
from ditq.recipe import Recipe


@pytest.mark.parametrize("name", recipe.names())
def test_bundled_recipe_loads_and_says_what_its_name_says(name: str) -> None:
    r = recipe.load(name)
    assert r.name == name
    assert r.description
    assert r.method
    weight_bits, activation_bits = name.rpartition("-w")[2].split("a")
    assert r.activations is not None
    assert (r.weights.bits, r.activations.bits) == (int(weight_bits), int(activation_bits))
    static = "static" in name or name.startswith("ptq4d")
    assert r.activations.dynamic == (not static)
    assert r.needs_calibration == (static or name.startswith(("viditq", "smoothquant", "gptq", "qdit", "svdquant")))


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


def test_override_sets_levels_which_uniform_grids_do_not_print() -> None:
    r = recipe.load("quarot-w4a4").override("roles.ffn={weights: {bits: 3, granularity: channel}}")
    r = r.override(["weights.symmetric=true", "weights.levels=normal", "activations.levels=normal"])
    r = r.override("roles.ffn.weights.levels=normal")
    assert r.activations is not None and r.roles["ffn"].weights is not None
    assert r.weights.levels == r.activations.levels == r.roles["ffn"].weights.levels == "normal"
    assert r.override("weights.levels=uniform").weights.levels == "uniform"
    with pytest.raises(UsageError, match="Unknown recipe field 'weights.levelz'"):
        r.override("weights.levelz=normal")


def test_a_single_override_may_be_a_string() -> None:
    r = recipe.load("rtn-w8a8")
    assert r.override("clip=mse") == r.override(["clip=mse"])
    assert r.override([]) == r


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
    assert r.roles["ffn.down"].weights == Grid(bits=6, granularity="channel")


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
    with pytest.raises(UsageError, match="Unknown recipe 'vidiq-w4a8'. Did you mean 'viditq-w4a8'.*rtn-wXaY"):
        recipe.load("vidiq-w4a8")


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
        (
            "weights: {bits: 4, granularity: channel, levels: normal, symmetric: false}\nactivations: null",
            "levels 'normal' are symmetric and have no zero point: symmetric must be true, got false",
        ),
        (
            "weights: {bits: 4, granularity: channel}\nactivations: {bits: 4, granularity: tensor, levels: normal}",
            "activations with levels 'normal' are dynamic: dynamic must be true, got false",
        ),
        (
            "weights: {bits: 4, granularity: channel}\nactivations: {bits: 4, granularity: tensor, full: true}",
            "full is for weights",
        ),
    ],
    ids=[
        "broken",
        "list",
        "empty",
        "missing-field",
        "unknown-field",
        "group-without-size",
        "normal-with-zero-point",
        "normal-static",
        "full-inputs",
    ],
)
def test_wrong_file_names_the_file_and_the_field(text: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=complaint) as error:
        recipe.load(path)
    assert "wrong.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("label", "remedy"),
    [
        ("smoothquant", "smooth: true"),
        ("quarot", "rotate: true"),
        ("ptq4dit", "smooth: true"),
        ("gptq", "rounding: gptq"),
    ],
)
def test_file_of_an_older_version_has_to_say_what_its_method_implied(label: str, remedy: str, tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(f"method: {label}\nweights: {{bits: 8, granularity: channel}}\nactivations: null\n")
    with pytest.raises(UsageError, match=remedy):
        recipe.load(path)


# ------------------------------------------------------------------------------------------ families


@pytest.mark.parametrize("name", sorted(recipe.families()))
@pytest.mark.parametrize("width", ["w2a2", "w3a6", "w5a7", "w4a16", "w8a16"])
def test_a_family_fits_any_width(name: str, width: str) -> None:
    r = recipe.load(f"{name}-{width}")
    weight_bits, activation_bits = map(int, width[1:].split("a"))
    assert (r.name, r.weights.bits) == (f"{name}-{width}", weight_bits)
    assert (16 if r.activations is None else r.activations.bits) == activation_bits


@pytest.mark.parametrize("name", ["viditq-w9a8", "viditq-w1a8", "rtn-w4a9", "rtn-w4a1", "rtn-w16a16", "rtn-w8a0"])
def test_a_width_out_of_range_says_what_is_possible(name: str) -> None:
    with pytest.raises(UsageError, match="2 to 8 bits and activations 2 to 8 or 16"):
        recipe.load(name)


def test_a_family_without_width_says_how_to_spell_one() -> None:
    with pytest.raises(UsageError, match="viditq-wXaY.*viditq-w4a8"):
        recipe.load("viditq")


@pytest.mark.parametrize(("weights", "clip"), [(3, "mse"), (4, "mse"), (5, "minmax"), (8, "minmax")])
def test_fields_of_narrow_weights_count_up_to_4_bits(weights: int, clip: str) -> None:
    assert recipe.load(f"viditq-w{weights}a8").clip == clip


# ------------------------------------------------------------------------------------ nothing is ignored


@pytest.mark.parametrize(
    ("name", "assignment", "remedy"),
    [
        ("rtn-w4a8", "method=gptq", "rounding"),
        ("rtn-w4a8", "balance.block=64", "balance.rotate=true"),
        ("rtn-w4a8", "balance.alpha=0.3", "balance.smooth=true"),
        ("rtn-w4a8", "balance.rotation=regular", "balance.rotate=true"),
        ("rtn-w4a8", "balance.choose=error", "balance.smooth=true or balance.rotate=true"),
        ("rtn-w4a8", "balance.timesteps=[[0, 500]]", "balance.smooth=true"),
        ("quarot-w4a8", "balance.salience=spearman", "balance.smooth=true"),
        ("viditq-w4a8", "gptq.order=activation", "rounding=gptq"),
        ("viditq-w4a8", "calibration.calls=3", "rounding=gptq"),
        ("viditq-w4a16", "balance.timesteps=[[0, 500]]", "activations"),
        ("viditq-w4a8", "fit_groups=true", "groups"),
    ],
)
def test_a_field_without_effect_is_refused(name: str, assignment: str, remedy: str) -> None:
    if "calls" in assignment:
        with pytest.warns(UserWarning, match=f"has no effect.*{remedy}"):
            recipe.load(name).override([assignment])
        return
    with pytest.raises(UsageError, match=f"{assignment.partition('=')[0]} has no effect.*{remedy}"):
        recipe.load(name).override([assignment])


def test_settings_that_give_each_other_an_effect_go_together() -> None:
    r = recipe.load("rtn-w4a8").override(
        ["balance.alpha=0.3", "balance.smooth=true", "gptq.block=64", "rounding=gptq"]
    )
    assert (r.balance.alphas, r.gptq.block) == ((0.3,), 64)


def test_blocks_of_regular_rotations_are_powers_of_4() -> None:
    r = recipe.load("quarot-w4a8").override(["balance.rotation=regular", "balance.block=64"])
    assert (r.balance.rotation, r.balance.block) == ("regular", 64)
    with pytest.raises(UsageError, match="4, 16, 64 or 256 for regular rotations, got 128"):
        r.override("balance.block=128")


def test_a_branch_is_added_changed_and_taken_away() -> None:
    r = recipe.load("rtn-w4a8").override("branch.rank=16")
    assert r.branch == recipe.SideBranch(rank=16, dtype="bfloat16", iterations=0)
    assert not r.needs_calibration
    assert r.override("branch.iterations=5").needs_calibration
    assert r.override("branch=null") == recipe.load("rtn-w4a8")
    published = recipe.load("svdquant-w4a4")
    assert published.branch == recipe.SideBranch(rank=32, iterations=100)
    assert (published.weights.group_size, published.rounding) == (64, "nearest")
    for wrong in ("rank=0", "rank=true", "dtype=int8", "iterations=1001", "ranks=3"):
        with pytest.raises(UsageError, match=wrong.partition("=")[0]):
            r.override(f"branch.{wrong}")


def test_a_file_with_a_field_without_effect_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("weights: {bits: 8, granularity: channel}\nactivations: null\nbalance: {block: 64}\n")
    with pytest.raises(UsageError, match=r"mine\.yaml: balance\.block has no effect"):
        recipe.load(path)


def test_a_file_may_spell_out_defaults_without_effect(tmp_path: Path) -> None:
    path = tmp_path / "printed-by-0.1.yaml"
    data = recipe.load("rtn-w8a8").model_dump(mode="json")
    assert data["gptq"]["order"] == "natural"
    path.write_text(yaml.safe_dump(data | {"method": "rtn"}))
    assert recipe.load(path).weights == recipe.load("rtn-w8a8").weights
    path.write_text(yaml.safe_dump(data | {"gptq": {"order": "activation"}}))
    with pytest.raises(UsageError, match=r"gptq\.order has no effect"):
        recipe.load(path)


@pytest.mark.parametrize("value", ["7", "-0.1", "[]", "[0.5, 2]", "true", "much"])
def test_alpha_out_of_range_says_what_it_takes(value: str) -> None:
    with pytest.raises(UsageError, match="balance.alpha: .*number from 0 to 1, or a list"):
        recipe.load("smoothquant-w8a8").override([f"balance.alpha={value}"])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("weights: &w {bits: 8, granularity: channel}\nactivations: *w\n", "alias"),
        ("weights: 2001-99-99\n", "weights"),
        ("keep_layers: [" + "a, " * 200 + "a]\n", "keep_layers"),
        ("keep_layers: ['(?!a)b']\n", "look-around"),
        ("keep: [" + "k" * 5000 + "]\n", "keep.0"),
        ("name: " + "n" * 5000 + "\n", "name"),
        ("balance: {smooth: true, timesteps: [" + "[1, 2], " * 200 + "[1, 2]]}\n", "balance.timesteps"),
        ("balance: {smooth: true, alpha: [" + "0.5, " * 200 + "0.5]}\n", "balance.alpha"),
        ("calibration: {guidance_scale: .nan}\n", "finite"),
        ("calibration: {arguments: {1: 2}}\n", "arguments"),
        (f"seed: {10**30}\n", "64 bits"),
        ("a: " * 10 + "[" * 5000, "not YAML|levels deep"),
    ],
)
def test_files_beyond_the_limits_are_refused(text: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    rest = "" if text.startswith("weights") else "weights: {bits: 8, granularity: channel}\nactivations: null\n"
    path.write_text(rest + text)
    with pytest.raises(UsageError, match=complaint) as error:
        recipe.load(path)
    assert len(str(error.value)) < 600


def test_recipe_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes("description: é".encode("latin-1"))
    with pytest.raises(UsageError, match="UTF-8"):
        recipe.load(tmp_path / "mine.yaml")


def test_expressions_of_layers_do_not_backtrack() -> None:
    r = recipe.load("rtn-w8a8").override(["keep_layers=['^(a+)+$']"])
    assert r.formats("a" * 200 + ".b", "ffn.up")[0] is not None
