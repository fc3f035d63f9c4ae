"""The arithmetic of the benchmarks; none of them is timed here."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

import benchmarks.gpu.__main__ as gpu
from benchmarks import common, layer14b, linear, memory, random_models
from benchmarks.gpu import rotation
from benchmarks.gpu.rates import Rates


def test_steps_apart_counts_numbers_between():
    one = torch.tensor([1.0, -1.0, 0.0, 0.0, 3.0], dtype=torch.bfloat16)
    following = torch.tensor([1.0 + 2**-7, -1.0 - 2**-7, -0.0, 0.0, 3.0], dtype=torch.bfloat16)
    assert linear.steps_apart(one, following).tolist() == [1, 1, 0, 0, 0]
    tiny = torch.tensor([1, -32767], dtype=torch.int16).view(torch.bfloat16)
    # The smallest positive and the smallest negative number have zero between them.
    assert linear.steps_apart(tiny[:1], tiny[1:]).tolist() == [2]


def test_compare_models(tmp_path: Path):
    a = {"x": torch.tensor([1.0, 2.0, 1e-6]).bfloat16(), "y": torch.zeros(5).bfloat16()}
    b = {**a, "x": torch.tensor([1.0, 2.0 + 2**-6, 1.1e-6]).bfloat16()}
    for name, tensors in (("a", a), ("b", b)):
        (tmp_path / name).mkdir()
        save_file({k: t + (k == "y") for k, t in tensors.items()}, tmp_path / name / FILE)
    found = linear.compare(tmp_path / "a", tmp_path / "b")
    assert found["steps"] == 1
    assert found["equal"] == 6 / 8
    assert found["relative"] == pytest.approx(2**-6 / (2 + 2**-6))


FILE = "model.safetensors"


def test_cases_say_the_same_to_both_programs():
    for case in linear.CASES:
        theirs = linear.mergekit_config(case)
        ours = linear.arm_ray_config(case, Path("out"))
        assert len(theirs["models"]) == len(ours.candidates) == 2
        assert ours.schedule.max_iterations == 1
        assert json.loads(json.dumps(theirs)) == theirs
    weight = linear.CASES[0].model_parameters["weight"]
    assert ours.method.coefficient / len(ours.candidates) == weight
    base, one, two = torch.randn(3, 7)
    merged = linear.CASES[0].formula(base, [one, two])
    torch.testing.assert_close(merged, 0.3 * base + 0.35 * (one + two))


def test_goals_of_a_linear_merge():
    rows = [
        {"case": "c", "program": "mergekit 1.0", "median, s": 2.0, "peak RSS, MB": 1000},
        {"case": "c", "program": "arm_ray", "median, s": 1.0, "peak RSS, MB": 600},
    ]
    found = linear.goals(linear.CASES[0], rows, {"steps": 1.0, "equal": 0.5, "relative": 0.0})
    assert [reached for _, reached in found] == [True, False, True]


def test_memory_of_a_process_is_read():
    text = "Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t  12 kB\nThreads:\t3\n"
    assert memory.parse_kilobytes(text, {"VmHWM": "peak", "VmRSS": "rss"}) == {
        "peak": 2 << 20,
        "rss": 12 << 10,
    }
    assert memory.parse_io("rchar: 5\nread_bytes: 7\n") == {"rchar": 5, "read_bytes": 7}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_watch_of_this_process():
    watch = memory.MemoryWatch(os.getpid(), interval=0.001, with_pss=True)
    while "pss" not in watch.peaks:
        pass
    peaks = watch.stop()
    assert 0 < peaks["anonymous"] <= peaks["peak_rss"]


def test_files_hold_all_tensors_in_order():
    sizes = {"a": 3, "b": 3, "c": 9, "d": 1}
    parts = list(random_models.file_parts(sizes, 6))
    assert parts == [("a", "b"), ("c",), ("d",)]
    assert list(random_models.file_parts({}, 6)) == []


def test_how_a_child_ended():
    assert memory.explain(0, "", {}) == "complete"
    refused = memory.explain(1, "DefaultCPUAllocator: can't allocate memory", {"open": 1.0})
    assert refused == "memory refused, after 'open'"
    assert "exit code -9" in memory.explain(-9, "", {})


def test_work_of_a_layer_and_its_projection(capsys):
    shapes = {"norm": (4,), "q": (4, 4), "down": (4, 8)}
    work = layer14b.layer_work(shapes, samples=2, tokens=3, states=3, hidden=4)
    parameters = 4 * 4 + 4 * 8
    assert work.forward_flops == 3 * (2 * parameters * 6 + 4 * 3 * 3 * 4 * 2)
    assert work.activation_flops == 3 * 2 * parameters * 2
    assert work.product_flops == 2 * 4 * parameters * 2
    assert work.written_bytes == 4 * (parameters + 4)
    gpus = layer14b.Accelerators(count=2, bf16=100.0, forward=0.5)
    seconds = layer14b.projection(layer14b.times(work, 10), 0, 3, gpus)
    assert seconds["forward"] == pytest.approx(10 * work.forward_flops / 100)
    assert "forward" in capsys.readouterr().out


def test_a_tiny_layer_is_merged_as_the_operator_does(tmp_path: Path):
    layout = layer14b.make_layout(layer14b.QUICK_SHAPE)
    seconds, num_bytes = layer14b.measure(layout, tokens=4, rounds=1, folder=tmp_path)
    stages = {"forward", "capture", "activations", "factorisation", "products", "similarity"}
    assert stages <= set(seconds)
    assert num_bytes == (tmp_path / "group.safetensors").stat().st_size


def test_benchmarks_take_what_the_demo_leaves():
    demo = yaml.safe_load(common.DEMO.read_text(encoding="utf-8"))
    steps = [int(path.rsplit("-", 1)[1]) for path in common.demo_candidates()]
    assert len(steps) == 2
    assert set(steps) < set(demo["train"]["save_steps"])


def test_the_gpu_benchmark_holds_a_rotation_to_float64():
    rates = Rates(*[1e12] * 7)
    row = rotation._measure(torch.device("cpu"), rates, 96, 40)
    assert row["relative error"] < 1e-6
    assert row["diagonal not negative"]
    assert row["same bits twice"]
    assert gpu.rotation_goals([row, {**row, "same bits twice": False}])[2][1] is False


def test_goals_of_merges_on_a_gpu():
    row = {
        "merge": "m",
        "same bits twice": True,
        "iterations, s": 11.0,
        "planned, s": 10.0,
        "GPU peak, GB": 3.0,
        "planned, GB": 2.0,
    }
    assert [reached for _, reached in gpu.merge_goals([row])] == [True, True, False]
