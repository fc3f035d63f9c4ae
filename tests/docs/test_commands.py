"""Every command line and configuration of the documentation: checked, or why it is not."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from arm_ray.config import load_merge_config, parse_merge_config
from arm_ray.config_keys import all_keys, find_keys
from arm_ray.following.config import load_attach_config
from arm_ray.presets import PRESETS
from arm_ray.study.config import load_study_config
from arm_ray.training.pipeline import load_pipeline_config
from scripts.command_page import command_page, command_parser, commands_of
from tests.builders.pages import Line, blocks, command_lines, inline_commands, pages
from tests.builders.paths import ROOT

# First words of lines that are not ours, with the reason why they are not run.
NOT_OURS = {
    "cluster/local.sh": "run by tests/cluster",
    "eval": "of cluster/local.sh, which tests/cluster runs",
    "ray": "needs a cluster; what it submits is checked",
    "pip": "needs a network; the extras that it names are checked",
}
# Blocks of YAML that are no configuration of arm_ray, or that need what a reader installs.
OTHER_YAML = {
    "task: capitals": "a task file of lm-evaluation-harness, run by tests/evaluation",
    "operator: trimmed_mean": "an operator that tests/test_third_party.py installs",
}
LOADERS: dict[str, Callable[[Path, Sequence[str]], BaseModel]] = {
    "merge": load_merge_config,
    "plan": load_merge_config,
    "attach": load_attach_config,
    "pipeline": load_pipeline_config,
    "study": load_study_config,
}
MINIMAL = {"base": "b", "candidates": ["c"], "output": "o", "calibration": {"path": "p"}}


def lines(path: Path) -> list[Line]:
    return list(command_lines(path))


def parsed(words: Sequence[str]) -> argparse.Namespace:
    """What the real parser makes of a line, as `main` has it parsed; exits where it is wrong."""
    parser = command_parser()
    options, rest = parser.parse_known_args(words)
    if any(text.startswith("-") or "=" not in text for text in rest):
        parser.parse_args(words)
    options.overrides = [*getattr(options, "overrides", ()), *rest]
    return options


def problems_of(line: Line, tmp_path: Path) -> list[str]:
    """What is wrong with a command line."""
    # Without what the shell does with the output.
    words = list(itertools.takewhile(lambda word: word not in (">", ">>", "|"), line.words))
    if words[:3] == ["ray", "job", "submit"]:
        words = words[words.index("--") + 1 :] if "--" in words else words
    if words[0] == "arm-ray":
        return problems_of_ours(line, words[1:], tmp_path)
    if words[0] == "make":
        return [f"no target {name}" for name in words[1:] if f"\n{name}:" not in makefile()]
    if words[:2] == ["python", "-m"]:
        missing = importlib.util.find_spec(words[2]) is None
        return [f"no module {words[2]}"] * missing + missing_files(words[3:])
    if words[0] == "python":
        return missing_files(words[1:]) if words[1] != "-c" else []
    if words[:2] == ["pip", "install"]:
        named = re.findall(r"(?:arm-ray|\.)\[([\w,-]+)\]", line.text)
        return [f"no extra {e}" for extra in named for e in extra.split(",") if e not in extras()]
    return [] if words[0] in NOT_OURS else [f"nothing checks {words[0]}, and no reason is given"]


def problems_of_ours(line: Line, words: list[str], tmp_path: Path) -> list[str]:
    try:
        options = parsed(words)
    except SystemExit:
        return ["the parser refuses it"]
    if words[0] == "config" and options.key not in (None, "KEY"):
        return [] if find_keys(options.key) else [f"no key {options.key}"]
    if words[0] not in LOADERS:
        return []
    problems = [] if Path(options.config).is_absolute() else unknown_keys(options.overrides)
    file = configuration(line, options.config, tmp_path)
    if file is not None:
        LOADERS[words[0]](file, options.overrides)
    elif not Path(options.config).is_absolute() and not re.match(r"[A-Z]+\.yaml$", options.config):
        problems.append(f"{options.config} is neither there nor written on the page")
    return problems


def configuration(line: Line, name: str, tmp_path: Path) -> Path | None:
    """A file of the repository, or one that the page shows; None: it is the reader's."""
    for block in blocks(ROOT / line.page):
        if block.title == name:
            file = tmp_path / Path(name).name
            file.write_text(block.text, encoding="utf-8")
            return file
    return ROOT / name if (ROOT / name).is_file() else None


def unknown_keys(overrides: Sequence[str]) -> list[str]:
    """Overrides of keys that no configuration has."""
    known = known_keys()
    names = [text.partition("=")[0] for text in overrides]
    # Sections that hold the keys of a merge or of a training.
    bare = {name: re.sub(r"^(?:merge|train|series\.\w+)\.", "", name) for name in names}
    return [f"no key {name}" for name in names if not {name, bare[name]} & known]


@functools.cache
def known_keys() -> frozenset[str]:
    return frozenset(key.name for key in all_keys())


def missing_files(words: Sequence[str]) -> list[str]:
    at = ("tests/", "examples/", "studies/", "scripts/", "cluster/")
    return [f"no file {w}" for w in words if w.startswith(at) and not (ROOT / w).exists()]


def makefile() -> str:
    return (ROOT / "Makefile").read_text(encoding="utf-8")


def extras() -> set[str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    return set(re.findall(r"^([\w-]+) = \[", section, re.MULTILINE))


@pytest.mark.parametrize("path", pages(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_command_line_is_one(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    wrong = {line.text: found for line in lines(path) if (found := problems_of(line, tmp_path))}
    assert wrong == {}


def test_command_lines_are_found() -> None:
    """Both kinds of blocks, and enough of them that none is overlooked."""
    found = [line for path in pages() for line in lines(path)]
    assert sum(line.words[0] == "arm-ray" for line in found) >= 50
    assert {line.words[1] for line in found if line.words[0] == "arm-ray"} >= LOADERS.keys()
    assert any(line.page == "docs/study.md" for line in found)  # indented
    assert any(line.page == "docs/start.md" for line in found)  # fenced


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("arm-ray merge merge.yaml", "neither there"),
        ("arm-ray merge CONFIG.yaml --fast", "refuses"),
        ("arm-ray merge CONFIG.yaml schedule.stop=1", "no key schedule.stop"),
        ("arm-ray melt CONFIG.yaml", "refuses"),
        ("make coffee", "no target coffee"),
        ("python -m jobs.melt CONFIG.yaml", "no module jobs.melt"),
        ("python examples/none.py", "no file"),
        ("ray job submit -- python -m jobs.melt x.yaml", "no module"),
        ("pip install 'arm-ray[magic]'", "no extra magic"),
        ("rm -rf /", "nothing checks rm"),
    ],
)
def test_a_wrong_line_is_seen(text: str, wrong: str, tmp_path: Path) -> None:
    line = Line("CONTRIBUTING.md", text, tuple(text.replace("'", "").split()))
    [found] = problems_of(line, tmp_path)
    assert wrong in found


@pytest.mark.parametrize("path", pages(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_commands_within_sentences_are_known(path: Path) -> None:
    commands = commands_of(command_parser())
    for line in inline_commands(path):
        name = next((w for w in line.words[1:] if not w.startswith("-")), None)
        if name in (None, "COMMAND"):
            continue
        assert name in commands, line.text
        options = {o for action in commands[name]._actions for o in action.option_strings}
        given = {word.partition("=")[0] for word in line.words if word.startswith("--")}
        assert given <= options, line.text
        assert missing_files(line.words) == [], line.text


def test_the_reasons_are_needed() -> None:
    """A reason goes when nothing names its command any more."""
    used = {line.words[0] for path in pages() for line in lines(path)}
    assert NOT_OURS.keys() <= used
    texts = [b.text for path in pages() for b in blocks(path) if b.language == "yaml"]
    assert all(any(start in text for text in texts) for start in OTHER_YAML)


@pytest.mark.parametrize(
    "block",
    [b for path in pages() for b in blocks(path) if b.language == "yaml"],
    ids=lambda b: f"{b.page}-{b.title or b.text.splitlines()[0][:24]}",
)
def test_every_configuration_is_one(block: Any, tmp_path: Path) -> None:
    if any(start in block.text for start in OTHER_YAML):
        return
    content = yaml.safe_load(block.text)
    file = tmp_path / "config.yaml"
    file.write_text(block.text, encoding="utf-8")
    keys = content.keys()
    if "run" in keys and "publish" in keys:
        load_attach_config(file)
    elif "axes" in keys:
        load_study_config(file)
    elif "train" in keys:
        load_pipeline_config(file)
    else:
        # Parts of a merge's configuration are completed.
        parse_merge_config(MINIMAL | ({"evaluation": content} if "tasks" in keys else content))


def test_the_page_of_commands_has_all_of_them() -> None:
    page = command_page()
    for name, command in commands_of(command_parser()).items():
        assert f"\n## arm-ray {name}\n" in page
        for action in command._actions:
            for option in action.option_strings:
                assert option in ("-h", "--help") or f"`{option}" in page or f", {option}" in page


def test_the_index_of_the_paper_is_whole() -> None:
    page = (ROOT / "docs/paper.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:Tables?|Figures?) [\d, ]+) \|", page, re.MULTILINE)
    numbers = {
        kind: sorted(
            int(n) for row in rows if row.startswith(kind) for n in re.findall(r"\d+", row)
        )
        for kind in ("Table", "Figure")
    }
    assert numbers == {"Table": list(range(1, 14)), "Figure": list(range(1, 8))}
    assert set(re.findall(r"`(paper/[\w-]+)`", page)) == set(PRESETS)
    files = {path.name for path in (ROOT / "studies").glob("paper-*.yaml")}
    assert set(re.findall(r"(paper-[\w-]+\.yaml)", page)) == files


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    assert max(map(len, text.splitlines())) <= 100
    files = re.findall(r"\]\((?!https?:)([^)#\s]+)", text)
    assert [name for name in files if not (ROOT / name).exists()] == []
    picture = ROOT / "docs/images/report.png"
    assert picture.relative_to(ROOT).as_posix() in files
    assert picture.stat().st_size < 200_000


@pytest.mark.parametrize(
    "block",
    [b for path in pages() for b in blocks(path) if b.language == "python"],
    ids=lambda b: f"{b.page}-{b.title}",
)
def test_python_can_be_parsed(block: Any) -> None:
    """Not run: it needs trainers or checkpoints; tests/test_third_party.py runs the operator's."""
    compile(block.text, block.page, "exec")
