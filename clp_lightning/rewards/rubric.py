"""What a judge is asked and how its answer is read: templates and patterns."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from .base import completion_text

__all__ = ["as_text", "compile_pattern", "fill", "placeholders", "read_answer"]

T = TypeVar("T")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


def placeholders(template: str) -> list[str]:
    """The names in braces, each once.

    Example:
        >>> placeholders('{prompt} and {completion}, as {"score": 1}')
        ['prompt', 'completion']
    """
    return [*dict.fromkeys(_PLACEHOLDER.findall(template))]


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with every name in braces replaced, once; other braces stay as they are.

    Example:
        >>> fill("{a} {b}", {"a": "{b}", "b": "2"})
        '{b} 2'
    """
    return _PLACEHOLDER.sub(lambda found: values[found[1]], template)


def as_text(value: Any) -> str:
    r"""A prompt, completion or column as a judge reads it; a conversation with its roles.

    Example:
        >>> as_text([{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}])
        'user: Why?\nassistant: So.'
    """
    if not _is_conversation(value):
        return str(value)
    if len(value) == 1:
        return completion_text(value)
    return "\n".join(f"{message['role']}: {completion_text([message])}" for message in value)


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict) and "role" in message for message in value
    )


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """A regular expression with one group.

    Raises:
        ValueError: it is none, or has no group or several.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"'{pattern}' is not a regular expression: {error}.") from error
    if compiled.groups != 1:
        raise ValueError(
            f"'{pattern}' has {compiled.groups} groups; it needs one, around what is read. "
            "Write the others as (?:...)."
        )
    return compiled


def read_answer(answer: str, pattern: re.Pattern[str], convert: Callable[[str], T]) -> T:
    r"""What the group of ``pattern`` holds.

    Args:
        answer: What a judge wrote.
        pattern: With one group.
        convert: Makes a value of the group's text; raises ValueError where it is none.

    Raises:
        ValueError: nothing matches, or several matches differ.

    Example:
        >>> read_answer("It is fine. Score: 4", re.compile(r"Score: (\d+)"), float)
        4.0
    """
    found = {convert(match[1] or "") for match in pattern.finditer(answer)}
    if not found:
        raise ValueError(f"nothing matches {pattern.pattern}")
    if len(found) > 1:
        raise ValueError(f"the matches of {pattern.pattern} differ: {sorted(map(str, found))}")
    return found.pop()
