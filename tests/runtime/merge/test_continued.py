"""Merges that start from the state of an earlier merge."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from arm_ray.checkpoints import states
from arm_ray.config import MergeConfig
from arm_ray.errors import ConfigError, MismatchError
from arm_ray.runtime.inputs import open_inputs
from arm_ray.runtime.merge.run import merge
from tests.builders.checkpoints import assert_same_bits, load_all
from tests.builders.merge_case import MergeCase
from tests.builders.models import save, tiny_model

pytestmark = pytest.mark.usefixtures("shards_in_process")

ARM = ("schedule.anchor_iterations=2", "schedule.max_iterations=2")
DARE = (*ARM, "method.operator=dare", "method.dare.drop_rate=0.5")


def run(config: MergeConfig) -> Path:
    return merge(config, console=Console(quiet=True)).run


@pytest.mark.parametrize("overrides", [ARM, DARE])
def test_two_merges_of_one_iteration_are_one_of_two(
    case: MergeCase, overrides: tuple[str, ...]
) -> None:
    case.make()
    expected = run(case.config(*overrides, output="whole"))
    state: Path | None = None
    for t in range(2):
        one = [
            *overrides,
            "schedule.anchor_iterations=1",
            "schedule.max_iterations=1",
            f"schedule.offset={t}",
        ]
        if state is not None:
            one += ["schedule.initial=given", f"initial_state={state}"]
        made = run(case.config(*one, output=f"part-{t}"))
        state = states.state_directory(made, 1)
    assert_same_bits(load_all(expected / "model"), load_all(made / "model"))
    # The cosines are against the base, not against where the part began.
    whole, part = states.finished_states(expected)[2], states.finished_states(made)[1]
    assert part.task_vector_cosine == pytest.approx(whole.task_vector_cosine, rel=1e-9)
    assert part.weight_cosine == pytest.approx(whole.weight_cosine, rel=1e-9)


def test_an_initial_state_and_the_schedule_need_each_other(case: MergeCase) -> None:
    case.make()
    with pytest.raises(ConfigError, match="one needs the other"):
        case.config("schedule.initial=given")
    with pytest.raises(ConfigError, match="one needs the other"):
        case.config(f"initial_state={case.root / 'base'}")
    with pytest.raises(ConfigError, match="needs anchored iterations"):
        case.config(
            "schedule.initial=given",
            f"initial_state={case.root / 'base'}",
            "schedule.anchor_iterations=0",
        )


def test_an_initial_state_of_another_model_is_refused(case: MergeCase) -> None:
    case.make()
    other = save(tiny_model("smollm2", seed=3, num_layers=2), case.root / "other")
    config = case.config("schedule.initial=given", f"initial_state={other}")
    with pytest.raises(MismatchError, match="initial"):
        open_inputs(config)
