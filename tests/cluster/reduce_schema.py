"""Makes `kuberay_schemas.json`: of KubeRay's CRDs, what the manifests in cluster/kuberay use.

::

    python -m tests.cluster.reduce_schema DIRECTORY_OF_CRDS

The CRDs are `ray.io_rayclusters.yaml` and `ray.io_rayjobs.yaml` of KubeRay's
`helm-chart/kuberay-operator/crds`, 2 MB in all. Kept are the properties along the paths of the
manifests, with their types and limits; all others become unknown, and unknown fields are errors.
A manifest with a new field therefore needs a new reduced copy.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.builders.paths import ROOT

MANIFESTS = ROOT / "cluster" / "kuberay"
REDUCED = Path(__file__).with_name("kuberay_schemas.json")
KEPT = ("type", "enum", "required", "minimum", "maximum", "pattern", "format", "nullable")


def reduce(schema: dict[str, Any], values: list[Any]) -> dict[str, Any]:
    """The part of a schema that these values, which are in the same place, make use of."""
    found = {key: schema[key] for key in KEPT if key in schema}
    if schema.get("x-kubernetes-int-or-string"):
        # Their `pattern` is for the text; a JSON schema ignores it for numbers.
        found["type"] = ["integer", "string"]
    mappings = [value for value in values if isinstance(value, dict)]
    if "properties" in schema:
        used = {key for value in mappings for key in value} | set(schema.get("required", ()))
        unknown = used - schema["properties"].keys()
        if unknown:
            raise ValueError(f"not in the CRD: {', '.join(sorted(unknown))}")
        found["properties"] = {
            key: reduce(schema["properties"][key], [v[key] for v in mappings if key in v])
            for key in sorted(used)
        }
        found["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        inner = [child for value in mappings for child in value.values()]
        found["additionalProperties"] = reduce(schema["additionalProperties"], inner)
    if "items" in schema:
        inner = [child for value in values if isinstance(value, list) for child in value]
        found["items"] = reduce(schema["items"], inner)
    return found


def load(name: str) -> Any:
    return yaml.safe_load((MANIFESTS / f"{name}.yaml").read_text(encoding="utf-8"))


def top_level(spec: dict[str, Any], version: str, kind: str) -> dict[str, Any]:
    name = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    return {
        "type": "object",
        "properties": {
            "apiVersion": {"const": version},
            "kind": {"const": kind},
            "metadata": {**name, "additionalProperties": False},
            "spec": spec,
        },
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "additionalProperties": False,
    }


def main(directory: Path) -> None:
    """Write the reduced copy."""
    sources, schemas = {}, {}
    specs: dict[str, Any] = {}
    for name, kind in (("raycluster", "RayCluster"), ("rayjob", "RayJob")):
        file = directory / f"ray.io_{name}s.yaml"
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        (version,) = (v for v in content["spec"]["versions"] if v["storage"])
        generator = content["metadata"]["annotations"]["controller-gen.kubebuilder.io/version"]
        sources[file.name] = {
            "version": f"{content['spec']['group']}/{version['name']}",
            "controller-gen": generator,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        specs[name] = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
        reduced = reduce(specs[name], [load(name)["spec"]])
        schemas[kind] = top_level(reduced, f"ray.io/{version['name']}", kind)
    # Kubernetes' own claim is in there as well: as the template of a pod's ephemeral volume.
    claim: Any = specs["raycluster"]
    for key in (
        *("headGroupSpec", "template", "spec", "volumes"),
        *("ephemeral", "volumeClaimTemplate", "spec"),
    ):
        claim = (claim.get("items") or claim)["properties"][key]
    kind = "PersistentVolumeClaim"
    schemas[kind] = top_level(reduce(claim, [load("pvc")["spec"]]), "v1", kind)
    origin = "KubeRay's CustomResourceDefinitions (github.com/ray-project/kuberay), reduced"
    REDUCED.write_text(
        json.dumps(
            {
                "origin": f"{origin} by tests/cluster/reduce_schema.py",
                "licence": "Apache-2.0",
                "sources": sources,
                "schemas": schemas,
            },
            indent=1,
        )
        + "\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
