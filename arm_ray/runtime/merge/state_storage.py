"""Where merged states lie that are written: in the run directory, or in parts on the nodes.

States that are not written (`arm_ray.planning.state_life`) are in the memory of their shards alone.

| | `shared` | `per_node` |
|---|---|---|
| a group of a state that is written | in the run directory | on its node, in `runtime.scratch` |
| a whole state in the run directory | once all have written it | if it is wanted there |
| `model/` | each shard writes its tensors in place | each sends them to their places |
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from arm_ray.checkpoints import states
from arm_ray.checkpoints.weight_file import SharedWeightFile
from arm_ray.config import MergeConfig, state_settings
from arm_ray.errors import ArmRayError, PlacementError
from arm_ray.runtime.cluster.calls import NODE_FILES, get_results
from arm_ray.runtime.cluster.node_files import FilesOnNodes, NodeFiles, files_on_nodes
from arm_ray.runtime.cluster.nodes import node_names, this_node
from arm_ray.runtime.inputs import MergeInputs
from arm_ray.runtime.output.run_directory import RunDirectory
from arm_ray.runtime.shards.files import RemoteGroup, ShardFiles
from arm_ray.runtime.shards.layer_shard import BESIDE, CONTROL, LayerShard, call_files, call_states
from arm_ray.runtime.shards.made_states import MadeStates, Written
from arm_ray.runtime.shards.placement import ShardGang
from arm_ray.runtime.shards.spec import ShardSpec

if TYPE_CHECKING:
    from ray import ObjectRef

_P = ParamSpec("_P")
_R = TypeVar("_R")


class StateStorage:
    """Merged states in the run directory, which all nodes see.

    Args:
        run: The run directory.
        inputs: The checked checkpoints.
        gang: The layer shards' actors, placed.
        specs: What each of them was given, in the same order.
    """

    def __init__(
        self, run: RunDirectory, inputs: MergeInputs, gang: ShardGang, specs: Sequence[ShardSpec]
    ) -> None:
        self._run, self._inputs, self._gang, self._specs = run, inputs, gang, specs
        self._groups = range(len(inputs.layout.groups))

    @property
    def is_shared(self) -> bool:
        """Whether the shards write into the run directory."""
        return True

    def has_group(self, iteration: int, group: int) -> bool:
        """Whether a layer group of a merged state is whole and on disk somewhere."""
        directory = states.state_directory(self._run.path, iteration)
        return states.group_file(directory, group).is_file()

    def has_state(self, iteration: int) -> bool:
        """Whether all layer groups of a merged state are."""
        return all(self.has_group(iteration, group) for group in self._groups)

    def bring(self, iterations: Iterable[int], merged: Iterable[tuple[int, int]]) -> None:
        """Have each shard see its groups of some states, and of some iterations in parts.

        Args:
            iterations: Whole merged states that are going to be read.
            merged: Iteration and layer group of what is merged already of unfinished iterations.
        """

    def gather(self, iteration: int) -> None:
        """Have all groups of a merged state in the run directory."""

    def discard(self, iteration: int) -> None:
        """Remove a merged state everywhere."""
        states.discard_state(self._run.path, iteration)

    def wrote(self, iteration: int) -> None:
        """Take note that all shards have written their groups of a state."""

    def forget_pruned(self) -> None:
        """Remove from the nodes what is no longer in the run directory."""

    def settle(self, iteration: int, held: Collection[int]) -> None:
        """Have the shards let go of what nothing needs, of the states up to an iteration.

        Args:
            iteration: The last one that is finished; the merge goes on after it.
            held: Iterations whose states may be needed, although no later one reads them.
        """
        get_results(self._call(CONTROL, MadeStates.settle, iteration, frozenset(held)))

    def writing(self, iteration: int) -> list[ObjectRef[Written]]:
        """What ends once all shards have written their groups of a state."""
        return self._call(BESIDE, MadeStates.written, iteration)

    def write(self, iteration: int) -> list[ObjectRef[Written]]:
        """Have all shards write what they have in memory of a state, and not on disk yet."""
        return self._call(BESIDE, MadeStates.write, iteration)

    def quiet(self) -> None:
        """Wait until no shard writes any more, whatever became of it."""
        get_results(self._call(BESIDE, MadeStates.quiet))

    def _call(
        self,
        options: Mapping[str, Any],
        method: Callable[Concatenate[MadeStates, _P], _R],
        *args: _P.args,
        **kwargs: _P.kwargs,
    ) -> list[ObjectRef[_R]]:
        """Call a method of the `MadeStates` of all shards; returns at once."""
        return [call_states(actor, options, method, *args, **kwargs) for actor in self._gang.actors]

    def write_model(self, files: Sequence[states.ExportFile], iteration: int) -> None:
        """Write the final model's weight files from a merged state, by all shards at once.

        Args:
            files: What goes where.
            iteration: Of the state.
        """
        partial = self._run.partial_model
        partial.mkdir()
        model = [SharedWeightFile(partial / file.name, file.specs) for file in files]
        for file in model:
            file.create()
        self._fill(iteration, model)
        for file in model:
            file.sync()

    def _fill(self, iteration: int, model: Sequence[SharedWeightFile]) -> None:
        get_results(self._call({}, MadeStates.fill, iteration, model))


class NodeStorage(StateStorage):
    """Merged states in parts, on the nodes of their shards.

    Args:
        config: Of the merge.
        known_nodes: Ids of further nodes that may have states of earlier shards.
    """

    def __init__(
        self,
        run: RunDirectory,
        inputs: MergeInputs,
        gang: ShardGang,
        specs: Sequence[ShardSpec],
        config: MergeConfig,
        known_nodes: Iterable[str],
    ) -> None:
        super().__init__(run, inputs, gang, specs)
        self._home = this_node()
        # Taken once: at the end an input may be gone.
        self._fingerprints = inputs.fingerprints
        self._settings = config.runtime
        self._name = _scratch_name(run, self._fingerprints, config)
        self._known_nodes = tuple(known_nodes)
        self._files = FilesOnNodes({}, ())
        self._roots: dict[str, Path] = {}
        self._on_nodes: dict[str, set[tuple[int, int]]] = {}

    def open(self) -> None:
        """Start what serves each node's files, and tell the shards to work on their own disks.

        Raises:
            NotACheckpointError: A checkpoint is not on a node, and of a format that is not fetched.
            ShardLostError: A node is gone.
        """
        nodes = [self._home, *self._gang.nodes]
        self._files = files_on_nodes(nodes, self._known_nodes, self._settings.scratch, self._name)
        origin, known = self._files[self._home], self._fingerprints
        self._roots = self._files.ask(NodeFiles.ready)
        get_results(
            [
                shard.call(LayerShard.use_scratch, self._name, origin, known)
                for shard in self._gang.actors
            ]
        )
        self._on_nodes = self._files.ask(NodeFiles.groups)

    @property
    def is_shared(self) -> bool:
        """Whether the shards write into the run directory."""
        return False

    def has_group(self, iteration: int, group: int) -> bool:
        """Whether a layer group of a merged state is whole and on disk somewhere."""
        key = (iteration, group)
        return any(key in found for found in self._on_nodes.values()) or self._in_run(*key)

    def _in_run(self, iteration: int, group: int) -> bool:
        return super().has_group(iteration, group)

    def bring(self, iterations: Iterable[int], merged: Iterable[tuple[int, int]]) -> None:
        """Have each shard see its groups of some states, and of some iterations in parts."""
        wanted = {(t, group) for t in iterations for group in self._groups} | set(merged)
        refs = []
        pairs = zip(self._gang.actors, self._gang.nodes, self._specs, strict=True)
        for actor, node, spec in pairs:
            here = self._on_nodes[node]
            absent = [key for key in sorted(wanted - here) if key[1] in spec.groups]
            if absent:
                groups = [self._on_another_node(*key) for key in absent]
                refs.append(call_files(actor, ShardFiles.fetch_groups, groups))
                here |= set(absent)
        get_results(refs)

    def _on_another_node(self, iteration: int, group: int) -> RemoteGroup:
        in_run = states.group_file(states.state_directory(self._run.path, iteration), group)
        if in_run.is_file():
            return RemoteGroup(iteration, group, self._files[self._home], in_run)
        node = next(n for n, found in self._on_nodes.items() if (iteration, group) in found)
        directory = states.state_directory(self._roots[node], iteration)
        return RemoteGroup(iteration, group, self._files[node], states.group_file(directory, group))

    def gather(self, iteration: int) -> None:
        """Have all groups of a merged state in the run directory."""
        directory = states.state_directory(self._run.path, iteration)
        directory.mkdir(parents=True, exist_ok=True)
        home = self._files[self._home]
        get_results(
            [
                # Beside the next iterations, which the shards are working on.
                call_files(actor, ShardFiles.deliver, iteration, group, home, directory)
                for actor, spec in zip(self._gang.actors, self._specs, strict=True)
                for group in spec.groups
                if not states.group_file(directory, group).is_file()
            ]
        )

    def discard(self, iteration: int) -> None:
        """Remove a merged state everywhere."""
        super().discard(iteration)
        self._forget([iteration])

    def forget_pruned(self) -> None:
        """Remove from the nodes what is no longer in the run directory."""
        kept = states.state_directories(self._run.path).keys()
        known = sorted({t for found in self._on_nodes.values() for t, _ in found})
        gone = [t for t in known if t not in kept and t <= self._run.last_iteration]
        if gone:
            self._forget(gone)

    def _forget(self, iterations: list[int]) -> None:
        self._files.ask(NodeFiles.discard, iterations)
        for found in self._on_nodes.values():
            found -= {key for key in found if key[0] in iterations}

    def wrote(self, iteration: int) -> None:
        """Take note that all shards have written their groups of a state."""
        for node, spec in zip(self._gang.nodes, self._specs, strict=True):
            self._on_nodes[node] |= {(iteration, group) for group in spec.groups}

    def write_model(self, files: Sequence[states.ExportFile], iteration: int) -> None:
        """Write the final model's weight files from a merged state."""
        if not all(self._in_run(iteration, group) for group in self._groups):
            super().write_model(files, iteration)
            return
        partial, home = self._run.partial_model, self._files[self._home]
        partial.mkdir()
        group_of = {n: g.index for g in self._inputs.layout.groups for n in g.tensors}
        state = states.state_directory(self._run.path, iteration)
        exported = [home.call(NodeFiles.export, partial, file, state, group_of) for file in files]
        get_results(exported, NODE_FILES)

    def _fill(self, iteration: int, model: Sequence[SharedWeightFile]) -> None:
        home = self._files[self._home]
        get_results(self._call({}, MadeStates.assemble, iteration, model, home))

    def close(self, *, is_complete: bool) -> None:
        """Let go of what belongs to the gang; of a complete run, of all that is on the nodes."""
        # A complete run has nothing more to lose with a node.
        with contextlib.suppress(ArmRayError):
            if is_complete:
                self._files.ask(NodeFiles.remove, list(self._fingerprints.values()))
        self._files.end()


def _scratch_name(run: RunDirectory, fingerprints: Mapping[str, str], config: MergeConfig) -> str:
    """The run's directory on each node: of this run, its settings and its inputs alone."""
    content = [run.id, state_settings(config), config.runtime.layers_per_group, fingerprints]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


@contextlib.contextmanager
def storage_of(
    config: MergeConfig,
    run: RunDirectory,
    inputs: MergeInputs,
    gang: ShardGang,
    specs: Sequence[ShardSpec],
    known_nodes: Iterable[str] = (),
) -> Iterator[StateStorage]:
    """Decide where states lie (`runtime.storage`), and check that each shard can read its part.

    Args:
        config: Of the merge.
        run: The run directory.
        inputs: The checked checkpoints.
        gang: The layer shards' actors, placed.
        specs: What each of them was given, in the same order.
        known_nodes: Ids of further nodes that may have states of earlier shards.

    Raises:
        PlacementError: A node does not see the run directory or a checkpoint, and was said to.
        NotACheckpointError: A checkpoint is not on a node, and of a format that is not fetched.
    """
    wanted = config.runtime.storage
    blind = [] if wanted == "per_node" else _blind(run, gang)
    if wanted == "per_node" or (wanted == "auto" and blind):
        storage = NodeStorage(run, inputs, gang, specs, config, known_nodes)
        try:
            storage.open()
            yield storage
        finally:
            storage.close(is_complete=run.is_complete)
        return
    if blind:
        raise PlacementError(
            "a node does not see the output directory",
            where=", ".join(node_names(blind)),
            got=f"no {run.path} with what was written there on {socket.gethostname()}",
            expected="one directory under the same path on all nodes (runtime.storage: shared)",
            hint="mount it there, or set runtime.storage to per_node",
        )
    absent = get_results([call_files(shard, ShardFiles.missing) for shard in gang.actors])
    for node, missing in zip(gang.nodes or ["this process"], absent, strict=True):
        if missing:
            raise PlacementError(
                "a node does not have the model files",
                where=", ".join(node_names([node])),
                got=f"no {missing[0]}" + (f", and {len(missing) - 1} more" * (len(missing) > 1)),
                expected="the checkpoints under the same paths as on the driver's node",
                hint="mount or copy them there, or set runtime.storage to per_node, which fetches "
                "what a node lacks",
            )
    yield StateStorage(run, inputs, gang, specs)
    if run.is_complete and not all(given.is_local for given in inputs.checkpoints.values()):
        with contextlib.suppress(ArmRayError):
            get_results([call_files(shard, ShardFiles.remove_copies) for shard in gang.actors])


def _blind(run: RunDirectory, gang: ShardGang) -> list[str]:
    """Nodes with shards that do not see the run directory."""
    if not gang.nodes:
        return []
    home = this_node()
    asked = {node: a for node, a in zip(gang.nodes, gang.actors, strict=True) if node != home}
    if not asked:
        return []
    token = uuid.uuid4().hex
    file = run.path / f".seen-{token[:12]}"
    file.write_text(token, encoding="utf-8")
    try:
        refs = [call_files(shard, ShardFiles.sees, file, token) for shard in asked.values()]
        seen = get_results(refs)
    finally:
        file.unlink(missing_ok=True)
    return [node for node, sees in zip(asked, seen, strict=True) if not sees]
