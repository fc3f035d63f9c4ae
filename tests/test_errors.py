"""What errors say of what they are about, also after a journey between processes."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from arm_ray.errors import ArmRayError, CorruptCheckpointError, MismatchError, about
from arm_ray.runtime.inputs import open_inputs
from tests.builders.merge_case import MergeCase
from tests.builders.models import save, tiny_model
from tests.builders.shards import DirectShard


def test_all_of_an_error_survives_pickling() -> None:
    error = MismatchError("a", where="b", got=1, expected=2, hint="c", subject="candidate-1")
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is MismatchError
    assert vars(found) == vars(error)
    assert str(found) == str(error)


def test_the_innermost_subject_counts() -> None:
    with pytest.raises(ArmRayError) as caught, about("base"), about("candidate-2"):
        raise ArmRayError("x")
    assert caught.value.subject == "candidate-2"
    assert caught.value.of("candidate-1").subject == "candidate-1"
    assert caught.value.of("moments of candidate-1", "candidate-1").subject == "candidate-1"
    with pytest.raises(KeyError), about("base"):
        raise KeyError("not ours")


def truncated(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def of_another_shape(path: Path) -> None:
    save(tiny_model("smollm2", seed=9, num_layers=1), path)


@pytest.mark.parametrize("spoil", [truncated, of_another_shape])
@pytest.mark.parametrize("label", ["base", "candidate-1", "candidate-2"])
def test_a_checkpoint_that_cannot_be_merged_is_the_subject(
    case: MergeCase, spoil: Callable[[Path], None], label: str
) -> None:
    case.make("smollm2")
    config = case.config()
    number = int(label.rpartition("-")[2]) if label != "base" else 0
    spoil(Path([config.base, *config.candidates][number]))
    with pytest.raises(ArmRayError) as caught:
        open_inputs(config)
    # Where the base is the odd one, it is the first candidate that does not fit it.
    odd_base = label == "base" and spoil is of_another_shape
    assert caught.value.subject == ("candidate-1" if odd_base else label)


def test_a_candidate_with_nan_is_the_subject(case: MergeCase) -> None:
    case.make("smollm2")
    config = case.config()
    model = tiny_model("smollm2", seed=9)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    save(model, Path(config.candidates[1]))
    with pytest.raises(CorruptCheckpointError) as caught:
        DirectShard(config).shard.on("files", "check_weights")
    assert caught.value.subject == "candidate-2"
