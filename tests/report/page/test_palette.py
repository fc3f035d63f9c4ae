"""The colours of the page can be told from what is behind them."""

from __future__ import annotations

import pytest

from arm_ray.report.page.palette import DARK, GROUNDS, LIGHT, MARKS, WORDS, Theme, contrast


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)
    assert contrast("#123456", "#123456") == 1.0


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("ground", GROUNDS)
def test_words_have_enough_contrast(theme: Theme, ground: str) -> None:
    ratios = {name: contrast(theme[name], theme[ground]) for name in WORDS}
    assert {name: ratio for name, ratio in ratios.items() if ratio < 4.5} == {}


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_marks_have_enough_contrast(theme: Theme) -> None:
    ratios = {name: contrast(theme[name], theme["ground"]) for name in MARKS}
    assert {name: ratio for name, ratio in ratios.items() if ratio < 3.0} == {}


def test_both_themes_have_the_same_colours() -> None:
    assert LIGHT.keys() == DARK.keys()
