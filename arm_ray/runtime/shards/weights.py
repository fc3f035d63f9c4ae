"""The tensors of the states that one shard reads, kept where `runtime.residency` says.

| residency | stored weights of the states in use | for the forward pass |
|---|---|---|
| `device` | on the device, from the first use to the last run; then on the host | a chunk, cast |
| `host` | in host memory, from the first use to the last | one layer group at a time |
| `disk` | memory-mapped; one group is read while another computes | one layer group at a time |

On a CPU, `device` leaves the base and the candidates memory-mapped: the page cache is the memory.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from arm_ray.checkpoints import states
from arm_ray.checkpoints.huggingface import Checkpoint
from arm_ray.checkpoints.validation import check_second_moments
from arm_ray.errors import about
from arm_ray.merging.alignment import aligned
from arm_ray.model.group import Decoder
from arm_ray.model.layout import ModelLayout
from arm_ray.model.partition import Residency
from arm_ray.runtime.shards.meter import RateLimit
from arm_ray.schedule import BASE, iteration_of

# Bytes: of the beginning of each tensor, and of the least mapping for a group of them.
_ALIGNMENT, _LEAST_MAPPING = 64, 1 << 20


class WeightStore:
    """Reads, caches and releases the weights of a shard's layer groups.

    Args:
        layout: The model.
        checkpoints: State name -> checkpoint, for the base and the candidates.
        run: The run directory, which holds the merged states.
        decoder: What runs the forward passes: on its device the weights are computed with.
        residency: Where stored weights live meanwhile.
        second_moments: Name of a candidate -> Adam's second moments, where an operator wants them.
            They live where the candidate does, and as long.
        disk: What is read is counted there, group by group.

    Attributes:
        device: Where the weights are computed with.
        residency: Where stored weights live.
    """

    def __init__(
        self,
        layout: ModelLayout,
        checkpoints: Mapping[str, Checkpoint],
        run: Path,
        decoder: Decoder,
        residency: Residency,
        second_moments: Mapping[str, Checkpoint] | None = None,
        disk: RateLimit | None = None,
    ) -> None:
        self._decoder = decoder
        self._layout, self._checkpoints, self._run = layout, checkpoints, run
        self.device, self.residency = decoder.device, residency
        self._compute_dtype = decoder.dtype
        self._second_moments = second_moments or {}
        self._disk = disk or RateLimit(None)
        self._stored: dict[tuple[str, int], dict[str, Tensor]] = {}
        self._moments: dict[tuple[str, int], dict[str, Tensor]] = {}
        self._compute: dict[tuple[str, int], dict[str, Tensor]] = {}
        self._ahead: dict[tuple[str, int], Future[dict[str, Tensor]]] = {}
        # Pieces of one group are merged by several threads.
        self._lock, self._forming = threading.Lock(), threading.Lock()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")

    def layers(self, state: str, group: int) -> dict[str, Tensor]:
        """The group's decoder-layer tensors on the device as `Decoder.form` gives them."""
        key = (state, group)
        if key not in self._compute:
            with self._forming:
                if key not in self._compute:
                    self._compute[key] = self._formed(self._group(state, group))
        return self._compute[key]

    def _formed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._decoder.form(
            [name for name in tensors if self._layout.is_layer_tensor(name)],
            lambda name, dtype: _aligned(self._moved(tensors[name], dtype)),
        )

    def embed(self, state: str, input_ids: Tensor) -> Tensor:
        """Hidden states before the first layer `[batch, tokens, hidden]`; looks up, then casts."""
        table = self._group(state, 0)[self._layout.embedding]
        rows = nn.functional.embedding(input_ids.flatten().to(table.device), table)
        batch, tokens = input_ids.shape
        return self._decoder.embed(self._moved(rows, self._compute_dtype), (batch, tokens))

    def in_compute_dtype(self, state: str, group: int, name: str) -> Tensor:
        """One whole tensor outside of the layers, on the device, as the forward pass takes it."""
        return self.rows(state, group, name, slice(None)).to(self._compute_dtype)

    def hold(self, state: str, group: int, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors of a state that is on no disk, in the compute dtype, until `let_go`."""
        in_layers = {n: t for n, t in tensors.items() if self._layout.is_layer_tensor(n)}
        outside = {name: tensor for name, tensor in tensors.items() if name not in in_layers}
        if in_layers:
            self._compute[state, group] = self._formed(in_layers)
        if outside:
            self._stored[state, group] = self._stored.get((state, group), {}) | outside

    def let_go(self, state: str, group: int, name: str | None = None) -> None:
        """Release what `hold` has taken, or one tensor of it outside of the layers."""
        if name is not None:
            self._stored[state, group].pop(name)
            return
        self._compute.pop((state, group), None)
        self._stored.pop((state, group), None)

    def rows(self, state: str, group: int, name: str, rows: slice) -> Tensor:
        """Rows of one tensor, float32, on the device."""
        return self._moved(rows_of(self._group(state, group)[name], rows), torch.float32)

    def second_moments(self, state: str, group: int, name: str, rows: slice) -> Tensor:
        """Rows of the second moments of one tensor of a candidate, float32, on the device.

        Raises:
            CorruptCheckpointError: One of them is negative or not finite.
        """
        key = (state, group)
        source = self._second_moments[state]
        if key not in self._moments:
            with self._lock:
                if key not in self._moments:
                    names = self._layout.groups[group].tensors
                    self._moments[key] = self._placed(source.read(names))
        found = self._moved(rows_of(self._moments[key][name], rows), torch.float32)
        where = f"second moments of {state}: {source.tensors[name].file}"
        with about(state):
            check_second_moments(found, name, rows.start or 0, where)
        return found

    def as_computed(
        self, state: str, group: int, name: str, whole: Tensor, expert: int | None = None
    ) -> Tensor:
        """A layer's weight as the forward pass used it, float32.

        Args:
            state: The state.
            group: Its layer group.
            name: The weight.
            whole: What `rows` gave for all of it; taken where the forward pass rounded nothing.
            expert: Which of the experts in the weight that is; None: the weight is a matrix.
        """
        computed = self.layers(state, group).get(name)
        if computed is not None and expert is not None:
            computed = computed[expert]
            if name in self._layout.transposed:
                computed = computed.T
        if computed is not None and computed.dtype == torch.float32:
            return computed
        dtype = self._compute_dtype if computed is None else computed.dtype
        if dtype == torch.float32 or self._group(state, group)[name].dtype == dtype:
            return whole
        # A part of what the forward pass took was rounded as this is.
        return (whole.to(dtype) if computed is None else computed).to(torch.float32)

    def keep(self, state: str, group: int, tensors: Mapping[str, Tensor]) -> None:
        """Take over a group of a state, in memory where weights live (`host_memory`)."""
        self._stored[state, group] = dict(tensors)

    def whole(self, state: str, group: int) -> Mapping[str, Tensor]:
        """All tensors of a group of a state, as they are stored, where they live."""
        return self._group(state, group)

    def stored(self, group: int) -> list[str]:
        """Names of the states whose weights of a group are in memory."""
        return [state for state, index in self._stored if index == group]

    def read_ahead(self, wanted: Iterable[str], group: int) -> None:
        """Start reading a group of some states, where they live on disk."""
        if self.residency != "disk":
            return
        for state in wanted:
            key = (state, group)
            if key not in self._stored and key not in self._ahead:
                self._ahead[key] = self._reader.submit(self._read, state, group)

    def release(self, group: int, inputs: Iterable[str], keep: Callable[[str], bool]) -> None:
        """Let go of a group: of its compute copies, and of states that are not read again.

        Args:
            group: The layer group, just merged.
            inputs: States that the forward pass used.
            keep: Whether a later iteration reads a state.
        """
        for state in inputs:
            self._compute.pop((state, group), None)
        for cache in (self._stored, self._moments):
            for key in [key for key in cache if key[1] == group]:
                if self.residency == "disk" or not keep(key[0]):
                    del cache[key]

    def release_unless_resident(self, group: int, *, mapped: bool = False) -> None:
        """Let go of a group for now: of compute copies, and of what was read from disk.

        Args:
            group: The layer group.
            mapped: Also of the base and the candidates on a CPU, which are memory-mapped: the page
                cache keeps what was read of them, and gives it up when others need the memory.
        """
        if self.residency == "device":
            if mapped and self.device.type == "cpu":
                for key in [key for key in self._stored if key[1] == group]:
                    if iteration_of(key[0]) is None:
                        del self._stored[key]
            return
        caches = [self._compute]
        if self.residency == "disk":
            caches += [self._stored, self._moments]
        for cache in caches:
            for key in [key for key in cache if key[1] == group]:
                del cache[key]

    def _group(self, state: str, group: int) -> dict[str, Tensor]:
        key = (state, group)
        if key not in self._stored:
            with self._lock:
                if key not in self._stored:
                    ahead = self._ahead.pop(key, None)
                    self._stored[key] = ahead.result() if ahead else self._read(state, group)
        return self._stored[key]

    def _read(self, state: str, group: int) -> dict[str, Tensor]:
        names = self._layout.groups[group].tensors
        iteration = iteration_of(state)
        if iteration is None:
            mapped = self._checkpoints[state].read(names)
        else:
            directory = states.state_directory(self._run, iteration)
            mapped = states.read_group(directory, group, names)
        self._disk.spend(sum(tensor.nbytes for tensor in mapped.values()))
        return self._placed(mapped)

    def _placed(self, mapped: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of one group, from a file to where they live."""
        if self.residency == "device":
            return {name: tensor.to(self.device) for name, tensor in mapped.items()}
        if self.residency == "host":
            return _on_host(mapped, self.device)
        # Layers are read here and now, perhaps ahead of their turn. The embedding and the head stay
        # mapped: they are larger than a layer, and used a few rows at a time.
        layers = {name: t for name, t in mapped.items() if self._layout.is_layer_tensor(name)}
        return {**mapped, **_on_host(layers, self.device)}

    def _moved(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """On the device in a dtype; cast there, because torch would cast on the host first."""
        moved = tensor if tensor.device == self.device else tensor.to(self.device)
        return moved if moved.dtype == dtype else moved.to(dtype)


def rows_of(tensor: Tensor, rows: slice) -> Tensor:
    """Rows of a tensor; a single number is its own only row."""
    return tensor[rows] if tensor.ndim else tensor


def host_memory(
    wanted: Mapping[str, tuple[Sequence[int], torch.dtype]], device: torch.device
) -> dict[str, Tensor]:
    """Host memory for tensors that come and go together: those of a layer group of a state.

    On a CPU it is a mapping of its own, which goes back to the system with them. What malloc gets
    back of the candidates has holes that are too small for the float32 states after them: a shard
    with weights in host memory took a fifth more for it.

    Args:
        wanted: Name -> shape and dtype.
        device: What they are computed with; a GPU copies page-locked memory several times faster.
    """
    sizes = {name: prod(shape) * dtype.itemsize for name, (shape, dtype) in wanted.items()}
    rounded = {name: -(-size // _ALIGNMENT) * _ALIGNMENT for name, size in sizes.items()}
    total = sum(rounded.values())
    if device.type != "cpu" or total < _LEAST_MAPPING:
        pinned = device.type == "cuda"
        return {
            name: torch.empty(tuple(shape), dtype=dtype, pin_memory=pinned)
            for name, (shape, dtype) in wanted.items()
        }
    memory = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    found, offset = {}, 0
    for name, (shape, dtype) in wanted.items():
        if sizes[name]:
            part = torch.frombuffer(memory, dtype=dtype, count=prod(shape), offset=offset)
            found[name] = part.reshape(tuple(shape))
        else:
            found[name] = torch.empty(tuple(shape), dtype=dtype)
        offset += rounded[name]
    return found


def put_aside(store: WeightStore, group: int, chosen: Callable[[str], bool]) -> None:
    """Move a group of some states from a GPU to host memory: they are read, but not run.

    Args:
        store: Where they are.
        group: The layer group.
        chosen: Which states.
    """
    if store.residency != "device" or store.device.type == "cpu":
        return
    for state in filter(chosen, store.stored(group)):
        tensors = store.whole(state, group)
        if any(tensor.device == store.device for tensor in tensors.values()):
            store.keep(state, group, _on_host(tensors, store.device))


def share_base(left: WeightStore, right: WeightStore, groups: Iterable[int]) -> None:
    """Give the base's weights that one store has in memory to another, of the same model."""
    for group in groups:
        if BASE in left.stored(group):
            right.keep(BASE, group, left.whole(BASE, group))


def _on_host(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Copies of a group's tensors in host memory."""
    wanted = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    copies = host_memory(wanted, device)
    return {name: copy.copy_(tensors[name]) for name, copy in copies.items()}


def _aligned(tensor: Tensor) -> Tensor:
    """As `aligned`, of what MKL multiplies by: it does not multiply in bfloat16."""
    return tensor if tensor.dtype == torch.bfloat16 else aligned(tensor)
