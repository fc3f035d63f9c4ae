"""How hidden states go from shard to shard: Ray's direct tensor transport, or the object store."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arm_ray.runtime.cluster.actors import Handle

Transport = Literal["gloo", "nccl", "object_store"]

_logger = logging.getLogger(__name__)


def choose_transport(wanted: str, device: str, num_shards: int) -> Transport:
    """The transport for a device.

    Args:
        wanted: `auto`, `direct` or `object_store`, from the configuration.
        device: `cpu` or `cuda`.
        num_shards: With one shard nothing is sent.
    """
    if num_shards == 1 or wanted == "object_store":
        return "object_store"
    return "nccl" if device == "cuda" else "gloo"


def prepare_transport() -> None:
    """Have what Ray's direct transport keeps in this actor made, by one thread.

    Ray makes it at its first use, without a lock. An actor's first tensor is received by one thread
    and waited for by another; where each made its own, the tensor is never found, and Ray gives up
    after a minute (Ray 2.60; see `docs/ray-lost-tensor.md`).
    """
    try:
        from ray.experimental import wait_tensor_freed

        # Of no object: it is free already.
        wait_tensor_freed(torch.empty(0), timeout=0)
    except Exception as error:  # an alpha interface: a lost tensor costs another start
        _logger.debug("the direct transport was not prepared: %s", error)


def join_transport(shards: Sequence[Handle[Any]], transport: Transport) -> str | None:
    """Make the collective group that a direct transport needs.

    Returns:
        None, or why it cannot be made, so that the caller can fall back to the object store.
    """
    try:
        from ray.experimental.collective import create_collective_group

        create_collective_group([shard.actor for shard in shards], backend=transport)
    except Exception as error:  # an alpha interface: absent, renamed, or a missing library
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None


def leave_transport(shards: Sequence[Handle[Any]], transport: Transport) -> None:
    """Forget the collective group of actors that are about to end."""
    if transport == "object_store":
        return
    try:
        from ray.experimental.collective import destroy_collective_group, get_collective_groups

        for group in get_collective_groups([shard.actor for shard in shards], backend=transport):
            destroy_collective_group(group)
    except Exception as error:  # the actors may be gone, and the group with them
        _logger.debug("the collective group was not destroyed: %s", error)


def pack_tensor(tensor: Tensor) -> NDArray[np.generic]:
    """A tensor as an array that Ray stores without pickling; 16-bit floats travel as int16."""
    tensor = tensor.detach().cpu().contiguous()
    array: NDArray[np.generic] = (
        tensor.view(torch.int16) if tensor.dtype.itemsize == 2 else tensor
    ).numpy()
    return array


def unpack_tensor(array: NDArray[np.generic], dtype: torch.dtype) -> Tensor:
    """The tensor that `pack_tensor` packed. Copies, because Ray's arrays are read-only."""
    return torch.from_numpy(array.copy()).view(dtype)
