"""Putting a merged model on the hub: what arrives there, and what is refused before that."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi
from rich.console import Console

from arm_ray.checkpoints.naming import hub_id
from arm_ray.errors import ConfigError, NotACheckpointError, StorageAccessError, StorageError
from arm_ray.events import read_events
from arm_ray.exports import hub as module
from arm_ray.exports.hub import check_target, model_directory, push
from arm_ray.runtime.merge import run as merging
from arm_ray.runtime.merge.run import merge
from tests.builders.hub import TOKEN, FakeHub, fake_hub
from tests.builders.merge_case import MergeCase

_QUICK = ("method.operator=task_arithmetic", "calibration=null", "schedule.max_iterations=2")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr(merging, "is_up_or_named", lambda _address: False)
    with fake_hub() as found:
        monkeypatch.setattr(
            module, "_client", lambda api: api or HfApi(endpoint=found.url, token=TOKEN)
        )
        yield found


@pytest.fixture
def model(case: MergeCase, hub: FakeHub) -> Path:
    case.make()
    outcome = merge(case.config(*_QUICK), console=Console(quiet=True))
    assert outcome.model is not None
    return outcome.model


def test_all_of_a_model_arrives_in_one_commit(model: Path, hub: FakeHub) -> None:
    (model / ".cache").mkdir()
    (model / ".cache" / "unfinished").write_bytes(b"x")
    url = push(model, "someone/merged", base_models=["org/base"], message="first")
    assert url == f"{hub.url}/someone/merged"
    assert hub.commits == {"someone/merged": ["first"]}
    assert hub.private == {"someone/merged": True}
    sent = hub.repos["someone/merged"]
    expected = {p.relative_to(model).as_posix() for p in model.rglob("*") if p.is_file()}
    assert sent.keys() == expected - {".cache/unfinished"}
    for name, content in sent.items():
        if name != "README.md":
            assert content == (model / name).read_bytes()
    front, _, rest = sent["README.md"].decode().removeprefix("---\n").partition("---\n")
    assert yaml.safe_load(front)["base_model"] == ["org/base"]
    assert rest == (model / "README.md").read_text().split("---\n", 2)[2]


def test_a_directory_of_the_same_name_is_no_obstacle(
    model: Path, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is named is a repository, whatever lies here."""
    (tmp_path / "someone" / "merged").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    push(model, "someone/merged", base_models=["someone/merged"])
    assert "config.json" in hub.repos["someone/merged"]


def test_a_run_is_pushed_by_its_model(model: Path, hub: FakeHub) -> None:
    push(model.parent, "someone/merged", private=False)
    assert "config.json" in hub.repos["someone/merged"]
    assert hub.private == {"someone/merged": False}


def test_a_name_that_is_taken_is_refused_unless_it_may_be_updated(
    model: Path, hub: FakeHub
) -> None:
    push(model, "someone/merged")
    with pytest.raises(StorageError, match="of that name already"):
        push(model, "someone/merged")
    push(model, "someone/merged", update=True)
    assert len(hub.commits["someone/merged"]) == 2


def test_a_push_without_a_token_is_refused(
    model: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(StorageAccessError, match="there is no token"):
        push(model, "someone/merged", api=HfApi(endpoint=hub.url))
    assert hub.repos == {}


def test_a_token_that_the_hub_does_not_take_is_told_without_it(model: Path, hub: FakeHub) -> None:
    wrong = "hf_" + "b" * 34
    with pytest.raises(StorageAccessError, match="does not take the token") as caught:
        push(model, "someone/merged", api=HfApi(endpoint=hub.url, token=wrong))
    assert wrong not in str(caught.value)


def test_a_hub_that_does_not_answer_is_told() -> None:
    with pytest.raises(StorageError, match="cannot be reached"):
        check_target("a/b", update=False, api=HfApi(endpoint="http://127.0.0.1:9", token=TOKEN))


def test_an_upload_that_fails_says_how_to_go_on(model: Path, hub: FakeHub) -> None:
    hub.fails = True
    with pytest.raises(StorageError, match="upload to the hub failed") as caught:
        push(model, "someone/merged")
    assert "--update" in str(caught.value)
    assert hub.repos["someone/merged"] == {}


@pytest.mark.parametrize("name", ["merged", "a/b/c", "/runs/model", "s3://bucket/x", "a/..", "-/b"])
def test_what_is_no_name_of_a_repository_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="no name of a repository"):
        check_target(name, update=False)


def test_a_model_that_is_not_whole_is_not_pushed(model: Path, hub: FakeHub) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(NotACheckpointError):
        push(model, "someone/merged")
    with pytest.raises(NotACheckpointError, match="no such model directory"):
        model_directory(model / "not-there")
    assert hub.repos == {}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("/cache/hub/models--Qwen--Qwen3-8B/snapshots/abc", "Qwen/Qwen3-8B"),
        ("hf:Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("runs/sft/checkpoint-40", None),
        ("./runs/x", None),
        ("s3://bucket/model", None),
    ],
)
def test_ids_of_the_hub_are_told_from_paths(given: str, expected: str | None) -> None:
    assert hub_id(given) == expected


def test_a_directory_is_no_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_id("runs/base") == "runs/base"
    (tmp_path / "runs" / "base").mkdir(parents=True)
    assert hub_id("runs/base") is None


def test_a_merge_pushes_its_model(case: MergeCase, hub: FakeHub) -> None:
    case.make()
    to = ("push_to_hub={repo: someone/merged}",)
    merge(case.config(*_QUICK, *to), console=Console(quiet=True))
    assert {"config.json", "README.md", "model.safetensors"} <= hub.repos["someone/merged"].keys()


def test_a_name_that_is_taken_is_told_before_the_merge(case: MergeCase, hub: FakeHub) -> None:
    case.make()
    hub.repos["someone/merged"] = {}
    with pytest.raises(StorageError, match="of that name already"):
        merge(
            case.config(*_QUICK, "push_to_hub={repo: someone/merged}"), console=Console(quiet=True)
        )
    assert not (case.root / "run" / "model").exists()


def test_a_run_that_was_pushed_is_complete(case: MergeCase, hub: FakeHub) -> None:
    """The name is taken, by the run itself."""
    case.make()
    config = case.config(*_QUICK, "push_to_hub={repo: someone/merged}")
    merge(config, console=Console(quiet=True))
    assert merge(config, console=Console(quiet=True)).reason == "complete"
    assert len(hub.commits["someone/merged"]) == 1


def test_a_merge_whose_push_fails_keeps_its_model(case: MergeCase, hub: FakeHub) -> None:
    case.make()
    hub.fails = True
    outcome = merge(
        case.config(*_QUICK, "push_to_hub={repo: someone/merged}"), console=Console(quiet=True)
    )
    assert outcome.model is not None
    assert (outcome.model / "config.json").is_file()
    events = read_events(outcome.run / "events.jsonl")
    [told] = [e["message"] for e in events if e["event"] == "warning" and "pushed" in e["message"]]
    assert f"arm-ray push {outcome.model} someone/merged" in told


@pytest.mark.parametrize(
    "card",
    [
        "---\n" + "[" * 1000 + "\n---\n",
        "---\n- a list\n---\n",
        "---\na: &a [x, x]\nb: [*a, *a]\nc: *c\n---\n",
        b"\xff\xfe",
    ],
)
def test_a_card_that_is_none_is_told_before_there_is_a_repository(
    model: Path, hub: FakeHub, card: str | bytes
) -> None:
    (model / "README.md").write_bytes(card.encode() if isinstance(card, str) else card)
    with pytest.raises(StorageError, match="a model card cannot be read"):
        push(model, "someone/merged", base_models=["org/base"])
    assert not hub.repos


def test_the_card_names_models_of_the_hub_alone_and_how_to_make_it_again(model: Path) -> None:
    text = (model / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    # The base and the candidates are directories.
    assert "base_model" not in front
    assert "merge" in front["tags"]
    assert "arm-ray merge merge.yaml" in text
