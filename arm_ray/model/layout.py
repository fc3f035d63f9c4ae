"""What tensors a model has, which of them are rotated, and in which layer group each one is."""

from __future__ import annotations

import pickle
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arm_ray.model.architecture import (
    EXPERT_COUNTS,
    EXPERTS_CHOSEN,
    architecture_of,
    expert_name,
)
from arm_ray.model.imports import import_model_classes
from arm_ray.model.remote_code import load_trusted

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Buffers that older versions of transformers stored; they follow from the configuration.
DERIVED = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
_SENT = "_sent_config"


@dataclass(frozen=True)
class LayerGroup:
    """Consecutive decoder layers, with the embedding or the head where they belong.

    Attributes:
        index: Position in the model, 0-based.
        first_layer: First decoder layer.
        end_layer: One past the last.
        tensors: Names of all tensors of the group, in the model's order.
        num_bytes: Their size in float32.
    """

    index: int
    first_layer: int
    end_layer: int
    tensors: tuple[str, ...]
    num_bytes: int


@dataclass(frozen=True)
class ModelLayout:
    """The tensors of a model, under their names in the files of the base.

    Attributes:
        config: The model's configuration.
        class_name: transformers' class of the model, as the base names it; None: the family's.
        shapes: Name -> shape of what is merged, in the model's order; a tied head is left out.
        rotated: Names of the weights of linear modules inside the decoder layers, and of experts.
        groups: The layer groups, in order.
        layer_numbers: Name -> decoder layer, 0-based, of the tensors inside the layers.
        embedding: Name of the embedding's weight.
        head: Names of the head's tensors; the embedding, where they are tied.
        tail: Names of the tensors between the last layer and the head: those of the last norm.
        tied_copy: What a copy of the embedding as the head is called in files; None: the head has
            weights of its own.
        unknown: Names of tensors of the base that the model does not have, merged or carried.
        carried: Name -> shape of tensors that are not merged, but copied from the base.
        experts: Names of the rotated weights that are an expert's of a mixture, `[d_out, d_in]`, or
            all experts', `[experts, d_out, d_in]`.
        blocks: Name -> output rows of each of the projections that a rotated weight holds one below
            the other (q, k and v; gate and up).
        no_forward: Why no forward passes can be run; None: they can.
        transposed: Names of the experts' weights that are `[experts, d_in, d_out]`.
        code: The directory of the model's own code, which is trusted; None: transformers has it.
    """

    config: PretrainedConfig
    class_name: str | None
    shapes: Mapping[str, tuple[int, ...]]
    rotated: frozenset[str]
    groups: tuple[LayerGroup, ...]
    layer_numbers: Mapping[str, int]
    embedding: str
    head: tuple[str, ...]
    tail: tuple[str, ...]
    tied_copy: str | None = None
    unknown: tuple[str, ...] = ()
    carried: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    experts: frozenset[str] = frozenset()
    blocks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    no_forward: str | None = None
    transposed: frozenset[str] = frozenset()
    code: Path | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Sent to an actor, it imports what its configuration's class needs when it is used.

        A shard that runs no forward passes never does, and starts in half the time.
        """
        content = dict(self.__dict__)
        content.pop("matrices", None)
        if "config" in content:
            content[_SENT] = pickle.dumps(content.pop("config"))
        return ModelLayout.__new__, (ModelLayout,), content

    def __getattr__(self, name: str) -> Any:
        sent = self.__dict__.get(_SENT)
        if name != "config" or sent is None:
            raise AttributeError(f"{type(self).__name__} has no {name}")
        import_model_classes()
        if self.code is not None:
            load_trusted(self.code)
        config = pickle.loads(sent)  # noqa: S301 - of `__reduce__` above, in another process of ours
        object.__setattr__(self, "config", config)
        return config

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.groups[-1].end_layer

    @property
    def text_config(self) -> Any:
        """The configuration of the decoder, which may be a part of the model's."""
        return self.config.get_text_config(decoder=True)

    @cached_property
    def matrices(self) -> frozenset[str]:
        """The rotated weights that are one matrix."""
        return frozenset(name for name in self.rotated if len(self.shapes[name]) == 2)

    def matrices_in(self, name: str) -> tuple[int, int, int]:
        """How many matrices a rotated weight holds, and `d_out` and `d_in` of each."""
        count, d_out, d_in = (1, *self.shapes[name])[-3:]
        return (count, d_in, d_out) if name in self.transposed else (count, d_out, d_in)

    def captured_as(self, name: str) -> Sequence[str]:
        """What the matrices in a weight are called in captured activations: its experts', or it."""
        if name not in self.rotated or len(self.shapes[name]) != 3:
            return (name,)
        return [expert_name(name, expert) for expert in range(self.shapes[name][0])]

    @property
    def inner_width(self) -> int:
        """The width of the MLP, or that of a decoder layer's widest matrix where none is told."""
        told = self._setting("intermediate_size")
        widths = (max(self.matrices_in(name)[1:]) for name in self.rotated)
        return told or max(widths, default=int(self.text_config.hidden_size))

    @property
    def attention_width(self) -> int:
        """The width of all queries of a token together."""
        hidden = int(self.text_config.hidden_size)
        heads, width = self._setting("num_attention_heads"), self._setting("head_dim")
        return heads * width if heads and width else hidden

    def _setting(self, key: str) -> int | None:
        """A number of the decoder's configuration, the largest where layers differ."""
        try:
            value = getattr(self.text_config, key, None)
        except RuntimeError:  # transformers has one for each layer, and none for all
            return None
        if isinstance(value, list | tuple):
            return max(map(int, value), default=None)
        return int(value) if value else None

    @property
    def expert_share(self) -> float:
        """The part of a layer's experts that a token is sent to."""
        config = self.text_config
        counts = [getattr(config, key, None) for key in EXPERT_COUNTS]
        chosen = [getattr(config, key, None) for key in EXPERTS_CHOSEN]
        total, most = (next((n for n in given if n), None) for given in (counts, chosen))
        return float(most) / float(total) if total and most else 1.0

    @property
    def token_rows(self) -> tuple[str, ...]:
        """Names of what has a row for each token beside the embedding."""
        copy = () if self.tied_copy is None else (self.tied_copy,)
        return tuple(name for name in (*self.head, *copy) if name != self.embedding)

    @property
    def has_own_head(self) -> bool:
        """Whether the head is not the embedding."""
        return self.tied_copy is None

    @property
    def head_group(self) -> int:
        """Index of the layer group that holds the head."""
        return len(self.groups) - 1 if self.has_own_head else 0

    def is_layer_tensor(self, name: str) -> bool:
        """Whether a tensor belongs to a decoder layer."""
        return name in self.layer_numbers

    def layer_of(self, name: str) -> int:
        """The decoder layer that a tensor is nearest to: its own, the first, or the last."""
        default = 0 if name == self.embedding else self.num_layers - 1
        return self.layer_numbers.get(name, default)

    def depth_of(self, name: str) -> float:
        """Of a tensor's layer: 0 the first, 1 the last."""
        return self.layer_of(name) / max(1, self.num_layers - 1)

    def rotated_as(self, ends: Collection[str]) -> frozenset[str]:
        """The rotated weights of the layers with one of these ends of their names."""
        return frozenset(n for n in self.rotated if any(n.endswith(f".{end}") for end in ends))

    def with_transposed(self, ends: Mapping[str, bool]) -> ModelLayout:
        """The same, where some experts' weights are `[experts, d_in, d_out]`.

        Args:
            ends: Ends of their names, and whether the outputs of each are two projections, one
                after the other.
        """
        found = {
            name: halves
            for end, halves in ends.items()
            for name in self.rotated_as([end])
            if len(self.shapes[name]) == 3
        }
        blocks = {name: rows for name, rows in self.blocks.items() if name not in found}
        for name in (name for name, halves in found.items() if halves):
            half = self.shapes[name][-1] // 2
            blocks[name] = (half, half)
        return replace(self, transposed=frozenset(found), blocks=blocks)

    def carrying(self, names: Collection[str]) -> ModelLayout:
        """The same, with some more tensors copied from the base and not merged."""
        groups = []
        for group in self.groups:
            kept = tuple(name for name in group.tensors if name not in names)
            groups.append(replace(group, tensors=kept, num_bytes=_bytes(kept, self.shapes)))
        return replace(
            self,
            shapes={n: shape for n, shape in self.shapes.items() if n not in names},
            rotated=self.rotated - set(names),
            groups=tuple(groups),
            carried={**self.carried, **{n: s for n, s in self.shapes.items() if n in names}},
        )


def model_layout(
    config: PretrainedConfig,
    layers_per_group: int = 1,
    stored: Mapping[str, tuple[int, ...]] | None = None,
    class_name: str | None = None,
) -> ModelLayout:
    """List a model's tensors by building it on the `meta` device, which holds no data.

    Args:
        config: The model's configuration.
        layers_per_group: Decoder layers of a group.
        stored: Name -> shape of the tensors in the base's files; None: they are as transformers
            would write them.
        class_name: transformers' class of the model; None: the family's.
    """
    architecture = architecture_of(config, class_name)
    written = architecture.written_shapes() if stored is None else stored
    weights, rest = architecture.weights(written)
    in_files = {name: weight for weight in weights for name in weight.names}
    shapes: dict[str, tuple[int, ...]] = {}
    layer_numbers: dict[str, int] = {}
    for name, shape in architecture.shapes.items():
        weight = in_files.get(name)
        number = architecture.layer_number(name)
        # One that the files lack is missed by the model's name (`check_tensors`).
        for each in (name,) if weight is None else weight.stored:
            whole = weight is None or weight.make is None
            shapes.setdefault(each, shape if whole else written[each])
            if number is not None:
                layer_numbers[each] = number
    tied_copy = architecture.tied_copy
    unknown = {
        name: written[name]
        for name in sorted(rest)
        if not DERIVED.search(name) and name != tied_copy
    }
    linear = architecture.linear
    # One by one in the files, or all in one tensor.
    experts = {
        name
        for weight in weights
        for name in weight.stored
        if weight.experts and name in layer_numbers and len(shapes[name]) in (2, 3)
    }
    rotated = experts | {
        name
        for weight in weights
        for name in weight.stored
        if linear.issuperset(weight.names) and len(shapes[name]) == 2
    }

    def names_of(members: Collection[str]) -> tuple[str, ...]:
        return tuple(in_files[n].stored[0] if n in in_files else n for n in members)

    [embedding] = names_of([architecture.embedding])
    head, tail = names_of(architecture.head_tensors), names_of(architecture.tail)
    run = {embedding, *head, *tail, *layer_numbers}
    others = {name: shape for name, shape in shapes.items() if name not in run}
    groups = _groups(
        {name: shape for name, shape in shapes.items() if name in run},
        {**others, **unknown},
        layer_numbers,
        embedding,
        architecture.num_layers,
        layers_per_group,
    )
    return ModelLayout(
        config,
        class_name,
        {**shapes, **unknown},
        frozenset(rotated),
        groups,
        layer_numbers,
        embedding,
        head,
        tail,
        tied_copy,
        tuple(unknown),
        experts=frozenset(experts),
        blocks=dict(_blocks(rotated, shapes)),
    )


def _blocks(
    rotated: Collection[str], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The projections that lie one below the other in a rotated weight, by its rows."""
    for name in rotated:
        kind, rows = name.removesuffix(".weight").rpartition(".")[2], shapes[name][-2]
        if kind in ("gate_up_proj", "input_linear") and rows % 2 == 0:
            yield name, (rows // 2, rows // 2)
        elif kind == "qkv_proj":
            # What comes out of the attention is as wide as the queries. Some families have all
            # three head by head under this name; their output projection has another one.
            queries = shapes.get(name.replace("qkv_proj", "o_proj"), (0, 0))[-1]
            keys = (rows - queries) // 2
            if queries and 0 < keys <= queries and queries + 2 * keys == rows:
                yield name, (queries, keys, keys)


def _groups(
    shapes: Mapping[str, tuple[int, ...]],
    others: Mapping[str, tuple[int, ...]],
    layer_numbers: Mapping[str, int],
    embedding: str,
    num_layers: int,
    layers_per_group: int,
) -> tuple[LayerGroup, ...]:
    starts = list(range(0, num_layers, layers_per_group))
    members: list[list[str]] = [[] for _ in starts]
    for name in shapes:
        if name in layer_numbers:
            members[layer_numbers[name] // layers_per_group].append(name)
        else:
            members[0 if name == embedding else -1].append(name)
    sizes = [_bytes(names, shapes) for names in members]
    # They are read by no forward pass: each goes where there is least.
    for name, shape in others.items():
        index = sizes.index(min(sizes))
        members[index].append(name)
        sizes[index] += 4 * prod(shape)
    return tuple(
        LayerGroup(index, start, min(start + layers_per_group, num_layers), tuple(names), size)
        for index, (start, names, size) in enumerate(zip(starts, members, sizes, strict=True))
    )


def _bytes(names: Collection[str], shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(4 * prod(shapes[name]) for name in names)


# A layer's number in the name of a tensor, of a family that nothing is known of.
_NUMBER = re.compile(r"^(.*?)\.(\d+)\.")


def table_layout(
    config: PretrainedConfig,
    layers_per_group: int,
    stored: Mapping[str, tuple[int, ...]],
    no_forward: str,
) -> ModelLayout:
    """List a model's tensors from the tables of its files alone, for merges without forward passes.

    Args:
        config: The model's configuration, of any family.
        layers_per_group: Decoder layers of a group.
        stored: Name -> shape of the tensors in the base's files.
        no_forward: Why no forward passes can be run.
    """
    shapes = {name: stored[name] for name in sorted(stored) if not DERIVED.search(name)}
    found = {name: match for name in shapes if (match := _NUMBER.match(name))}
    # Of several numbered lists, that which holds most is the one of the layers.
    sizes = Counter[str]()
    for name, match in found.items():
        sizes[match[1]] += prod(shapes[name])
    layers = sizes.most_common(1)[0][0] if sizes else None
    layer_numbers = {name: int(match[2]) for name, match in found.items() if match[1] == layers}
    num_layers = max(layer_numbers.values(), default=0) + 1
    in_layers = {name: shape for name, shape in shapes.items() if name in layer_numbers}
    others = {name: shape for name, shape in shapes.items() if name not in layer_numbers}
    matrices = (n for n, shape in in_layers.items() if len(shape) == 2 and n.endswith(".weight"))
    return ModelLayout(
        config,
        None,
        shapes,
        frozenset(matrices),
        _groups(in_layers, others, layer_numbers, "", num_layers, layers_per_group),
        layer_numbers,
        "",
        (),
        (),
        no_forward=no_forward,
    )
