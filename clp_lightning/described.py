"""Objects that can say how they were made, so that a checkpoint stays plain data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

__all__ = ["Described", "describe", "import_path", "load_object"]


class Described:
    """A base class that records the arguments of its constructor as ``init_args``."""

    init_args: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = super().__new__(cls)
        # Partial, because copy and pickle call ``__new__`` without arguments.
        bound = inspect.signature(cls.__init__).bind_partial(self, *args, **kwargs)
        # Past nn.Module's own __setattr__, which is not ready before __init__.
        object.__setattr__(self, "init_args", dict(list(bound.arguments.items())[1:]))
        return self


def import_path(obj: Callable[..., Any] | type) -> str:
    """``module.name`` of a class or function that can be imported.

    Raises:
        ValueError: for lambdas and functions defined inside others.
    """
    name = getattr(obj, "__qualname__", "<unnamed>")
    if "<" in name:
        raise ValueError(
            f"{name} cannot be imported by name, so a checkpoint could not rebuild it. "
            "Define it at the top level of a module."
        )
    return f"{obj.__module__}.{name}"


def load_object(path: str) -> Any:
    """The object at ``package.module.name``.

    Raises:
        ValueError: naming the part that was not found.
    """
    from importlib import import_module

    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:cut])
        try:
            found: Any = import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is not None and not (module_name + ".").startswith(error.name + "."):
                raise  # the module exists; something that it imports does not
            continue
        for part in parts[cut:]:
            if not hasattr(found, part):
                raise ValueError(f"'{path}': {module_name} has no '{'.'.join(parts[cut:])}'.")
            found = getattr(found, part)
        return found
    raise ValueError(f"'{path}' cannot be imported: give the full path, package.module.name.")


def describe(value: Any) -> Any:
    """``value`` as plain data: objects become ``{class_path, init_args}``.

    Functions become their import path; a lambda becomes None (it must be passed again when the
    checkpoint is loaded).
    """
    if isinstance(value, Mapping):
        return {key: describe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Described):
        return {"class_path": import_path(type(value)), "init_args": describe(value.init_args)}
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: describe(getattr(value, f.name)) for f in fields(value)}
    if callable(value):
        try:
            return import_path(value)
        except ValueError:
            return None
    raise TypeError(
        f"{value!r} ({type(value).__name__}) cannot be described as plain data; derive its class "
        "from clp_lightning.Described."
    )
