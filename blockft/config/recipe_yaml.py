"""Check the YAML of a recipe before it is loaded: its depth, its size, repeated keys, and odd numbers."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from blockft.inputs import shorten

MAX_DEPTH = 50
"""Deepest nesting. The libraries that load YAML recurse."""

MAX_NODES = 10_000
"""Largest number of keys and values after aliases are replaced by what they stand for."""

MAX_RECIPE_BYTES = 1 << 20
"""Largest file of a recipe."""

_TAGS = {None, "!", *(f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null"))}
"""The explicit types that a value may have."""

_ODD = {
    "an octal number": re.compile(r"[-+]?0[0-7_]+"),
    "a binary number": re.compile(r"[-+]?0b[01_]+"),
    "a hexadecimal number": re.compile(r"[-+]?0x[0-9a-fA-F_]+"),
    "a number in base 60": re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?"),
    "a date": re.compile(r"\d{4}-\d\d?-\d\d?([Tt \t].*)?"),
}
"""Plain texts that YAML 1.1 reads as something else than what a reader sees."""


@dataclass
class _Collection:
    """A mapping or list that is being read."""

    is_mapping: bool
    anchor: str | None
    keys: set[str] = field(default_factory=set)
    num_nodes: int = 1
    num_children: int = 0


def yaml_problem(text: str) -> str | None:
    """Return why a text cannot be loaded as the YAML of a recipe, with its line, or None.

    Refuses nesting beyond `MAX_DEPTH`, more than `MAX_NODES` nodes, aliases of what contains them, keys that
    are repeated or are no texts, and plain numbers and dates whose value differs from what they look like.

    Raises:
        yaml.YAMLError: the text is not YAML.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return next(_problems(yaml.parse(text, Loader=loader)), None)


def is_mapping(text: str) -> bool:
    """Return whether a YAML text holds a mapping, or nothing."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    nodes = (event for event in yaml.parse(text, Loader=loader) if isinstance(event, yaml.NodeEvent))
    first = next(nodes, None)
    return first is None or isinstance(first, yaml.MappingStartEvent)


def _problems(events: Any) -> Iterator[str]:
    """Yield the problems of a stream of YAML events."""
    import yaml

    stack = [_Collection(is_mapping=False, anchor=None)]
    num_anchored: dict[str, int] = {}
    num_documents = 0
    for event in events:
        line = f"line {event.start_mark.line + 1}"
        if isinstance(event, yaml.DocumentStartEvent):
            num_documents += 1
            if num_documents > 1:
                yield f"{line}: a second document starts: remove it, because a recipe is one document"
        elif isinstance(event, yaml.CollectionEndEvent):
            ended = stack.pop()
            stack[-1].num_nodes += ended.num_nodes
            if ended.anchor:
                num_anchored[ended.anchor] = ended.num_nodes
        elif isinstance(event, yaml.NodeEvent):
            parent = stack[-1]
            is_key = parent.is_mapping and parent.num_children % 2 == 0
            parent.num_children += 1
            if is_key:
                yield from _key_problems(event, parent, line)
            if (tag := getattr(event, "tag", None)) not in _TAGS:
                yield f"{line}: the tag {shorten(str(tag))} is not allowed: write a plain value"
            if isinstance(event, yaml.CollectionStartEvent):
                is_mapping = isinstance(event, yaml.MappingStartEvent)
                stack.append(_Collection(is_mapping=is_mapping, anchor=event.anchor))
                if len(stack) > MAX_DEPTH:
                    yield f"{line}: the nesting has more than {MAX_DEPTH} levels: use fewer levels"
                continue
            if isinstance(event, yaml.AliasEvent):
                if event.anchor in (collection.anchor for collection in stack):
                    yield f"{line}: *{event.anchor} stands inside of &{event.anchor}: write a plain value"
                parent.num_nodes += num_anchored.get(event.anchor, 1)
            else:
                parent.num_nodes += 1
                if event.implicit[0] and not event.style:  # a plain text
                    yield from _odd_values(event.value, line)
        if sum(collection.num_nodes for collection in stack) > MAX_NODES:
            yield f"{line}: it has more than {MAX_NODES:,} keys and values: write a shorter recipe"


def _key_problems(event: Any, parent: _Collection, line: str) -> Iterator[str]:
    import yaml

    if not isinstance(event, yaml.ScalarEvent):
        yield f"{line}: a key is not a text: write key: value"
    elif event.value in parent.keys and event.value != "<<":
        yield f"{line}: the key {shorten(event.value)!r} occurs twice: leave one of them out"
    else:
        parent.keys.add(event.value)


def _odd_values(value: str, line: str) -> Iterator[str]:
    for kind, pattern in _ODD.items():
        if pattern.fullmatch(value):
            yield f"{line}: {shorten(value)} is {kind} in YAML: write a decimal number, or a text in quotes"
