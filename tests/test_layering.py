"""Dependencies point one way, and what is pure imports nothing heavy."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.builders.paths import ROOT

# Room -> the rooms of arm_ray that it may import. A room is a package or a module of arm_ray.
CORE = {
    "errors", "hardware", "identity", "config", "events", "noise", "presets", "schedule", "secrets",
    "storage",
}  # fmt: skip
PURE = CORE | {"steps", "merging", "checkpoints", "model", "calibration", "evaluation", "report"}
ALLOWED: dict[str, set[str]] = {
    "secrets": set(),
    "errors": {"secrets"},
    "hardware": set(),
    "identity": set(),
    "noise": set(),
    "storage": {"errors", "secrets"},
    "events": {"errors", "secrets", "storage"},
    "presets": set(),
    "config": {"errors", "evaluation", "identity", "merging", "presets", "secrets", "storage"},
    "schedule": {"errors", "config"},
    "steps": {"errors", "config", "evaluation", "schedule"},
    "lazy": set(),
    "merging": {"errors", "lazy"},
    "checkpoints": CORE,
    "calibration": CORE | {"lazy"},
    "model": CORE | {"checkpoints", "merging"},
    "evaluation": CORE | {"calibration", "checkpoints"},
    "report": CORE | {"checkpoints", "evaluation", "following"},
    "exports": CORE | {"checkpoints"},
    "planning": CORE | {"steps", "calibration", "checkpoints", "merging", "model"},
    "training": CORE | {"calibration", "checkpoints", "evaluation"},
    "following": CORE | {"checkpoints", "evaluation"},
    "drafting": CORE | {"checkpoints", "following"},
    "study": CORE | {"checkpoints", "evaluation", "merging", "planning", "training"},
    "runtime": PURE | {"exports", "following", "lazy", "planning", "study", "training"},
    "config_keys": CORE | {"following", "merging", "study", "training"},
    "api": PURE | {"following", "planning", "runtime", "study", "training"},
    "public_api": set(),
    "integrations": {"api", "cli", "errors", "lazy", "storage"},
    "jobs": {"cli", "errors", "noise", "runtime", "secrets", "training"},
    "cli": PURE
    | {
        "config_keys",
        "drafting",
        "exports",
        "following",
        "planning",
        "runtime",
        "study",
        "training",
    },
}
# The rooms within `runtime/`, from the ground up.
_GROUND = {"session", "inputs"}
_CLUSTER = _GROUND | {"cluster", "output", "shards"}
WITHIN_RUNTIME: dict[str, set[str]] = {
    "session": set(),
    "inputs": set(),
    "rehearsal": _CLUSTER,
    "plan": {"rehearsal"},
    "cluster": {"session"},
    "output": {"session", "cluster"},
    "shards": {"cluster", "session"},
    "scoring": _CLUSTER,
    "train": {"session", "cluster", "output"},
    "merge": _CLUSTER | {"scoring"},
    "attach": _CLUSTER | {"scoring", "merge"},
    "pipeline": _CLUSTER | {"scoring", "merge", "train"},
    "study": _CLUSTER | {"scoring", "merge", "train"},
    "verify": _CLUSTER | {"scoring", "merge"},
}
MOST_FILES, MOST_LINES, MOST_METHODS, MOST_ARGUMENTS = 15, 450, 20, 8
# Rooms that may import Ray, and the one module that does so when it is called.
RAY_ROOMS = {"runtime"}
RAY_AT_CALL_TIME = {"arm_ray/calibration/stream.py"}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "arm_ray").with_suffix("").parts
    return parts[0]


def imports(path: Path, top_level: bool = False) -> set[str]:
    """Absolute names of the modules that a file imports; inside of functions too, or not."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[int] = set()
    if top_level:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                skipped |= {id(child) for child in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


MODULES = [p for p in sources("arm_ray") if p != ROOT / "arm_ray" / "__init__.py"]


def within_runtime(path: Path) -> str | None:
    parts = path.relative_to(ROOT / "arm_ray").with_suffix("").parts
    return parts[1] if parts[0] == "runtime" and parts[-1] != "__init__" else None


@pytest.mark.parametrize("room", WITHIN_RUNTIME)
def test_imports_within_runtime_point_one_way(room: str) -> None:
    files = [path for path in MODULES if within_runtime(path) == room]
    assert files
    for path in files:
        names = [n.split(".") for n in imports(path) if n.startswith("arm_ray.runtime.")]
        for name in names:
            assert name[2] in WITHIN_RUNTIME[room] | {room}, f"{path.name} imports {name}"


def test_every_room_of_runtime_has_its_floor_and_no_cycle() -> None:
    rooms = {within_runtime(path) for path in MODULES} - {None}
    assert rooms == set(WITHIN_RUNTIME)
    floors: dict[str, int] = {}
    while len(floors) < len(WITHIN_RUNTIME):
        on_top = {
            room: 1 + max((floors[below] for below in WITHIN_RUNTIME[room]), default=0)
            for room in WITHIN_RUNTIME
            if room not in floors and WITHIN_RUNTIME[room] <= set(floors)
        }
        assert on_top, "a cycle"
        floors |= on_top
    assert max(floors.values()) <= 7


def test_no_folder_is_crowded() -> None:
    for folder in {path.parent for path in MODULES if within_runtime(path)}:
        assert len(list(folder.glob("*.py"))) <= MOST_FILES, folder


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_large_module_says_why_it_is_one(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if len(text.splitlines()) > MOST_LINES:
        assert "One module, because" in str(ast.get_docstring(ast.parse(text))), path


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_class_does_too_much(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            methods = [f for f in node.body if isinstance(f, ast.FunctionDef)]
            assert len(methods) <= MOST_METHODS, f"{path}: {node.name}"
            for method in methods:
                if method.name == "__init__":
                    given = [*method.args.args[1:], *method.args.kwonlyargs]
                    assert len(given) <= MOST_ARGUMENTS, f"{path}: {node.name}"


def test_only_one_module_says_remote() -> None:
    """Calls to actors go through typed handles, so that mypy sees what they are given."""
    said = [p.name for p in MODULES if ".remote(" in p.read_text(encoding="utf-8")]
    assert said == ["actors.py"]


def test_no_operator_is_named_outside_of_merging() -> None:
    """What an operator needs it declares; presets name operators because they are settings."""
    named = re.compile(r'"(acm|aim|dare|ties|ota|opcm|lore|twin|slerp)"')
    for path in MODULES:
        if room_of(path) not in ("merging", "presets"):
            assert named.search(path.read_text(encoding="utf-8")) is None, path


def test_test_modules_do_not_import_each_other() -> None:
    for path in sources("tests"):
        for name in imports(path):
            assert not re.match(r"tests\..*\btest_|tests\.test_", name), f"{path}: {name}"


def test_there_is_something_to_check() -> None:
    assert {room_of(p) for p in MODULES} >= {"errors", "merging", "checkpoints", "model", "runtime"}
    assert "arm_ray.errors.ConfigError" in imports(ROOT / "arm_ray" / "config" / "merge.py")
    assert "arm_ray.runtime.merge.run.merge" in imports(ROOT / "arm_ray" / "cli" / "jobs.py")
    assert "arm_ray.runtime.merge.run.merge" not in imports(
        ROOT / "arm_ray" / "cli" / "jobs.py", True
    )


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    room = room_of(path)
    assert room in ALLOWED, f"say in ALLOWED what {room} may import"
    for name in imports(path):
        top, _, rest = name.partition(".")
        assert top not in ("jobs", "tests", "benchmarks"), name
        if top == "arm_ray" and rest.split(".")[0] not in ("__version__", "", room):
            assert rest.split(".")[0] in ALLOWED[room], f"{room} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_runtime_imports_ray(path: Path) -> None:
    names = {name.split(".")[0] for name in imports(path)}
    if room_of(path) not in RAY_ROOMS and str(path.relative_to(ROOT)) not in RAY_AT_CALL_TIME:
        assert "ray" not in names
    if room_of(path) != "evaluation":
        assert "vllm" not in names


def test_packages_of_public_names_import_nothing_until_one_is_used() -> None:
    packages = ["arm_ray", "arm_ray.merging", "arm_ray.integrations"]
    for name, loaded in loaded_by(packages).items():
        assert not loaded & (HEAVY | {"pydantic", "yaml", "rich"}), name
        ours = {module for module in loaded if module.startswith("arm_ray")}
        assert ours <= {"arm_ray.lazy", *packages}, name


def loaded_by(modules: list[str]) -> dict[str, set[str]]:
    """Import modules one after another in a fresh interpreter: module -> what is loaded then."""
    program = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "    print(name, *sorted({m.split('.')[0] for m in sys.modules}))\n"
        "    print(name, *sorted(m for m in sys.modules if m.startswith('arm_ray')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found: dict[str, set[str]] = {}
    for line in done.stdout.splitlines():
        name, *names = line.split()
        found.setdefault(name, set()).update(names)
    return found


def modules_of(*rooms: str) -> list[str]:
    names = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts) for p in MODULES if room_of(p) in rooms
    ]
    return [name.removesuffix(".__init__") for name in names]


HEAVY = {"torch", "transformers", "ray", "vllm", "numpy", "safetensors", "datasets"}


def test_the_core_and_the_command_line_import_nothing_heavy() -> None:
    for name, loaded in loaded_by(["arm_ray", *modules_of(*CORE, "cli")]).items():
        assert not loaded & HEAVY, name


def test_a_page_is_made_without_torch() -> None:
    for name, loaded in loaded_by(
        [name for name in modules_of("report") if re.search(r"page|run_|status|serving", name)]
    ).items():
        assert not loaded & {"ray", "vllm", "torch", "transformers", "vl_convert"}, name


def test_merging_knows_no_files_no_ray_and_no_configuration() -> None:
    for name, loaded in loaded_by(modules_of("merging")).items():
        foreign = {"ray", "vllm", "transformers", "safetensors", "pydantic", "yaml"}
        assert not loaded & foreign, name
        assert all(
            module in ("arm_ray", "arm_ray.errors", "arm_ray.lazy", "arm_ray.secrets")
            or module.startswith("arm_ray.merging")
            for module in loaded
            if module.startswith("arm_ray")
        ), name


def test_calibration_imports_neither_ray_nor_transformers() -> None:
    for name, loaded in loaded_by(modules_of("calibration")).items():
        assert not loaded & {"ray", "vllm", "transformers", "torch"}, name


def test_checkpoints_models_and_reports_do_not_import_ray() -> None:
    for name, loaded in loaded_by(
        modules_of("checkpoints", "report", "model", "planning", "following", "study")
    ).items():
        assert not loaded & {"ray", "vllm"}, name


def test_the_runtime_imports_ray_where_it_uses_it() -> None:
    """A merge of one shard without a cluster does without Ray, and does not wait for its import."""
    for name, loaded in loaded_by(modules_of("runtime")).items():
        assert not loaded & {"ray", "vllm"}, name


@pytest.mark.parametrize("page", ["development", "architecture"])
def test_files_that_a_page_of_the_house_names_are_there(page: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    named = set(re.findall(r"[\w/]+\.py\b", text))
    assert named
    missing = [n for n in named if not any((at / n).is_file() for at in (ROOT, ROOT / "arm_ray"))]
    assert missing == []
