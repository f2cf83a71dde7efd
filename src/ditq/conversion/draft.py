"""Draft plans: the recipe's formats for every linear of a model, before anything is measured or changed."""

from __future__ import annotations

from pydantic import ValidationError
from torch import nn

from ditq import architectures, patterns
from ditq.architectures import Architecture, Linear
from ditq.conversion.storage import count_float32
from ditq.errors import NothingQuantizedError, UsageError
from ditq.numerics import Grid
from ditq.plan import MIN_GROUP_SIZE, Branch, LayerPlan, Plan, first_error
from ditq.recipe import Recipe, SideBranch


def draft(model: nn.Module, architecture: Architecture, recipe: Recipe) -> list[LayerPlan]:
    """The recipe's formats for every linear of the model, by role; nothing balanced yet.

    Raises:
        UsageError: a format does not fit a layer, or the recipe names roles or layers that the model does not have.
        NothingQuantizedError: the recipe keeps every layer in 16 bit.
    """
    _check_targets(architecture.linears(model), recipe)
    quantizable = {linear.name for group in architecture.groups(model) for linear in group.linears}
    layers = []
    for linear in architecture.linears(model):
        weight, activation, reason = recipe.formats(linear.name, linear.role)
        weight, activation = (_fitted(fmt, linear, recipe.fit_groups) for fmt in (weight, activation))
        rounding = recipe.rounding if weight else "nearest"
        if weight is not None and linear.name not in quantizable:
            # This linear is outside of the stacks, so its input is not calibrated. The input is quantized only if the
            # recipe has a dynamic format for this role; otherwise only the weight is quantized.
            kept = activation if activation and activation.dynamic and recipe.own(linear.role) else None
            missing = ["quantize its input"] if activation and not kept else []
            missing += ["round by GPTQ"] if rounding == "gptq" else []
            reason = f"outside of the blocks: not calibrated, cannot {' or '.join(missing)}" if missing else reason
            activation, rounding = kept, "nearest"
        try:
            layer = LayerPlan(
                name=linear.name, role=linear.role, in_features=linear.module.in_features,
                out_features=linear.module.out_features, bias=linear.module.bias is not None,
                weight=weight, activation=activation, clip=recipe.clip if weight else "minmax",
                rounding=rounding, gptq=recipe.gptq if rounding == "gptq" else None,
                branch=_branch(recipe.branch, linear) if weight else None,
                timesteps=recipe.balance.timesteps if weight and activation else None, reason=reason,
            )  # fmt: skip
        except ValidationError as error:
            raise UsageError(f"Recipe {recipe.name!r} cannot be carried out: {first_error(error)}.") from error
        layers.append(layer)
    if not any(layer.weight for layer in layers):
        raise NothingQuantizedError(f"Recipe {recipe.name!r} keeps all {len(layers)} linear layers in 16 bit.")
    return layers


def _branch(rules: SideBranch | None, linear: Linear) -> Branch | None:
    """The recipe's branch, of a rank that the layer can have."""
    if rules is None:
        return None
    rank = min(rules.rank, linear.module.in_features, linear.module.out_features)
    return Branch(rank=rank, dtype=rules.dtype, svd=rank, iterations=rules.iterations)


def _fitted(fmt: Grid | None, linear: Linear, fit: bool) -> Grid | None:
    """The format with a group size that divides the layer's inputs: the recipe's, or the largest divisor below it.

    Raises:
        UsageError: it does not divide them, and there is no divisor below it or the recipe does not allow one.
    """
    if fmt is None or fmt.group_size is None:
        return fmt
    columns, size = linear.module.in_features, fmt.group_size
    smaller = [g for g in range(size, MIN_GROUP_SIZE - 1, -1) if columns % g == 0]
    if smaller and (fit or smaller[0] == size):
        return fmt.model_copy(update={"group_size": smaller[0]})
    try:
        fmt.groups(columns)
    except ValueError as error:
        hint = "" if fit else " To let ditq choose one, set fit_groups: true (--set fit_groups=true)."
        raise UsageError(f"Layer {linear.name!r}: {error}{hint}") from error
    return fmt


def _check_targets(linears: list[Linear], recipe: Recipe) -> None:
    """Refuses roles that no architecture has, and patterns of names that match no layer.

    A role that only this model does not have is allowed: one recipe serves models with and without cross-attention.
    """
    model_roles = {linear.role for linear in linears}
    known = model_roles | architectures.roles()
    for field, prefixes in (("keep", recipe.keep), ("roles", tuple(recipe.roles))):
        for prefix in prefixes:
            if not any(role == prefix or role.startswith(f"{prefix}.") for role in known):
                raise UsageError(
                    f"{field} of the recipe: unknown role {prefix!r}. This model has {', '.join(sorted(model_roles))}."
                )
    for field, expressions in (("keep_layers", recipe.keep_layers), ("layers", tuple(recipe.layers))):
        for pattern in expressions:
            if not any(patterns.search(pattern, linear.name) for linear in linears):
                raise UsageError(
                    f"{field}: no layer matches {pattern!r}; names look like {linears[0].name!r} and "
                    f"{linears[-1].name!r}."
                )


def estimate(model: nn.Module, architecture: Architecture, recipe: Recipe) -> Plan:
    """The plan of a recipe without its balance: roles, bits and memory. The model may be on the meta device.

    Raises:
        UsageError: a linear has no role, or the recipe's group size does not fit a layer.
        NothingQuantizedError: the recipe keeps every layer in 16 bit.
    """
    layers = draft(model, architecture, recipe)
    total = sum(p.numel() for p in model.parameters())
    return Plan(
        method=recipe.method, recipe=recipe.name, architecture=architecture.name,
        nominal_weight_bits=recipe.weights.bits,
        nominal_activation_bits=recipe.activations.bits if recipe.activations else 16,
        layers=tuple(layers), other_parameters=total - sum(layer.parameters for layer in layers),
        calibration_timesteps=recipe.calibration.timesteps,
        float32_parameters=count_float32(model, {layer.name: layer for layer in layers}),
    )  # fmt: skip
