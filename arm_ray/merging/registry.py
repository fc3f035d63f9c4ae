"""The merge operators by name: those of this package, and those that other packages bring.

Another package announces an operator as an entry point:

    [project.entry-points."arm_ray.operators"]
    my_operator = "my_package.merging:OPERATOR"
"""

from __future__ import annotations

from importlib.metadata import entry_points

from arm_ray.errors import ConfigError
from arm_ray.merging import (
    alpharl_prediction,
    average,
    lore,
    model_stock,
    nearswap,
    opcm,
    ota,
    ram,
    relex,
    sce,
    slerp,
    task_arithmetic,
    ties,
    twin,
)
from arm_ray.merging.operator import Operator

ENTRY_POINTS = "arm_ray.operators"
OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        task_arithmetic.OPERATOR,
        ties.OPERATOR,
        slerp.OPERATOR,
        slerp.SPHERICAL_MEAN,
        average.OPERATOR,
        opcm.OPERATOR,
        lore.OPERATOR,
        twin.OPERATOR,
        ota.OPERATOR,
        alpharl_prediction.OPERATOR,
        sce.OPERATOR,
        model_stock.OPERATOR,
        nearswap.OPERATOR,
        ram.OPERATOR,
        relex.OPERATOR,
    )
}


def find_operator(name: str) -> Operator:
    """The operator that merges task vectors under this name.

    Raises:
        ConfigError: No package has it, or what its entry point names is no operator.
    """
    if name in OPERATORS:
        return OPERATORS[name]
    for entry in entry_points(group=ENTRY_POINTS):
        if entry.name == name:
            try:
                found = entry.load()
            except Exception as error:  # whatever the other package does when it is imported
                raise _unusable(name, entry.value, f"{type(error).__name__}: {error}") from None
            if not isinstance(found, Operator):
                raise _unusable(name, entry.value, type(found).__name__)
            return found
    raise ConfigError(f"no operator is called {name!r}", where="method.operator")


def _unusable(name: str, value: str, got: str) -> ConfigError:
    return ConfigError(
        f"the operator {name!r} of another package cannot be used",
        where=f"entry point {value}",
        got=got,
        expected="an arm_ray.merging.operator.Operator",
        hint="see docs/adding-an-operator.md",
    )
