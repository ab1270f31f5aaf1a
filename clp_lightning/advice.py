"""What to do about a mistake of which a parser says only what is wrong."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable
from importlib import import_module

__all__ = ["advice", "closest"]

_NO_MODULE = re.compile(r"No module named '([^']+)'")
_OTHER_CLASS = re.compile(r"Import path .*does not correspond to a subclass of (\w+)")
_OPTION = re.compile(r"(?:Subcommand|Group) '\w+' does not accept option '([^']+)'")
_PLACES = ("clp_lightning", "lightning.pytorch.loggers", "lightning.pytorch.callbacks")
_FEW = 4


def advice(text: str, options: Iterable[str] = ()) -> str:
    """A remedy to put behind ``text``; empty where it has one already, or none is known.

    Args:
        text: A complaint of jsonargparse's, in one line.
        options: What the command takes.

    Example:
        >>> advice("No module named 'mylib'")
        "; mend the class_path, or make 'mylib' importable (pip install, PYTHONPATH)"
        >>> advice("Subcommand 'fit' does not accept option 'modl.lr'", ["model", "data"])
        "; did you mean 'model.lr'?"
    """
    if absent := _NO_MODULE.search(text):
        name = absent[1]
        return f"; mend the class_path, or make '{name}' importable (pip install, PYTHONPATH)"
    if other := _OTHER_CLASS.search(text):
        names = _named_like(other[1])
        such = f", such as {', '.join(names)}" if names else ""
        return f"; give the class_path of a {other[1]}{such}"
    if option := _OPTION.search(text):
        return closest(option[1], options)
    return ""


def closest(option: str, options: Iterable[str]) -> str:
    """Which of ``options`` was perhaps meant; a last part that none of them has is kept."""
    known, parts = list(options), option.split(".")
    for end in range(len(parts), 0, -1):
        alike = [each for each in known if each.count(".") == end - 1]
        if close := difflib.get_close_matches(".".join(parts[:end]), alike, n=1):
            return f"; did you mean '{'.'.join([*close, *parts[end:]])}'?"
    return ""


def _named_like(parent: str) -> list[str]:
    """Names of public classes that inherit from one called ``parent``."""
    found = []
    for place in _PLACES:
        module = import_module(place)
        for name in sorted(getattr(module, "__all__", ())):
            each = getattr(module, name)
            if inspect.isclass(each) and parent in (base.__name__ for base in each.__mro__[1:]):
                found.append(name)
    return found[:_FEW]
