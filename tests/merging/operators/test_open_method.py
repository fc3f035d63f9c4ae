"""What is refused before a merge starts, so that no iteration of it can fail."""

from __future__ import annotations

from typing import Any

import pytest

from arm_ray.config import ScheduleConfig
from arm_ray.errors import ConfigError
from arm_ray.merging.method import Method, open_method
from arm_ray.merging.operator_settings import (
    AcmSettings,
    AimSettings,
    AlphaRLPredictionSettings,
    AverageSettings,
    DareSettings,
    OtaSettings,
    RelexSettings,
    SphericalMeanSettings,
)
from arm_ray.merging.registry import OPERATORS
from arm_ray.merging.settings import MethodSettings
from arm_ray.schedule import merge_sizes

WITHOUT = {
    *("slerp", "spherical_mean", "average", "opcm", "ota", "alpharl_prediction"),
    *("sce", "model_stock", "nearswap", "ram", "relex"),
}
TWO = {
    "ota": {"ota": OtaSettings(("a", "b"))},
    "alpharl_prediction": {"alpharl_prediction": AlphaRLPredictionSettings((0.1, 0.2), 0.3)},
    "relex": {"relex": RelexSettings(target=30.0)},
}


def open_on(schedule: ScheduleConfig, candidates: int, operator: str, **sections: Any) -> Method:
    sizes = merge_sizes(schedule, candidates)
    settings = MethodSettings(operator, **sections)
    return open_method(settings, *sizes, has_window=schedule.has_window)


def problems(schedule: ScheduleConfig, candidates: int, operator: str, **sections: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        open_on(schedule, candidates, operator, **sections)
    return caught.value.what


ANCHORED = ScheduleConfig(anchor_iterations=3, max_iterations=3)
FROM_LAST = ScheduleConfig(anchor_iterations=3, max_iterations=3, initial="last_candidate")
HYBRID = ScheduleConfig()
WIDE = ScheduleConfig(window_size=3)


def test_operators_say_whether_they_have_a_coefficient() -> None:
    assert {name for name, o in OPERATORS.items() if not o.uses_coefficient} == WITHOUT
    assert {name for name, o in OPERATORS.items() if o.candidates_only} == {*TWO, "nearswap"}


@pytest.mark.parametrize("operator", sorted(WITHOUT))
def test_a_coefficient_that_nothing_reads_is_refused(operator: str) -> None:
    count = 1 if operator == "nearswap" else 2
    found = problems(ANCHORED, count, operator, coefficient=1.0, **TWO.get(operator, {}))
    assert found.splitlines()[1:] == [
        f"  - method.coefficient: is set to 1.0, but operator {operator!r} has no coefficient;"
        " remove it"
    ]
    open_on(ANCHORED, count, operator, coefficient=0.7, **TWO.get(operator, {}))


@pytest.mark.parametrize("operator", sorted(set(OPERATORS) - WITHOUT | {"arm", "dare", "aim"}))
def test_a_coefficient_that_is_read_is_not(operator: str) -> None:
    assert open_on(HYBRID, 2, operator, coefficient=1.0).settings.coefficient == 1.0


@pytest.mark.parametrize(
    ("operator", "sections"),
    [
        ("dare", {"dare": DareSettings(then="average")}),
        ("aim", {"aim": AimSettings(on="average")}),
        ("aim", {"aim": AimSettings(on="dare"), "dare": DareSettings(then="average")}),
    ],
)
def test_the_operator_at_the_end_decides(operator: str, sections: dict[str, Any]) -> None:
    found = problems(HYBRID, 2, operator, coefficient=0.5, **sections)
    assert "operator 'average' has no coefficient" in found


@pytest.mark.parametrize("on", ["task_arithmetic", "ties"])
def test_acm_finds_its_coefficients_itself(on: Any) -> None:
    found = problems(HYBRID, 2, "acm", coefficient=0.5, acm=AcmSettings(on=on))
    assert "operator 'acm' finds a coefficient for each layer itself" in found
    assert open_on(HYBRID, 2, "acm", acm=AcmSettings(on=on)).settings.coefficient == 1.0


def test_slerp_takes_two_in_every_iteration() -> None:
    open_on(HYBRID, 2, "slerp")
    assert "exactly 2 models, got 3" in problems(HYBRID, 3, "slerp")
    assert "exactly 2 models, got 3" in problems(WIDE, 2, "slerp")
    assert "exactly 2 models, got 1" in problems(FROM_LAST, 2, "slerp")
    window = ScheduleConfig(anchor_iterations=0)
    open_on(window, 5, "slerp")


@pytest.mark.parametrize(
    ("operator", "sections"),
    [
        ("average", {"average": AverageSettings("weighted", weights=(1.0, 2.0))}),
        ("spherical_mean", {"spherical_mean": SphericalMeanSettings(weights=(1.0, 2.0))}),
    ],
)
def test_weights_are_for_every_iteration(operator: str, sections: dict[str, Any]) -> None:
    open_on(HYBRID, 2, operator, **sections)
    assert "expected one for each of 3 models" in problems(HYBRID, 3, operator, **sections)
    assert "expected one for each of 3 models" in problems(WIDE, 2, operator, **sections)
    assert "expected one for each of 1 models" in problems(FROM_LAST, 2, operator, **sections)


def test_weights_of_the_last_fit_where_there_are_enough() -> None:
    open_on(HYBRID, 5, "average", average=AverageSettings("weighted", 2, weights=(1.0, 2.0)))


def test_a_window_has_neither_accuracies_nor_second_moments() -> None:
    for operator, sections in TWO.items():
        open_on(ANCHORED, 2, operator, **sections)
        found = problems(HYBRID, 2, operator, **sections)
        assert f"schedule: operator {operator!r} needs something of every model" in found


def test_starting_from_the_last_candidate_accuracies_do_not_fit_and_moments_do() -> None:
    found = problems(FROM_LAST, 2, "alpharl_prediction", **TWO["alpharl_prediction"])
    assert "accuracies: got 2, expected one for each of the 1 states" in found
    open_on(FROM_LAST, 2, "ota", **TWO["ota"])


def test_the_numbers_of_models_are_named_and_problems_are_listed_once() -> None:
    settings = MethodSettings("average", 1.0, average=AverageSettings(decay=0.5))
    with pytest.raises(ConfigError) as caught:
        open_method(settings, 2, 3, has_window=True)
    assert len(caught.value.what.splitlines()) == 3
    assert "merge 2 and 3 models" in (caught.value.hint or "")
    with pytest.raises(ConfigError) as caught:
        open_method(settings, 2)
    assert caught.value.hint is None
