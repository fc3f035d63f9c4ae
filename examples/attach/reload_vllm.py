"""A hook of `arm-ray attach`: has a running `vllm serve` take over the model that was published.

Start the server with the endpoints and the worker that this needs; arm_ray is installed there too:

    VLLM_SERVER_DEV_MODE=1 vllm serve BASE \
        --worker-extension-cls arm_ray.evaluation.vllm_worker.WeightsExtension

and name this program in the configuration of attach:

    publish:
      hook: {command: [python, examples/attach/reload_vllm.py, "http://127.0.0.1:8000"]}

Requests that run are finished first, new ones wait meanwhile. The development endpoints let whoever
reaches the port change the model: keep it on an internal interface.
"""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

TIMEOUT_S = 600.0


def call(server: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """POST to the server; returns what it answers, as a JSON object."""
    request = urllib.request.Request(  # noqa: S310 -- the address is the user's own
        server + path,
        json.dumps(body or {}).encode(),
        {"Content-Type": "application/json"},
        method="POST",
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
            text = answer.read().decode()
    except urllib.error.HTTPError as error:
        hint = "; is VLLM_SERVER_DEV_MODE=1 set there?" if error.code == 404 else ""
        said = error.read().decode(errors="replace")[:300]
        raise SystemExit(f"{path}: HTTP {error.code}{hint}: {said}") from None
    except OSError as error:
        raise SystemExit(f"{server}: {error}") from None
    found = json.loads(text) if text else {}
    return found if isinstance(found, dict) else {"answer": found}


def reload(server: str, published: dict[str, Any]) -> str:
    """Have a server serve a published model; returns the version that it says it serves."""
    version = f"step-{published['step']:06d}"
    call(server, "/pause?mode=wait")
    # If this fails half-way, the server has neither model: it stays paused rather than answer.
    call(server, "/collective_rpc", {"method": "take_weights", "args": [published["path"]]})
    if not call(server, "/reset_prefix_cache").get("success"):
        raise SystemExit("the prefix cache could not be emptied; the server stays paused")
    call(server, "/update_weight_version", {"new_version": version})
    call(server, "/resume")
    return version


def main() -> None:
    """Read what was published on standard input, and reload the server on the command line."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: reload_vllm.py http://HOST:PORT  < published.json")
    published = json.load(sys.stdin)
    if not published["is_best"]:
        print(f"step {published['step']} is not the best model; the server keeps what it has")
        return
    server = sys.argv[1].rstrip("/")
    if urllib.parse.urlsplit(server).scheme not in ("http", "https"):
        raise SystemExit(f"{server}: not an http address")
    print(f"{server} serves {reload(server, published)}")


if __name__ == "__main__":
    main()
