"""Operators on tensors and state dicts in memory, without Ray, files or configurations.

    merged = merge_state_dicts(base, [one, two], "ties", coefficient=1.0, ties={"keep": 0.3})

One call is one anchored iteration (Eq. 4): the models are merged into the base. `arm_ray.merge`
does whole schedules, on checkpoints that do not fit into memory, and runs the forward passes that
some operators need.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from torch import Tensor

from arm_ray.errors import ConfigError, MismatchError
from arm_ray.merging.limits import out_of_range
from arm_ray.merging.method import Method, open_method
from arm_ray.merging.operator import TensorInputs
from arm_ray.merging.settings import MethodSettings

StateDict = Mapping[str, Tensor]
_EMBEDDINGS = ("embed", "wte", "wpe", "lm_head")


def method_settings(operator: str = "task_arithmetic", **settings: Any) -> MethodSettings:
    """The settings of a method, checked as the section `method` of a configuration is.

    Args:
        operator: `method.operator`: see docs/operators.md.
        settings: Its other keys: numbers and texts, and for the section of an operator a mapping or
            its class: `coefficient=1.0, ties={"keep": 0.3}`.

    Raises:
        ConfigError: There is no such key, or a value is out of its range.
    """
    made: MethodSettings = _made(MethodSettings, {"operator": operator, **settings}, "method")
    return made


def merge_tensors(
    reference: Tensor,
    models: Sequence[Tensor],
    operator: str | MethodSettings = "task_arithmetic",
    *,
    shifts: Sequence[Tensor] = (),
    name: str = "weight",
    **settings: Any,
) -> Tensor:
    """Merge one tensor of several models into a reference.

    Args:
        reference: `W_ref`, any shape, floating point.
        models: The `W_i`, of its shape.
        operator: Name of an operator, or the settings of a method.
        shifts: `ΔA_i = A_i − A_ref` `[d_out, N]` of each model, for `arm`: what its linear module
            puts out on N samples, less what the reference's does.
        name: Of the tensor; operators that draw at random draw by it.
        settings: As of `method_settings`.

    Returns:
        `W_new`, float32, of the reference's shape.

    Raises:
        ConfigError: The settings are wrong, or need what is not given.
        MismatchError: The tensors differ in shape.
    """
    given = {} if not shifts else {name: shifts}
    states = [{name: model} for model in models]
    merged = merge_state_dicts(
        {name: reference.float()}, states, operator, shifts=given, linear=set(given), **settings
    )
    return merged[name]


def merge_state_dicts(
    base: StateDict,
    models: Sequence[StateDict],
    operator: str | MethodSettings = "task_arithmetic",
    *,
    shifts: Mapping[str, Sequence[Tensor]] | None = None,
    linear: Collection[str] | None = None,
    **settings: Any,
) -> dict[str, Tensor]:
    """Merge the state dicts of models into that of their base.

    Thresholds and norms over whole models are taken over all tensors that are given. Tensors that
    are not of floating point are the base's.

    Args:
        base: Name -> tensor.
        models: The same names and shapes.
        operator: Name of an operator, or the settings of a method.
        shifts: Name of a linear module's weight -> of each model, `ΔA_i` `[d_out, N]`; see
            `merge_tensors`. Weights that it does not name are not rotated.
        linear: The weights of linear modules of the layers; None: matrices that have a number in
            their name and are no embedding. Only low-rank edits and rotations ask.
        settings: As of `method_settings`.

    Returns:
        Name -> tensor of the base's dtype, computed in float32. None of them is one of the inputs.

    Raises:
        ConfigError: The settings are wrong, or need what is not given.
        MismatchError: The models differ in names or shapes.
    """
    method = _method(operator, settings, len(models), has_shifts=bool(shifts))
    _check_same(base, models)
    shifts = shifts or {}
    _check_shifts(base, len(models), shifts)
    floating = [name for name, tensor in base.items() if tensor.is_floating_point()]

    def inputs_of(name: str, known: Mapping[str, object]) -> TensorInputs:
        return TensorInputs(
            name=name,
            reference=base[name].float(),
            contributors=[model[name].float() for model in models],
            divisor=len(models),
            shifts=[shift.float() for shift in shifts.get(name, ())],
            is_linear=_is_linear(name, base[name]) if linear is None else name in linear,
            contributor_names=tuple(f"candidate-{i + 1}" for i in range(len(models))),
            statistics=known,
        )

    known: Mapping[str, object] = {}
    for number in range(method.rounds(len(models))):
        found = [method.measure(number, inputs_of(name, known)) for name in floating]
        total = {key: sum((sums[key] for sums in found[1:]), found[0][key]) for key in found[0]}
        known = method.conclude(number, total, known)
    merged = {}
    for name, tensor in base.items():
        if tensor.is_floating_point():
            merged[name] = method.merge(inputs_of(name, known)).tensor.to(tensor.dtype)
        else:
            merged[name] = tensor.clone()
    return merged


def _method(
    operator: str | MethodSettings, settings: Mapping[str, Any], models: int, *, has_shifts: bool
) -> Method:
    if isinstance(operator, MethodSettings):
        chosen = replace(operator, **settings)
    else:
        chosen = method_settings(operator, **settings)
    if models == 0:
        raise ConfigError("there are no models to merge", where="models", expected="at least one")
    method = open_method(chosen, models)
    needs = {"aim", "acm"} & set(chosen.steps)
    if method.operator.activations or method.operator.second_moments:
        needs.add(method.operator.name)
    if needs:
        raise ConfigError(
            "the method needs more than the weights",
            where="operator",
            got=" and ".join(sorted(needs)),
            expected="an operator of weights, or arm with shifts",
            hint="arm_ray.merge runs the forward passes that it needs",
        )
    if chosen.rotates and not has_shifts:
        raise ConfigError(
            "the method rotates by activations, and none are given",
            where="shifts",
            got=f"operator {chosen.operator!r}",
            expected="shifts: for the weight of each linear module, ΔA [d_out, N] of each model",
            hint="arm_ray.merge takes them from calibration samples; task_arithmetic needs none",
        )
    return method


def _check_same(base: StateDict, models: Sequence[StateDict]) -> None:
    for number, model in enumerate(models, start=1):
        if base.keys() != model.keys():
            differing = sorted(base.keys() ^ model.keys())
            raise MismatchError(
                "a model does not have the tensors of the base",
                where=f"models, number {number}",
                got=f"{len(differing)} that only one of them has: {', '.join(differing[:4])}",
                expected=f"the {len(base)} names of the base",
            )
        for name, tensor in base.items():
            if tensor.shape != model[name].shape:
                raise MismatchError(
                    "a tensor has another shape than the base's",
                    where=f"models, number {number}: {name}",
                    got=tuple(model[name].shape),
                    expected=tuple(tensor.shape),
                )


def _check_shifts(base: StateDict, models: int, shifts: Mapping[str, Sequence[Tensor]]) -> None:
    for name, given in shifts.items():
        shape = None if name not in base else tuple(base[name].shape)
        if shape is None or len(shape) != 2:
            raise MismatchError(
                "shifts are given for what is no matrix of the base", where=name, got=shape
            )
        found = [tuple(shift.shape) for shift in given]
        if len(found) != models or any(len(s) != 2 or s[0] != shape[0] for s in found):
            raise MismatchError(
                "the shifts of a weight do not fit it",
                where=name,
                got=found,
                expected=f"for each of {models} models one of shape ({shape[0]}, samples)",
            )


def _is_linear(name: str, tensor: Tensor) -> bool:
    is_numbered = any(part.isdigit() for part in name.split("."))
    return tensor.ndim == 2 and is_numbered and not any(part in name for part in _EMBEDDINGS)


def _made(kind: type[Any], given: Mapping[str, Any], where: str) -> Any:
    """A dataclass of settings from a mapping, with sections from mappings."""
    known = {entry.name: entry for entry in fields(kind)}
    if unknown := [name for name in given if name not in known]:
        raise ConfigError(
            "there is no such setting",
            where=f"{where}.{unknown[0]}",
            expected=", ".join(known),
        )
    hints = get_type_hints(kind, include_extras=True)
    values = {}
    for name, value in given.items():
        place, hint = f"{where}.{name}", hints[name]
        factory = known[name].default_factory
        section = type(factory()) if factory is not MISSING else None
        if section is not None and is_dataclass(section) and isinstance(value, Mapping):
            value = _made(section, value, place)
        _check(place, value, hint)
        values[name] = value
    return kind(**values)


def _check(place: str, value: Any, hint: Any) -> None:
    """Refuse a number out of its range and a word that is none of the choices."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        wrong = out_of_range(hint, value)
        if wrong:
            raise ConfigError(
                "a setting is out of its range", where=place, got=value, expected=wrong
            )
    if get_origin(hint) is Literal and value not in get_args(hint):
        raise ConfigError(
            "a setting has no such value",
            where=place,
            got=repr(value),
            expected=" or ".join(map(repr, get_args(hint))),
        )
    expected = getattr(hint, "__origin__", None) if hasattr(hint, "__metadata__") else hint
    if expected is float and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ConfigError(
            "a setting is no number", where=place, got=repr(value), expected="a number"
        )
