"""Writing behind the computation, as for a GPU: what is written, its errors, its bound."""

from __future__ import annotations

import threading

import pytest
import torch

from arm_ray.runtime.shards.pieces import WriteBehind
from tests.builders.checkpoints import assert_same_bits
from tests.builders.merge_case import MergeCase
from tests.builders.shards import DirectShard
from tests.waiting import wait_for

# As a GPU's pieces are written; that these are on the CPU makes no difference.
GPU = torch.device("cuda")


def test_what_is_written_is_the_piece_as_it_was() -> None:
    behind, found = WriteBehind(GPU), {}

    def write(name: str, first_row: int, rows: torch.Tensor) -> None:
        found[name, first_row] = rows.clone()

    writes = []
    piece = torch.zeros(3)
    for number in range(20):
        piece.fill_(number)
        writes += behind.write(write, "x", number, piece)
    for each in writes:
        each.result()
    assert len(found) == len(writes) == 20
    assert all(bool((rows == row).all()) for (_, row), rows in found.items())


def test_no_more_wait_than_there_is_room_for() -> None:
    behind, gate, begun = WriteBehind(GPU), threading.Event(), []

    def write(_name: str, first_row: int, _rows: torch.Tensor) -> None:
        begun.append(first_row)
        gate.wait()

    submitted: list[int] = []

    def submit() -> None:
        for number in range(6):
            behind.write(write, "x", number, torch.zeros(1))
            submitted.append(number)

    thread = threading.Thread(target=submit)
    thread.start()
    wait_for(lambda: len(begun) == 4, "four writers at work")
    # The fifth waits for room, without a copy of its own.
    assert submitted == [0, 1, 2, 3]
    gate.set()
    thread.join()
    wait_for(lambda: len(begun) == 6, "all are written")


def test_an_error_is_told_and_leaves_room() -> None:
    behind = WriteBehind(GPU)

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    for _ in range(12):
        [write] = behind.write(full, "x", 0, torch.zeros(1))
        with pytest.raises(OSError, match="No space"):
            write.result()


def test_a_cpu_writes_at_once() -> None:
    found = []
    assert WriteBehind(torch.device("cpu")).write(lambda *a: found.append(a), "x", 0, GIVEN) == []
    assert found == [("x", 0, GIVEN)]


GIVEN = torch.zeros(1)


@pytest.mark.parametrize("forward", [True, False])
def test_a_shard_that_writes_behind_gives_the_same_state(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch, forward: bool
) -> None:
    case.make()
    overrides = () if forward else ("method.operator=task_arithmetic",)
    made = []
    for name in ("at-once", "behind"):
        shard = DirectShard(case.config(*overrides, output=name))
        made.append(shard.with_forward(1) if forward else shard.linear(1))
        monkeypatch.setattr(
            "arm_ray.runtime.shards.layer_shard.WriteBehind", lambda _device: WriteBehind(GPU)
        )
    assert_same_bits(*made)
