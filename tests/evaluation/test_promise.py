"""Losses of models on the same samples, and the model that they choose."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from arm_ray.evaluation.losses import SampleLosses
from arm_ray.evaluation.selection import Contender, checkpoint_title, keep_promise
from arm_ray.evaluation.statistics import Comparison, joined, samples_to_tell


def test_losses_are_means_over_tokens() -> None:
    columns = np.array([[3.0, 2.0], [0.0, 0.0], [5.0, 8.0]])
    losses = SampleLosses.of(columns)
    assert len(losses) == 2  # a sample without a token that counts is none
    assert losses.mean == pytest.approx(0.8)
    assert SampleLosses.of(np.array([[math.nan, 2.0]])).mean == math.inf
    assert SampleLosses.of(np.zeros((0, 2))).mean == math.inf


def test_lower_is_what_is_so_beyond_the_error() -> None:
    random = np.random.default_rng(0)
    tokens = np.full(50, 10.0)
    base = SampleLosses(random.normal(10.0, 3.0, 50), tokens)
    lower = SampleLosses(base.sums - 0.3 + random.normal(0.0, 0.1, 50), tokens)
    alike = SampleLosses(base.sums + random.normal(0.0, 1.0, 50), tokens)
    broken = SampleLosses(np.full(50, np.nan), tokens)
    assert lower.is_lower_than(base)
    assert not base.is_lower_than(lower)
    assert not alike.is_lower_than(base)
    assert not base.is_lower_than(alike)
    assert base.is_lower_than(broken)
    assert not broken.is_lower_than(base)


def test_so_many_samples_would_tell_two_models_apart() -> None:
    assert samples_to_tell(Comparison(-0.1, -0.3, 0.1, 0.3, 50)) == 200
    assert samples_to_tell(Comparison(0.0, -0.3, 0.3, 1.0, 50)) is None
    assert samples_to_tell(Comparison(math.nan, math.nan, math.nan, math.nan, 5)) is None


def test_differences_over_tasks_are_joined() -> None:
    one, other = Comparison(0.2, 0.1, 0.3, 0.01, 10), Comparison(0.4, 0.0, 0.8, 0.05, 30)
    found = joined([one, other])
    half = math.hypot(0.1, 0.4) / 2.0
    assert (found.difference, found.num_problems) == (pytest.approx(0.3), 40)
    assert (found.low, found.high) == (pytest.approx(0.3 - half), pytest.approx(0.3 + half))
    assert found.p_value == pytest.approx(2.0 * stats.norm.sf(0.3 / (half / 1.96)))
    assert joined([one]) is one
    still = Comparison(0.0, 0.0, 0.0, 1.0, 3)
    assert joined([still, still]).p_value == 1.0


STATE, CHECKPOINT = Contender("state-0001", "state-0001", 0.4), Contender("candidate-2", "c", 0.5)


def test_a_state_is_published_only_beyond_the_error() -> None:
    sure = Comparison(-0.1, -0.15, -0.05, 0.001, 100)
    better = keep_promise(STATE, CHECKPOINT, sure, higher_is_better=False, what="loss")
    assert (better.name, better.iteration) == ("state-0001", 1)
    assert "better than c, the best checkpoint (loss 0.4000 against 0.5000" in better.verdict
    unsure = Comparison(-0.01, -0.05, 0.03, 0.6, 100)
    kept = keep_promise(STATE, CHECKPOINT, unsure, higher_is_better=False, what="loss")
    assert (kept.name, kept.iteration) == ("candidate-2", None)
    assert "no merge beat c" in kept.verdict
    assert "about 1600 samples would tell the two apart" in kept.verdict
    # Where more is better, the same numbers are worse.
    assert keep_promise(STATE, CHECKPOINT, sure, higher_is_better=True, what="x").iteration is None
    worse = keep_promise(
        STATE, CHECKPOINT, Comparison(0.1, 0.05, 0.15, 0.001, 100), higher_is_better=False, what="l"
    )
    assert worse.name == "candidate-2"
    assert "would tell" not in worse.verdict


def test_checkpoints_have_the_names_of_their_directories() -> None:
    candidates = ["/runs/x/checkpoint-10", "s3://bucket/y/checkpoint-20/"]
    assert checkpoint_title("base", candidates) == "the base"
    assert checkpoint_title("candidate-2", candidates) == "checkpoint-20"
