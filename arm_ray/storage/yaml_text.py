"""Reading YAML that others may have written: what it holds cannot be more than what it says.

References (`*name`) and merge keys (`<<`) let a few lines stand for any amount of content, and a
list be a part of itself. Both are refused before anything is made of them.
"""

from __future__ import annotations

from typing import Any

import yaml

# The configuration of a run has all that was given and all that was not: 150 bytes for each of
# its candidates, of which there may be thousands.
LARGEST_YAML = 1 << 22
# Keys and values that a text may come to, some 60 us of time each.
_MOST_ENTRIES = 1 << 16
_DEEPEST = 100
# The library's own parser in C, with the same classes around it; most of its packages have that.
FASTEST: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load_yaml(text: str, loader: type[yaml.SafeLoader] | None = None) -> Any:
    """What a text of YAML says.

    Args:
        text: One document.
        loader: A safe loader; None: the fastest there is.

    Raises:
        ValueError: It is none; says where.
    """
    try:
        _check_events(text)
        cls: Any = loader or FASTEST
        made = cls(text)
        try:
            node = made.get_single_node()
            if node is None:
                return None
            _measure(node)
            return made.construct_document(node)
        finally:
            made.dispose()
    except yaml.YAMLError as error:
        raise ValueError(_line(error)) from None


def front_matter(text: str) -> tuple[dict[str, Any], str]:
    """What a text of Markdown, such as a model card, says before it begins; and the text itself.

    Raises:
        ValueError: What stands there is no YAML, or not keys and values.
    """
    if not text.startswith("---\n"):
        return {}, text
    head, end, rest = text.removeprefix("---").partition("\n---")
    if not end:
        return {}, text
    if len(head) > LARGEST_YAML:
        raise ValueError(f"what stands before the text has more than {LARGEST_YAML} characters")
    content = load_yaml(head)
    if not isinstance(content, dict | None):
        raise ValueError("what stands before the text is no keys and values")
    return content or {}, rest.partition("\n")[2]


def _check_events(text: str) -> None:
    """Refuse what is long, or nested deeply, which the parser in C would follow into a crash."""
    depth = entries = 0
    for event in yaml.parse(text, FASTEST):
        entries += isinstance(event, yaml.NodeEvent)
        if entries > _MOST_ENTRIES:
            raise ValueError(f"it has more than {_MOST_ENTRIES} entries")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > _DEEPEST:
                raise ValueError(f"it is nested more than {_DEEPEST} deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _line(error: yaml.YAMLError) -> str:
    """What the library says, in one line, and without the name that it gives to texts."""
    return " ".join(str(error).split()).replace(' in "<unicode string>",', ",")


def _measure(root: yaml.Node) -> None:
    """Count what a document holds with all references followed; refuse what is too large.

    Raises:
        ValueError: There are too many, they are nested too deeply, or one is a part of itself.
    """
    sizes: dict[int, int] = {}
    lengths: dict[int, int] = {}
    open_ids: set[int] = set()
    # Each node twice: before its children, and after them.
    stack: list[tuple[yaml.Node, bool]] = [(root, False)]
    while stack:
        node, is_done = stack.pop()
        children = _children(node)
        if is_done:
            open_ids.discard(id(node))
            sizes[id(node)] = 1 + sum(sizes[id(child)] for child in children)
            if sizes[id(node)] > _MOST_ENTRIES:
                raise ValueError(f"its references come to more than {_MOST_ENTRIES} entries")
            own = len(node.value) if isinstance(node, yaml.ScalarNode) else 0
            lengths[id(node)] = own + sum(lengths[id(child)] for child in children)
            if lengths[id(node)] > LARGEST_YAML:
                raise ValueError(f"its references come to more than {LARGEST_YAML} characters")
            continue
        if id(node) in sizes:
            continue
        open_ids.add(id(node))
        stack.append((node, True))
        for child in children:
            if id(child) in open_ids:
                raise ValueError("an entry is a part of itself")
            if id(child) not in sizes:
                stack.append((child, False))


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []
