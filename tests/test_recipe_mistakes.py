"""Every field of a recipe with values of wrong types and ranges: one sentence with the field and the value."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ditq.errors import UsageError
from ditq.recipe import Recipe, load

ODD: dict[str, Any] = {
    "string": "nonsense", "negative": -7, "huge": 10**30, "fraction": 0.123, "infinite": float("inf"),
    "nan": float("nan"), "true": True, "null": None, "list": [], "nested": [[[1]]], "mapping": {"a": 1},
    "strings": ["x", 3], "pairs": [[500, 0]],
}  # fmt: skip
FOREIGN = re.compile(r"Value error|Input should|valid (string|integer|number|boolean)|pydantic|Traceback|constrained")


def fields(data: dict[str, Any], prefix: str = "") -> list[str]:
    return [
        name
        for key, value in data.items()
        for name in (prefix + key, *(fields(value, f"{prefix}{key}.") if isinstance(value, dict) else ()))
    ]


# All fields have an effect in this recipe.
BASE = load("viditq-w4a8").override(["rounding=gptq", "weights={bits: 4, granularity: group, group_size: 64}"])
FIELDS = fields(BASE.model_dump(mode="json"))


@pytest.mark.parametrize("field", FIELDS)
def test_a_wrong_value_is_one_sentence(field: str) -> None:
    refused = 0
    for value in ODD.values():
        try:
            BASE.override([f"{field}={yaml.safe_dump(value, default_flow_style=True).strip().removesuffix('...')}"])
        except UsageError as error:
            refused += 1
            text = str(error)
            assert not FOREIGN.search(text), text
            assert "\n" not in text
            # "weights.bits", or its parent where a rule joins several fields of a format
            assert field in text or field.rpartition(".")[0] in text, text
    assert refused > 0 or field == "calibration.arguments"


@pytest.mark.parametrize(
    ("recipe", "assignment", "parts"),
    [
        ("rtn-static-w8a8", "activations.symmetric=false", ["activations", "false", "true"]),
        ("rtn-w8a8", "activations.dynamic=false", ["activations", "token", "tensor"]),
        ("rtn-w8a8", "activations.granularity=channel", ["activations", "channel", "token"]),
        ("rtn-w8a8", "weights.granularity=token", ["weights", "token", "channel"]),
        ("rtn-w8a8", "weights.dynamic=true", ["weights", "dynamic", "false"]),
        ("rtn-w8a8", "roles.ffn={weights: {bits: 8, granularity: token}}", ["roles.ffn.weights", "token", "channel"]),
        ("viditq-w8a8", "balance.timesteps=[[500,0]]", ["balance.timesteps", "[500, 0]", "[0, 500]"]),
        ("viditq-w8a8", "balance.alpha=7", ["balance.alpha", "7", "0 to 1"]),
        ("viditq-w8a8", "balance.alpha=[]", ["balance.alpha", "[]", "0 to 1"]),
        ("viditq-w8a8", "balance.block=7", ["balance.block", "7", "64"]),
        ("viditq-w8a8", "calibration.batch_size=many", ["calibration.batch_size", "many", "integer", "'auto'"]),
        ("viditq-w8a8", "calibration.steps=true", ["calibration.steps", "True"]),
        ("viditq-w8a8", "weights.bits=9", ["weights.bits", "9", "at most 8"]),
        ("viditq-w8a8", "balance.fold=maybe", ["balance.fold", "maybe", "true or false"]),
        ("viditq-w8a8", "calibration.guidance_scale=.nan", ["calibration.guidance_scale", "nan", "finite"]),
    ],
)
def test_the_sentence_names_field_value_and_what_is_allowed(recipe: str, assignment: str, parts: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        load(recipe).override([assignment])
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert not FOREIGN.search(str(error.value))


def test_a_recipe_file_is_named_in_the_sentence(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("weights: {bits: eight, granularity: channel}\nactivations: null\n")
    with pytest.raises(UsageError, match=r"mine\.yaml is not valid: weights\.bits must be an integer, got 'eight'"):
        load(path)


def test_the_formats_of_every_family_stay_valid() -> None:
    assert Recipe.model_validate(BASE.model_dump(mode="json")) == BASE
