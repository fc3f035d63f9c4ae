"""Shows how Ray's direct tensor transport loses an actor's first tensor: docs/ray-lost-tensor.md.

::

    python examples/ray/lost_tensor.py            # two threads at the same place, and lost tensors
    python examples/ray/lost_tensor.py --prepared # the same with the workaround: nothing is lost

Needs Ray and torch, and nothing of arm_ray.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from typing import Any

# Ray waits a minute by default. Read when Ray is imported.
os.environ["RAY_rdt_fetch_fail_timeout_milliseconds"] = "5000"  # noqa: SIM112

import ray
import torch
from ray.experimental import wait_tensor_freed
from ray.experimental.collective import create_collective_group
from ray.experimental.rdt.rdt_manager import RDTManager


def first_uses(count: int) -> int:
    """How often two threads that use the manager first are given two different ones."""
    from ray._private.worker import global_worker

    # Threads take turns more often than once in 5 ms: what is rare otherwise is seen at once.
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    different = 0
    for _ in range(count):
        global_worker._rdt_manager = None
        together = threading.Barrier(2)
        found: list[Any] = []

        def use(together: threading.Barrier = together, found: list[Any] = found) -> None:
            together.wait()
            found.append(global_worker.rdt_manager)

        threads = [threading.Thread(target=use) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        different += found[0] is not found[1]
    sys.setswitchinterval(before)
    return different


class Peer:
    """Makes a tensor, or takes one.

    Args:
        prepared: Whether the manager is made before there is a second thread that uses it.
    """

    def __init__(self, prepared: bool) -> None:
        make: Any = RDTManager.__init__

        def slowly(manager: RDTManager) -> None:
            # What a busy machine does now and then: the other thread runs meanwhile.
            time.sleep(0.2)
            make(manager)

        RDTManager.__init__ = slowly  # type: ignore[method-assign]
        if prepared:
            wait_tensor_freed(torch.empty(0), timeout=0)

    @ray.method(tensor_transport="gloo")
    def make(self) -> torch.Tensor:
        """A tensor that stays in this actor until it is sent."""
        return torch.ones(8)

    def take(self, tensor: torch.Tensor) -> float:
        """The sum of a tensor that was sent."""
        return float(tensor.sum())


def is_lost(prepared: bool) -> bool:
    """Whether the first tensor between two new actors is lost."""
    options: dict[str, Any] = {"enable_tensor_transport": True, "num_cpus": 0}
    actor: Any = ray.remote(**options)(Peer)
    peers = [actor.remote(prepared) for _ in range(2)]
    create_collective_group(peers, backend="gloo")
    try:
        assert ray.get(peers[1].take.remote(peers[0].make.remote())) == 8.0
    except ray.exceptions.RayError as error:
        print("  lost:", str(error).strip().splitlines()[-1])
        return True
    finally:
        for peer in peers:
            ray.kill(peer)
    return False


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prepared", action="store_true", help="with the workaround")
    parser.add_argument("--starts", type=int, default=4, help="of pairs of actors")
    given = parser.parse_args()
    different = first_uses(2000)
    print(f"Ray {ray.__version__}: {different} of 2000 first uses by two threads made two managers")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    lost = sum(is_lost(given.prepared) for _ in range(given.starts))
    print(f"{lost} of {given.starts} first tensors were lost")
    ray.shutdown()


if __name__ == "__main__":
    main()
