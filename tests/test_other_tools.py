"""Keys of other merging tools are answered with ours."""

from __future__ import annotations

import re

import pytest

from arm_ray.config import other_tools, parse_merge_config
from arm_ray.config_keys import all_keys
from arm_ray.errors import ConfigError

CONTENT = {"base": "a", "candidates": ["b"], "output": "c"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"method": {"name": "task_arithmetic"}}, "method.name: unknown key; here it is `method.o"),
        ({"merge_method": "ties"}, "merge_method: unknown key; here it is `method.operator`"),
        ({"base_model": "a"}, "here it is `base`"),
        ({"models": [{"model": "b"}]}, "here it is `candidates`"),
        ({"dtype": "bfloat16"}, "here it is `precision.storage_dtype`"),
        ({"method": {"lambda": 0.5}}, "here it is `method.coefficient`"),
        ({"method": {"weight": 0.5}}, "here it is `method.coefficient` for all"),
        ({"method": {"density": 0.5}}, "`method.ties.keep`"),
        ({"method": {"ties": {"density": 0.5}}}, "here it is `method.ties.keep`;"),
        ({"method": {"dare": {"density": 0.5}}}, "1 - density is `method.dare.drop_rate`"),
        ({"method": {"t": 0.5}}, "`method.slerp.t`"),
        ({"method": {"operater": "ties"}}, "did you mean 'operator'?"),
        ({"schedule": {"t": 3}}, "schedule.t: unknown key; known here"),
    ],
)
def test_the_answer(content: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_merge_config({**CONTENT, **content})
    assert words in str(caught.value)


def test_what_is_answered_is_a_key() -> None:
    known = {key.name for key in all_keys()}
    sections = {key.rpartition(".")[0] for key in known}
    told = {
        other_tools.translated(parents, name, is_merge=True)
        for name in other_tools.KEYS
        for parents in ([], ["method"], *(["method", s] for s in ("ties", "dare", "della",
                        "breadcrumbs", "sce", "average")))
    } - {""}  # fmt: skip
    named = {name for text in told for name in re.findall(r"`([a-z_.]+)`", text)}
    assert len(named) > 10
    assert named - known - sections == set()
