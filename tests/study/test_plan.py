"""The cells of a study, what they share, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from arm_ray.config import validate
from arm_ray.errors import ConfigError
from arm_ray.presets import merged
from arm_ray.study.config import StudyConfig
from arm_ray.study.grid import with_dotted
from arm_ray.study.plan import Study

TRAIN: dict[str, Any] = {
    "learning_rate": 1.0e-3,
    "steps": 40,
    "save_steps": 10,
    "data": {"path": "rows.jsonl"},
}


def content(tmp_path: Path, **others: Any) -> dict[str, Any]:
    return {
        "output": str(tmp_path / "out"),
        "base": "/models/base",
        "series": {
            "smooth": {"train": TRAIN},
            "given": {"checkpoints": {10: "/x/10", 20: "/x/20"}},
        },
        "merge": {"calibration": {"path": "c.jsonl"}},
        "axes": {
            "candidates": {"smooth": [[10, 20], [20]], "given": [[10, 20]]},
            "operator": {"ta": {"method.operator": "task_arithmetic"}, "arm": {}},
            "step": {"fixed": {}, "longer": {"method.coefficient": 1.4}},
        },
        "evaluation": {"tasks": [{"name": "held", "type": "loss", "path": "h.jsonl"}]},
        **others,
    }


def study(given: dict[str, Any]) -> Study:
    return Study(validate(StudyConfig, given, source="test"), "test")


def test_every_combination_is_a_cell(tmp_path: Path) -> None:
    found = study(content(tmp_path))
    assert len(found.cells) == (2 + 1) * 2 * 2
    assert found.axes == {
        "series": ["smooth", "given"],
        "candidates": ["10+20", "20"],
        "operator": ["ta", "arm"],
        "step": ["fixed", "longer"],
    }
    assert dict(found.cells[0].labels) == {
        "series": "smooth", "candidates": "10+20", "operator": "ta", "step": "fixed",
    }  # fmt: skip
    merge = found.merge_of(found.cells[1])
    assert merge.config.method.coefficient == 1.4
    assert merge.config.keep_states == "none"
    [run] = [run for run in found.runs if run.series == "smooth"]
    assert merge.config.candidates == [run.checkpoints[10], run.checkpoints[20]]
    assert run.training is not None
    assert run.training.stop_after == 20
    assert sorted(found.models) == ["base", "given-10", "given-20", *sorted(run.models.values())]


def test_what_is_excluded_is_no_cell(tmp_path: Path) -> None:
    exclude = [
        {"operator": "ta", "step": "longer"},
        {"series": "smooth", "candidates": [20]},
        {"series": ["given"], "candidates": ["20", "10+20"], "operator": "arm"},
    ]
    found = study(content(tmp_path, exclude=exclude))
    assert [" ".join(map(str, cell.labels.values())) for cell in found.cells] == [
        "smooth 10+20 ta fixed",
        "smooth 10+20 arm fixed",
        "smooth 10+20 arm longer",
        "given 10+20 ta fixed",
    ]
    with pytest.raises(ConfigError, match="no cell is left"):
        study(content(tmp_path, exclude=[{"step": ["fixed", "longer"]}]))


def test_seeds_train_a_series_each_and_order_the_samples(tmp_path: Path) -> None:
    given = content(tmp_path)
    given["axes"] |= {"seed": [0, 1], "calibration_seed": [3, 4], "series": ["smooth"]}
    found = study(given)
    assert [(run.seed, run.training.seed) for run in found.runs if run.training] == [(0, 0), (1, 1)]
    assert len({run.training.output for run in found.runs if run.training}) == 2
    arm = [c for c in found.cells if c.labels["operator"] == "arm"]
    for cell in arm:
        calibration = found.merge_of(cell).config.calibration
        assert calibration is not None
        assert calibration.seed == cell.labels["calibration_seed"]
    # Task arithmetic reads no samples.
    assert len({found.merge_of(cell).name for cell in arm}) == len(arm) == 16
    assert len(found.merges) == 16 + 8


def test_a_digest_is_of_what_decides_a_result(tmp_path: Path) -> None:
    one = study(content(tmp_path))
    # Elsewhere, with another axis before, other names, and keys that decide nothing.
    given = content(tmp_path / "other")
    given["merge"] |= {"runtime": {"lookahead": 1}}
    given["axes"] = {"more": {"a": {}, "b": {"schedule.tolerance": 0.0}}, **given["axes"]}
    given["series"]["renamed"] = given["series"].pop("smooth")
    given["axes"]["candidates"]["renamed"] = given["axes"]["candidates"].pop("smooth")
    two = study(given)
    assert {m.digest for m in one.merges.values()} < {m.digest for m in two.merges.values()}
    given["merge"]["calibration"]["batch_size"] = 8
    three = study(given)
    arm = {m.digest for m in one.merges.values() if m.config.method.operator == "arm"}
    assert not arm & {m.digest for m in three.merges.values()}


def test_what_is_there_is_found_again_under_another_label(tmp_path: Path) -> None:
    found = study(content(tmp_path))
    merge = found.merge_of(found.cells[0])
    directory = found.output / "cells" / f"old-name-{merge.digest[:8]}"
    directory.mkdir(parents=True)
    again = study(content(tmp_path))
    assert again.merge_of(again.cells[0]).directory == directory


def test_a_series_may_begin_with_a_merge(tmp_path: Path) -> None:
    given = content(tmp_path)
    start = {"series": "smooth", "candidates": "10+20", "operator": "arm", "step": "fixed"}
    given["series"] = {
        "next": {"train": TRAIN, "start_from": start},
        "smooth": {"train": TRAIN},
    }
    given["axes"]["candidates"] = [[10, 20]]
    given["axes"]["seed"] = [0, 1]
    found = study(given)
    assert [(run.series, run.seed, run.level) for run in found.runs] == [
        ("smooth", 0, 0), ("smooth", 1, 0), ("next", 0, 1), ("next", 1, 1),
    ]  # fmt: skip
    for run in found.runs[2:]:
        assert run.start is not None
        merge = found.merges[run.start]
        assert (merge.run.seed, run.base, run.root) == (
            run.seed, str(merge.model), "/models/base",
        )  # fmt: skip
        assert run.training is not None
        assert run.training.model == run.base
    assert len(found.starts) == 2


def test_a_series_may_take_over_the_moments_of_the_optimizer(tmp_path: Path) -> None:
    given = content(tmp_path)
    start = {"series": "smooth", "candidates": "10+20", "operator": "arm", "step": "fixed"}
    given["series"] = {
        "smooth": {"train": {**TRAIN, "save_optimizer": True}},
        "fresh": {"train": TRAIN, "start_from": start},
        "kept": {"train": TRAIN, "start_from": start, "moments": "kept"},
    }
    given["axes"]["candidates"] = [[10, 20]]
    smooth, fresh, kept = study(given).runs
    assert fresh.training is not None
    assert fresh.training.optimizer_from is None
    assert kept.training is not None
    assert str(kept.training.optimizer_from) == smooth.checkpoints[20]
    assert kept.training.output != fresh.training.output


def test_given_checkpoints_have_a_place_for_the_seed(tmp_path: Path) -> None:
    given = content(tmp_path)
    given["series"] = {"given": {"checkpoints": {10: "/x-{seed}/10"}}}
    given["axes"] |= {"seed": [0, 7], "candidates": [[10]]}
    assert [run.checkpoints[10] for run in study(given).runs] == ["/x-0/10", "/x-7/10"]


def test_a_series_may_be_checkpoints_of_other_series(tmp_path: Path) -> None:
    given = content(tmp_path)
    parts = {1: {"series": "smooth", "step": 20}, 2: {"series": "given", "step": 10}}
    given["series"] = {"both": {"checkpoints": parts}} | given["series"]
    given["series"]["given"] = {"checkpoints": {10: "/x-{seed}/10"}}
    given["axes"] |= {"seed": [0, 7]}
    given["axes"]["candidates"] = {"smooth": [[10, 20]], "given": [[10]], "both": [[1, 2], [2]]}
    found = study(given)
    runs = {(run.series, run.seed): run for run in found.runs}
    for seed in (0, 7):
        smooth, both = runs["smooth", seed], runs["both", seed]
        assert both.checkpoints == {1: smooth.checkpoints[20], 2: f"/x-{seed}/10"}
        # One model, which is scored once.
        assert both.models[1] == smooth.models[20]
        assert both.level == 0
        cells = [c for c in found.cells if c.series == "both" and c.seed == seed]
        assert found.run_of(cells[0]) == both
        assert found.merge_of(cells[0]).config.candidates == [*both.checkpoints.values()]
        # The merge of the second one alone is also one of the series that it is from.
        shared = found.merge_of(cells[-1])
        assert {c.series for c in shared.cells} == {"given", "both"}
        assert (shared.run, found.run_of(cells[-1])) == (runs["given", seed], both)
    assert len(found.models) == 1 + 2 * (2 + 1)


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        ({"axes": {"sead": [1]}}, ["axes.sead: got [1]", "did you mean 'seed'?"]),
        ({"axes": {"series": ["smoth"]}}, ["no series 'smoth'", "did you mean 'smooth'?"]),
        ({"axes": {"seed": [0, 0]}}, ["axes.seed: got [0, 0]; expected a list of different"]),
        ({"axes": {"candidates": [10]}}, ["expected lists of steps"]),
        ({"axes": {"candidates": {"smooth": [[10]]}}}, ["none for the series 'given'"]),
        ({"axes": {"mean": {"a": {}}}}, ["axes.mean: results have a column of this name"]),
        ({"axes": {"base": {"a": {"base": "x"}}}}, ["axes.base: results have a column"]),
        ({"axes": {"other": {"a": {"base": "x"}}}}, ["axes.other.a.base: is set by the study"]),
        ({"axes": {"candidates": [[10, 15]]}}, ["series.smooth: has no checkpoint of step 15",
                                                "series.given: has no checkpoint of step 15"]),
        ({"merge": {"output": "x"}}, ["merge.output: is set by the study"]),
        ({"exclude": [{"oprator": "ta"}]}, ["exclude.0: there is no axis 'oprator'",
                                            "did you mean 'operator'?"]),
        ({"exclude": [{"operator": "tu"}]}, ["exclude.0.operator: there is no 'tu'", "'ta'"]),
        ({"checkpoints": {"smoth": [10]}}, ["checkpoints: there is no series 'smoth'"]),
        ({"checkpoints": [30]}, ["series.given: has no checkpoint of step 30"]),
        # What merge() itself would refuse.
        ({"axes": {"operator": {"slerp": {"method.operator": "slerp"}}}},
         ["cell (series smooth, candidates 10+20, operator slerp, step longer; ",
          "operator 'slerp' has no coefficient; remove it"]),
        ({"axes": {"step": {"x": {"method.operator": "slerp"}}, "candidates": [[10, 20]]},
          "merge": {"method": {"coefficient": 1.2}}}, ["and 1 more: "]),
        ({"axes": {"step": {"x": {"method.coeficient": 1.0}}}},
         ["method.coeficient: unknown key; did you mean 'coefficient'?"]),
        ({"tables": {"t": {"rows": ["oprator"]}}}, ["tables.t: there is no axis 'oprator'"]),
        ({"tables": {"t": {"rows": ["operator"], "columns": "series"}}},
         ["tables.t: does not say what becomes of the axis 'candidates'", "'step'"]),
        ({"tables": {"t": {"rows": ["operator"], "task": "hold"}}},
         ["tables.t.task: there is no 'hold'", "'held'"]),
        ({"tables": {"t": {"rows": ["operator"], "value": "men"}}}, ["did you mean 'mean'?"]),
        ({"tables": {"t": {"rows": ["step"], "against": {"operator": "tu"}}}},
         ["tables.t.against.operator: there is no 'tu'"]),
        ({"figures": {"a/b": {"x": "step"}}}, ["figures.a/b: expected a name"]),
        ({"series": {"given": {"train": TRAIN}}}, ["series.given: give exactly one of train"]),
        ({"series": {"smooth": {"start_from": {"series": "smooth", "operator": "arm"}}}},
         ["need each other, by start_from or checkpoints"]),
        ({"series": {"smooth": {"start_from": {"series": "given"}}}},
         ["series.smooth.start_from: names 4 different merges"]),
        ({"series": {"given": {"checkpoints": {10: {"series": "smoth", "step": 10}}}}},
         ["series.given.checkpoints: there is no series 'smoth'", "'smooth'"]),
        ({"series": {"given": {"checkpoints": {10: {"series": "smooth", "step": 40}}}}},
         ["series.given.checkpoints.10: no merge of smooth uses step 40", "take one of 10, 20"]),
        ({"exclude": [{"series": "smooth"}],
          "series": {"given": {"checkpoints": {10: {"series": "smooth", "step": 10}, 20: "/x"}}}},
         ["series.given.checkpoints.10: smooth has no cell that is not excluded"]),
        ({"series": {"given": {"base": "/y",
                               "checkpoints": {20: {"series": "smooth", "step": 20}}}}},
         ["series.given.checkpoints.20: smooth begins with /models/base, and given with /y"]),
        ({"series": {"smooth": {"moments": "kept"}}}, ["series.smooth.moments: kept is for"]),
        ({"series": {"smooth": {"train": {"save_optimizer": False}},
                     "given": {"checkpoints": None, "train": TRAIN, "moments": "kept",
                               "start_from": {"series": "smooth", "candidates": "20",
                                              "operator": "ta", "step": "fixed"}}}},
         ["series.given.train: moments: kept needs the optimizer of smooth's"]),
        ({"series": {"smooth": {"train": {**TRAIN, "save_total_limit": 1}}}},
         ["series.smooth.train: save_total_limit"]),
        ({"series": {"smooth": {"train": {**TRAIN, "output": "x"}}}},
         ["series.smooth.train.output: is set by the study"]),
        ({"axes": {"seed": [0, 1]}}, ["series.given.checkpoints: are the same for all"]),
        ({"base": None}, ["series.given.base: required", "series.smooth.base: required"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(
    tmp_path: Path, change: dict[str, Any], texts: list[str]
) -> None:
    given = merged(content(tmp_path), change)
    if "candidates" in change.get("axes", {}):
        given["axes"]["candidates"] = change["axes"]["candidates"]
    with pytest.raises(ConfigError) as caught:
        study(given)
    for text in texts:
        assert text in str(caught.value)
    assert "nothing was started" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    given = content(tmp_path, exclude=[{"a": "b"}, {"operator": "c"}])
    given["axes"]["seed"] = [-1]
    with pytest.raises(ConfigError, match="the study has 3 problems"):
        study(given)


def test_dotted_keys_are_set_below_each_other() -> None:
    before = {"method": {"operator": "arm", "coefficient": 0.7}}
    assert with_dotted(before, {"method.coefficient": 1.0, "a.b": {"c": 2}}) == {
        "method": {"operator": "arm", "coefficient": 1.0},
        "a": {"b": {"c": 2}},
    }
    assert before["method"]["coefficient"] == 0.7
