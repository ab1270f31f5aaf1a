"""Objects that can say how they were made, so that a checkpoint stays plain data."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

__all__ = [
    "Described",
    "check_bound",
    "check_choice",
    "check_finite",
    "describe",
    "import_path",
    "load_object",
    "rebuild",
    "settings",
]


class Described:
    """A base class that records the arguments of its constructor as ``init_args``."""

    init_args: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = super().__new__(cls)
        # Past nn.Module's own __setattr__, which is not ready before __init__.
        try:
            init_args = _bind(cls.__mro__, args, kwargs)
        except TypeError as error:
            raise TypeError(f"{cls.__name__}: {error}") from None
        object.__setattr__(self, "init_args", init_args)
        return self


def _bind(
    classes: Sequence[type], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments by name; what a constructor passes on as ``*args, **kwargs`` is its parent's."""
    if not args and not kwargs:
        return {}
    signature = inspect.signature(classes[0].__init__)  # type: ignore[misc]
    # Partial, because copy and pickle call ``__new__`` without arguments.
    bound = signature.bind_partial(None, *args, **kwargs).arguments
    own: dict[str, Any] = {}
    passed_args: tuple[Any, ...] = ()
    passed: dict[str, Any] = {}
    for name, value in list(bound.items())[1:]:
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            passed_args = value
        elif kind is inspect.Parameter.VAR_KEYWORD:
            passed = value
        else:
            own[name] = value
    return {**_bind(classes[1:], passed_args, passed), **own}


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> Any:
    """``value`` itself, if it is one of ``allowed``.

    Raises:
        ValueError: naming the argument and what it may be.

    Example:
        >>> check_choice("per", "promt", ["prompt", "batch"])
        Traceback (most recent call last):
        ValueError: per must be 'prompt' or 'batch'; got 'promt'.
    """
    if value not in allowed:
        *first, last = map(repr, allowed)
        raise ValueError(f"{name} must be {', '.join(first)} or {last}; got {value!r}.")
    return value


def check_bound(name: str, value: float | None) -> float | None:
    """``value`` itself, if it is above 0 or None, for no bound.

    Raises:
        ValueError: naming the argument.

    Example:
        >>> check_bound("max_kl", -1.0)
        Traceback (most recent call last):
        ValueError: max_kl must be above 0; got -1.0. Leave it out for no bound.
    """
    if value is not None and not value > 0:
        raise ValueError(f"{name} must be above 0; got {value}. Leave it out for no bound.")
    return value


def check_finite(name: str, value: float) -> float:
    """``value`` itself, if it is a finite number.

    Raises:
        ValueError: naming the argument.

    Example:
        >>> check_finite("penalty", float("inf"))
        Traceback (most recent call last):
        ValueError: penalty must be a finite number; got inf.
    """
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number; got {value}.")
    return value


def import_path(obj: Callable[..., Any] | type) -> str:
    """``module.name`` of a class or function that can be imported.

    Raises:
        ValueError: for lambdas, functions defined inside others and methods of an object.
    """
    name = getattr(obj, "__qualname__", "<unnamed>")
    of_an_object = not inspect.ismodule(getattr(obj, "__self__", inspect))
    if "<" in name or of_an_object:
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

    Numbers and arrays of numpy and torch become Python's, paths strings, functions their import
    path, and a ``functools.partial`` of a class an object that lacks some arguments. A lambda or a
    bound method becomes None (it must be passed again when the checkpoint is loaded).
    """
    if hasattr(value, "tolist"):  # before float, of which numpy's float64 is a kind
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
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
    if isinstance(value, partial) and isinstance(value.func, type) and not value.args:
        return {"class_path": import_path(value.func), "init_args": describe(value.keywords)}
    if callable(value):
        try:
            return import_path(value)
        except ValueError:
            return None
    raise TypeError(
        f"{value!r} ({type(value).__name__}) cannot be described as plain data; derive its class "
        "from clp_lightning.Described."
    )


def settings(value: Described) -> dict[str, Any]:
    """``describe(value)``, with the defaults of the arguments that were left out.

    So objects that were made alike are described alike, from a config and from Python.
    """
    arguments = _defaults(type(value).__mro__) | value.init_args
    return {"class_path": import_path(type(value)), "init_args": describe(arguments)}


def _defaults(classes: Sequence[type]) -> dict[str, Any]:
    """Defaults of a constructor's arguments, and of its parent's that it passes on."""
    if not classes:
        return {}
    parameters = inspect.signature(classes[0].__init__).parameters.values()  # type: ignore[misc]
    own = {p.name: p.default for p in parameters if p.default is not p.empty}
    passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return (_defaults(classes[1:]) if passes_on else {}) | own


def rebuild(description: Any, kind: type) -> Any:
    """The object that ``describe`` described.

    Args:
        description: ``{class_path, init_args}``; objects among the arguments likewise.
        kind: What it must be. Nothing is called but classes of this kind and, among the
            arguments, classes derived from ``Described``: a file from a stranger cannot name
            other code.

    Raises:
        ValueError: it is not such a description.

    Example:
        >>> rebuild({"class_path": "clp_lightning.Scaled", "init_args": {}}, Described)
        Scaled()
    """
    if not _is_description(description):
        raise ValueError(f"{description!r} does not describe a {kind.__name__} by its class_path.")
    found = load_object(description["class_path"])
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise ValueError(f"'{description['class_path']}' is not a {kind.__name__}.")
    arguments = description.get("init_args") or {}
    return found(**{name: _rebuild_argument(value) for name, value in arguments.items()})


def _rebuild_argument(value: Any) -> Any:
    if _is_description(value):
        return rebuild(value, Described)
    if isinstance(value, Mapping):
        return {key: _rebuild_argument(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rebuild_argument(item) for item in value]
    return value


def _is_description(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("class_path"), str)
