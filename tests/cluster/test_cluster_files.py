"""The files in cluster/, each against its real schema or reader; each check can fail."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from pydantic import BaseModel

from arm_ray.config import MergeConfig, parse_merge_config
from arm_ray.following.config import AttachConfig
from tests.builders.paths import ROOT
from tests.cluster.reduce_schema import REDUCED, load

CLUSTER = ROOT / "cluster"
LAUNCHER = ["aws", "gcp", "on-prem"]
SCRIPTS = sorted(CLUSTER.glob("*.sh"))
RAY_SCHEMA = json.loads(
    Path(ray.autoscaler.__file__).with_name("ray-schema.json").read_text(encoding="utf-8")
)
KUBERAY_SCHEMAS = json.loads(REDUCED.read_text(encoding="utf-8"))["schemas"]
README = (CLUSTER / "README.md").read_text(encoding="utf-8")
TEXTS = {
    path.relative_to(CLUSTER).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted(CLUSTER.rglob("*"))
    if path.is_file()
}
RAY_VERSION = next(
    line.removeprefix("ray==")
    for line in (ROOT / "constraints" / "tested.txt").read_text().splitlines()
    if line.startswith("ray==")
)


def launcher(name: str) -> Any:
    return yaml.safe_load((CLUSTER / f"{name}.yaml").read_text(encoding="utf-8"))


def changed(content: Any, path: str, value: Any) -> Any:
    """A copy with the value at a dotted path set; `...` removes it."""
    content = copy.deepcopy(content)
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    place = content
    for key in parents:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return content


class TestLauncher:
    @pytest.mark.parametrize("name", LAUNCHER)
    def test_it_fits_rays_schema(self, name: str) -> None:
        jsonschema.validate(launcher(name), RAY_SCHEMA)

    @pytest.mark.parametrize("name", LAUNCHER)
    def test_ray_itself_takes_it(self, name: str) -> None:
        from ray.autoscaler._private.util import prepare_config, validate_config

        prepared = prepare_config(launcher(name))
        validate_config(prepared)
        assert prepared["max_workers"] >= 2
        if name != "on-prem":
            types = prepared["available_node_types"]
            assert types["shards"]["min_workers"] == 1
            assert types["evaluators"]["resources"]["evaluator"] == 4
            assert types[prepared["head_node_type"]]["max_workers"] == 0
            # Defaults of the cloud provider would install another Ray.
            commands = json.dumps(prepared["head_setup_commands"] + prepared["setup_commands"])
            assert "ray-wheels" not in commands
            assert "pip install" not in commands

    @pytest.mark.parametrize(
        ("name", "path", "value"),
        [
            ("aws", "max_workers", "five"),
            ("aws", "idle_timeout", 15),
            ("aws", "available_node_types.shards.resources.GPU", -1),
            ("aws", "available_node_types.shards.node_config", ...),
            ("gcp", "provider.type", ...),
            ("gcp", "available_node_types.evaluators.min_worker", 1),
            ("gcp", "head_start_ray_commands", "ray start --head"),
            ("on-prem", "provider.worker_ips", "10.0.0.2"),
            ("on-prem", "cluster_name", ...),
        ],
    )
    def test_a_broken_one_does_not_fit(self, name: str, path: str, value: Any) -> None:
        broken = changed(launcher(name), path, value)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, RAY_SCHEMA)

    @pytest.mark.parametrize(
        ("path", "value"),
        [("head_node_type", "heads"), ("max_workers", 0), ("head_node_type", ...)],
    )
    def test_ray_itself_refuses_what_the_schema_cannot_say(self, path: str, value: Any) -> None:
        from ray.autoscaler._private.util import prepare_config, validate_config

        with pytest.raises((ValueError, KeyError)):
            validate_config(prepare_config(changed(launcher("aws"), path, value)))

    @pytest.mark.parametrize("name", LAUNCHER)
    def test_nodes_start_with_a_token_and_the_same_installation(self, name: str) -> None:
        content = launcher(name)
        for key in ("head_start_ray_commands", "worker_start_ray_commands"):
            starts = [command for command in content[key] if "ray start" in command]
            assert len(starts) == 1
            assert "RAY_AUTH_MODE=token" in starts[0]
            assert "0.0.0.0" not in starts[0]
        assert [key for key in content["file_mounts"] if key.endswith("/.ray/auth_token")]
        mounted = {key: value for key, value in content["file_mounts"].items() if value == "dist"}
        assert all(key.endswith("arm_ray/wheels") for key in mounted)
        assert "~/arm_ray/wheels/install.sh" in json.dumps(content["setup_commands"])
        for command in [text for key, text in walk(content) if key.endswith("_commands")]:
            bash_reads(command)


class TestKubernetes:
    @pytest.mark.parametrize("name", ["raycluster", "rayjob", "pvc"])
    def test_it_fits_the_crd(self, name: str) -> None:
        manifest = load(name)
        jsonschema.validate(manifest, KUBERAY_SCHEMAS[manifest["kind"]])

    @pytest.mark.parametrize(
        ("name", "path", "value"),
        [
            ("raycluster", "spec.headGroupSpec", ...),
            ("raycluster", "spec.enableAutoscaling", True),
            ("raycluster", "spec.enableInTreeAutoscaling", "yes"),
            ("raycluster", "spec.authOptions.mode", "password"),
            ("raycluster", "spec.autoscalerOptions.upscalingMode", "Fast"),
            ("raycluster", "spec.headGroupSpec.rayStartParams.num-cpus", 0),
            ("raycluster", "spec.workerGroupSpecs.0.maxReplica", 2),
            ("raycluster", "spec.workerGroupSpecs.0.groupName", ...),
            ("raycluster", "spec.workerGroupSpecs.0.template.spec.containers.0.name", ...),
            ("raycluster", "spec.workerGroupSpecs.0.template.spec.containers.0.gpus", 1),
            (
                "raycluster",
                "spec.workerGroupSpecs.0.template.spec.containers.0.resources.limits.memory",
                "64 GB",
            ),
            ("raycluster", "apiVersion", "ray.io/v1alpha1"),
            ("rayjob", "spec.entrypoint", ["python", "-m", "arm_ray.jobs.merge"]),
            ("rayjob", "spec.ttlSecondsAfterFinished", "10m"),
            ("rayjob", "spec.rayClusterSpec.workerGroupSpecs.1.template.spec.volume", []),
            ("pvc", "spec.accessMode", "ReadWriteMany"),
            ("pvc", "spec.resources.requests.storage", "1 TB"),
        ],
    )
    def test_a_broken_one_does_not_fit(self, name: str, path: str, value: Any) -> None:
        broken = changed(load(name), path, value)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, KUBERAY_SCHEMAS[load(name)["kind"]])

    def test_the_job_has_the_same_cluster(self) -> None:
        assert load("rayjob")["spec"]["rayClusterSpec"] == load("raycluster")["spec"]

    def test_what_the_schema_cannot_say(self) -> None:
        spec = load("raycluster")["spec"]
        assert spec["rayVersion"] == RAY_VERSION
        assert spec["authOptions"] == {"mode": "token", "secretName": "arm-ray-token"}
        assert spec["enableInTreeAutoscaling"] is True
        groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
        assert list(groups) == ["shards", "evaluators", "graders"]
        for group in [spec["headGroupSpec"], *groups.values()]:
            pod = group["template"]["spec"]
            (container,) = pod["containers"]
            assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]
            claim = {"claimName": load("pvc")["metadata"]["name"]}
            volumes = {volume["name"]: volume for volume in pod["volumes"]}
            assert volumes["shared"]["persistentVolumeClaim"] == claim
            assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert mounts == {"shared": "/shared", "shm": "/dev/shm"}
            assert container["resources"]["limits"] == container["resources"]["requests"]
            assert pod["securityContext"]["runAsNonRoot"] is True
        gpu = "nvidia.com/gpu"
        with_gpu = [
            name
            for name, group in groups.items()
            if gpu in group["template"]["spec"]["containers"][0]["resources"]["limits"]
        ]
        assert with_gpu == ["shards", "evaluators"]
        assert groups["shards"]["minReplicas"] == 1
        # Text in text: it goes through a shell.
        resources = groups["evaluators"]["rayStartParams"]["resources"]
        assert json.loads(json.loads(resources)) == {"evaluator": 1}
        assert load("pvc")["spec"]["accessModes"] == ["ReadWriteMany"]
        job = load("rayjob")["spec"]
        assert job["shutdownAfterJobFinishes"] is True
        assert job["ttlSecondsAfterFinished"] > 0

    def test_the_reduced_copy_says_where_it_is_from(self) -> None:
        content = json.loads(REDUCED.read_text(encoding="utf-8"))
        assert content["licence"] == "Apache-2.0"
        assert {source["version"] for source in content["sources"].values()} == {"ray.io/v1"}


class TestScripts:
    @pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
    def test_bash_reads_it(self, script: Path) -> None:
        bash_reads(script.read_text(encoding="utf-8"))
        assert "set -euo pipefail" in script.read_text(encoding="utf-8")

    def test_bash_refuses_a_broken_one(self) -> None:
        broken = (
            (CLUSTER / "slurm.sh")
            .read_text(encoding="utf-8")
            .replace("esac", "")
            .replace("done", "", 1)
        )
        with pytest.raises(AssertionError):
            bash_reads(broken)

    def test_shellcheck_finds_nothing(self) -> None:
        subprocess.run([program("shellcheck"), *SCRIPTS], check=True)

    def test_shellcheck_finds_something_in_a_broken_one(self, tmp_path: Path) -> None:
        (tmp_path / "broken.sh").write_text("#!/usr/bin/env bash\nrm -rf $1/*\n")
        done = subprocess.run([program("shellcheck"), str(tmp_path / "broken.sh")])
        assert done.returncode == 1


class TestContainerfile:
    def test_hadolint_finds_nothing(self) -> None:
        subprocess.run([program("hadolint"), CLUSTER / "Containerfile"], check=True)

    def test_hadolint_finds_something_in_a_broken_one(self, tmp_path: Path) -> None:
        (tmp_path / "Containerfile").write_text("FROM debian\nRUN apt-get install python3\n")
        done = subprocess.run([program("hadolint"), str(tmp_path / "Containerfile")])
        assert done.returncode == 1

    def test_what_it_must_have(self) -> None:
        text = TEXTS["Containerfile"]
        instructions = re.findall(r"^([A-Z]+) (.*)$", text, re.MULTILINE)
        values = {name: [v for n, v in instructions if n == name] for name, _ in instructions}
        (base, *_) = values["ARG"]
        assert re.fullmatch(r"BASE=\S+:[\w.-]*\d[\w.-]*", base)
        assert "DEVICE=cpu" in values["ARG"]
        assert values["USER"] == ["1000"]
        assert "bubblewrap" in text
        assert values["CMD"] == ['["ray", "start", "--head", "--block"]']
        assert "RAY_AUTH_MODE=token" in text

    def test_what_it_copies_is_let_through(self) -> None:
        let = re.findall(r"^!(\S+)$", TEXTS["Containerfile.dockerignore"], re.MULTILINE)
        copied = [
            source
            for line in re.findall(r"^COPY (?!--from)(.*) \S+$", TEXTS["Containerfile"], re.M)
            for source in line.split()
        ]
        for source in copied:
            assert (ROOT / source).exists()
            assert source in let or source.split("/")[0] in let

    def test_it_takes_the_extras_that_there_are(self) -> None:
        extras = set(re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.M))
        named = re.findall(r"extras\+?=([\w,-]+)", TEXTS["install.sh"])
        assert {extra for group in named for extra in group.split(",") if extra} <= extras


class TestWhatIsNamed:
    @pytest.mark.parametrize("name", TEXTS)
    def test_jobs_and_commands_exist(self, name: str) -> None:
        for module in re.findall(r"\b(jobs\.[a-z]+)\b", TEXTS[name]):
            assert find_spec(module) is not None, module
        for path in re.findall(r"(?<![\w/])cluster/[\w./-]+\w", TEXTS[name]):
            assert (ROOT / path).exists(), path

    @pytest.mark.parametrize("name", TEXTS)
    def test_no_secret_and_no_cluster_without_a_token(self, name: str) -> None:
        text = TEXTS[name]
        assert not re.search(r"\b[0-9a-f]{32,}\b", text)
        assert "AUTH_MODE=disabled" not in text

    def test_what_is_to_fill_in_is_in_the_readme(self) -> None:
        for name, text in TEXTS.items():
            if "FILL_IN" in text and name != "README.md":
                assert f"`{name}`" in README, name

    @pytest.mark.parametrize("name", [name for name in TEXTS if name != "README.md"])
    def test_each_file_is_in_the_readme(self, name: str) -> None:
        assert name in README or name == "Containerfile.dockerignore"

    def test_settings_in_the_files_are_settings_of_a_merge(self) -> None:
        """Dotted keys in all texts, in the README's YAML, and those that follow a job's file."""
        keys = set(setting_keys(MergeConfig)) | set(setting_keys(AttachConfig))
        pattern = r"\b((?:runtime|evaluation|schedule|calibration|sharing)\.[a-z_.]*[a-z])\b"
        for name, text in TEXTS.items():
            for key in re.findall(pattern, text):
                assert key in keys, f"{name}: {key}"
        for block in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL):
            parse_merge_config(yaml.safe_load(block))

    def test_variables_of_the_local_cluster_exist(self) -> None:
        for name in set(re.findall(r"\bARM_RAY_\w+", README)):
            assert any(name in TEXTS[script] for script in ("local.sh", "slurm.sh")), name


def setting_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted keys of a configuration model, sections too."""
    schema = model.model_json_schema()

    def walk_schema(part: dict[str, Any], prefix: str) -> Iterator[str]:
        for option in [part, *part.get("anyOf", []), *part.get("allOf", [])]:
            reference = option.get("$ref")
            if reference:
                option = schema["$defs"][reference.rpartition("/")[2]]
            for key, inner in option.get("properties", {}).items():
                yield f"{prefix}{key}"
                yield from walk_schema(inner, f"{prefix}{key}.")

    yield from walk_schema(schema, prefix)


def walk(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Texts in lists below a mapping, with the key of the list."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from walk(value)
        elif isinstance(value, list):
            yield from ((key, text) for text in value if isinstance(text, str))


def bash_reads(text: str) -> None:
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def program(name: str) -> str:
    """A checker, beside this Python or on PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if not found:
        pytest.skip(f"{name} is not installed")
    return found
