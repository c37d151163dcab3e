"""YAML for recipes: strict and bounded, so that every value means what it looks like.

YAML 1.1 reads 010 as 8 and 1:30:00 as 5400, takes the last of two equal keys, and lets a few lines
of aliases stand for gigabytes. Here a number stays text, which its flag converts as it does on the
command line; a key may occur only once; aliases and tags are refused.
"""

from __future__ import annotations

import yaml

MOST_CHARACTERS = 500_000  # a config.yaml of gradcam.py may name 10,000 image files
MOST_LEVELS = 10  # of nested lists and mappings; stages have 4
WORDS = {
    **dict.fromkeys(("", "~", "null"), None),
    **dict.fromkeys(("true", "yes", "on"), True),
    **dict.fromkeys(("false", "no", "off"), False),
}


def read_yaml(text):
    """A document as dicts with str keys, lists, str, bool and None; None where it is empty.

    Raises yaml.YAMLError, with line and column, for any other content.

    >>> read_yaml("{lr: 010, nesterov: off, names: [x, '1']}")
    {'lr': '010', 'nesterov': False, 'names': ['x', '1']}
    """
    if len(text) > MOST_CHARACTERS:
        raise yaml.YAMLError(f"it is longer than {MOST_CHARACTERS} characters")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
    finally:
        loader.dispose()
    return None if node is None else _value(node)


class _Loader(yaml.BaseLoader):
    """PyYAML's parser; a node is refused before its content is read."""

    levels = 0

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _error("aliases are not read: write the value itself", event)
        if event.tag is not None:
            raise _error(f"tags are not read: {event.tag}", event)
        self.levels += 1
        if self.levels > MOST_LEVELS:
            raise _error(f"more than {MOST_LEVELS} levels of lists and mappings", event)
        node = super().compose_node(parent, index)
        self.levels -= 1
        return node


def _value(node):
    if isinstance(node, yaml.SequenceNode):
        return [_value(item) for item in node.value]
    if isinstance(node, yaml.ScalarNode):
        plain = node.style is None and node.value in (
            node.value.lower(), node.value.title(), node.value.upper()
        )  # fmt: skip
        return WORDS.get(node.value.lower(), node.value) if plain else node.value
    values = {}
    for key, item in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _error("a key is one word", key)
        if key.value in values:
            raise _error(f'"{key.value}" is there twice', key)
        values[key.value] = _value(item)
    return values


def _error(problem, node):
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
