"""Configs are refused in which a key stands twice, or a class is given by something else.

Of a key that stands twice YAML takes the last and drops the others without a word.
"""

from __future__ import annotations

from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

__all__ = ["check_keys", "refuse_repeated_keys"]


def refuse_repeated_keys() -> None:
    """Has jsonargparse read no config that ``check_keys`` refuses; a second call does nothing."""
    if get_loader("yaml") is not _load:
        set_loader("yaml", _load, (yaml.YAMLError,))


_read = get_loader("yaml")


def _load(text: str) -> Any:
    check_keys(text)
    return _read(text)


def check_keys(text: str) -> None:
    """Refuses YAML with a mapping that has a key twice, or a class that is no name.

    Args:
        text: The YAML.

    Raises:
        yaml.YAMLError: names the key, the way to it and its lines; or says where the text is no
            YAML, in one line.

    Example:
        >>> check_keys("model: {lr: 1}")
        >>> check_keys("model: {lr: 1, lr: 2}")
        Traceback (most recent call last):
        yaml.error.YAMLError: model.lr stands twice, in lines 1 and 1; remove one.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        raise yaml.YAMLError(_in_a_line(error)) from error
    waiting = [] if root is None else [("", root)]
    seen: set[int] = set()  # an alias is the node that it names
    while waiting:
        where, node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += [(f"{where}.{i}", each) for i, each in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            continue
        lines: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            path = f"{where}.{key.value}".lstrip(".")
            line = key.start_mark.line + 1
            if key.value in lines:
                first = lines[key.value]
                raise yaml.YAMLError(
                    f"{path} stands twice, in lines {first} and {line}; remove one."
                )
            lines[key.value] = line
            _check_class(key.value, path, value)
            waiting.append((path, value))


def _check_class(key: str, path: str, value: yaml.Node) -> None:
    """Refuses what jsonargparse stumbles over."""
    line = value.start_mark.line + 1
    kind = value.tag.rpartition(":")[2]
    if key == "class_path" and kind != "str":
        raise yaml.YAMLError(
            f"{path} in line {line} is of type {kind}; give the import path of a class, "
            "such as clp_lightning.CLPModule."
        )
    if key == "init_args" and kind != "map":
        raise yaml.YAMLError(
            f"{path} in line {line} is of type {kind}; give the class's arguments by name."
        )


def _in_a_line(error: yaml.MarkedYAMLError) -> str:
    """Where a text is no YAML, and what the reader looked for.

    Example:
        >>> check_keys("trainer: {max_steps: 1")
        Traceback (most recent call last):
        yaml.error.YAMLError: line 1, column 23 is no YAML: expected ',' or '}', but got \
'<stream end>', while parsing a flow mapping that begins in line 1.
    """
    place = error.problem_mark or error.context_mark
    where = f"line {place.line + 1}, column {place.column + 1} is" if place else "it is"
    said = f"{where} no YAML: {error.problem}"
    if error.context:
        said += f", {error.context}"
        if error.context_mark:
            said += f" that begins in line {error.context_mark.line + 1}"
    return f"{said}."
