"""A parser's account of a mistake in few lines: where it is, what is wrong, what would be right."""

from __future__ import annotations

import ast
import inspect
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, is_dataclass
from importlib import import_module
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

from .advice import advice, closest

__all__ = ["ShortErrors", "in_short", "refuse_no_values"]

_WIDTH = 160
_CLASS = re.compile(r"Problem with given class_path '([\w.]+)':")
_KEY = re.compile(r"Parser key \"([^\"]+)\":")
_OPTION = re.compile(r"Option '([^']+)' is not accepted")
_NO_CLASS = re.compile(r"Not a valid subclass of (\w+)")
_VALUE = re.compile(r"Given value: (.*)")
_OF_A_FILE = {
    "Problems parsing config": "",
    "Unexpected config": " has to hold keys and values; it holds",
}
_NOISE = (
    "Does not validate",
    "Subtypes:",
    "Errors:",
    "Given value type",
    "Expected a <class 'None",
)


class ShortErrors:
    """Of a parser of jsonargparse: a mistake is told in a line or two, and exits with 2."""

    exit_on_error: bool
    prog: str
    #: The config file that is read, or was read last.
    reading: str = "The config"

    def parse_path(self, cfg_path: Any, *args: Any, **options: Any) -> Any:
        """As jsonargparse's; a mistake in the file is told with its name."""
        self.reading = str(cfg_path)
        above: Any = super()
        try:
            return above.parse_path(cfg_path, *args, **options)
        except UnicodeDecodeError as error:
            self.error(f"{cfg_path} is not in UTF-8 ({error}); save it in that encoding.", error)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Says what is wrong; raises where jsonargparse would."""
        if not self.exit_on_error or os.environ.get("CLP_LIGHTNING_TRACEBACK"):
            above: Any = super()
            above.error(message, ex)
        for start, told in _OF_A_FILE.items():
            if message.startswith(start):
                message = f"{self.reading}{told}{message.removeprefix(start)}"
        print(f"error: {in_short(message, _options(ex))}", file=sys.stderr)
        print(f"See {self.prog.replace(' [options]', '')} --help.", file=sys.stderr)
        sys.exit(2)


def _options(error: Exception | None) -> list[str]:
    """What the parser takes that complains, in full; none where jsonargparse does not tell."""
    parser: Any = getattr(error, "subcommand_parser", None)
    return [] if parser is None else [action.dest for action in parser._actions]


def in_short(message: str, options: Sequence[str] = ()) -> str:
    """The innermost complaint of jsonargparse's nested ones, with the way to it and a remedy.

    Args:
        message: What ``ArgumentParser.error`` is given.
        options: What the command takes.

    Returns:
        One line, or the message as it is where it has no such structure.

    Example:
        >>> print(in_short('''Parser key "data":
        ...   Does not validate against any of the Union subtypes
        ...   Errors:
        ...     - Problem with given class_path 'clp_lightning.Brevity':
        ...         Option 'taget' is not accepted
        ...     - Expected a <class 'NoneType'>'''))
        data (Brevity): Option 'taget' is not accepted; did you mean 'target'?
    """
    root = _tree(message)
    found = max(_complaints(root, ""), key=lambda each: each.depth, default=None)
    if found is None or "\n" not in message:
        return message + advice(message, options)
    text = found.text
    if found.owner and (option := _OPTION.match(text)):
        text += _suggestion(option[1].split(".")[0], found.owner)
    if no_class := _NO_CLASS.match(text):
        text = f"not a valid {no_class[1]}; give its class_path, and its arguments as init_args"
    told = "Got value" in text or _OPTION.match(text)
    if remedy := advice(text):
        text += remedy
    elif found.value and not told and not found.value.startswith(("Namespace(", "[Namespace(")):
        text += f"; got {_described(found.value)}"
    return f"{found.where.strip()}: {text}" if found.where else text


@dataclass
class _Line:
    indent: int
    text: str
    below: list[_Line] = field(default_factory=list)


@dataclass
class _Complaint:
    where: str
    text: str
    depth: int
    owner: str | None = None
    value: str | None = None


def _tree(message: str) -> _Line:
    root = _Line(-1, "")
    open_ = [root]
    for raw in message.splitlines():
        text = raw.strip().removeprefix("- ")
        if not text:
            continue
        line = _Line(len(raw) - len(raw.lstrip()), text)
        while open_[-1].indent >= line.indent:
            open_.pop()
        open_[-1].below.append(line)
        open_.append(line)
    return root


def _complaints(
    line: _Line, where: str, owner: str | None = None, value: str | None = None
) -> Iterator[_Complaint]:
    """Every line that says what is wrong, with the keys and classes on the way to it."""
    values = (_VALUE.match(each.text) for each in line.below)
    value = next((match[1] for match in values if match), value)
    for each in line.below:
        if key := _KEY.match(each.text):
            joint = "." if where and not where.endswith(" ") else ""
            yield from _complaints(each, f"{where}{joint}{key[1]}", owner, None)
        elif given := _CLASS.match(each.text):
            # In full where the class itself may be the mistake.
            full = any(line.text.startswith(("No module", "Import")) for line in each.below)
            name = given[1] if full else given[1].rpartition(".")[2]
            yield from _complaints(each, f"{where} ({name}) ".lstrip(), given[1], None)
        elif not each.text.startswith((*_NOISE, "Given value", "Subclass types")):
            yield _Complaint(where, each.text, each.indent, owner, value)
        elif not each.text.startswith("Subclass types"):
            yield from _complaints(each, where, owner, value)


def _suggestion(option: str, owner: str) -> str:
    """What the class does accept."""
    try:
        signature = inspect.signature(_found(owner))
    except (ValueError, TypeError):
        return ""
    accepted = [name for name in signature.parameters if name not in ("args", "kwargs")]
    if meant := closest(option, [*accepted, "class_path", "init_args"]):
        return meant
    shown = ", ".join(accepted)
    return f"; it takes {shown if len(shown) <= _WIDTH else shown[:_WIDTH] + ' …'}"


def _described(value: str) -> str:
    try:
        read = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        read = value
    if isinstance(read, dict):
        return f"the keys {', '.join(map(str, read))}"
    shown = value if len(value) <= _WIDTH else value[:_WIDTH] + " …"
    return f"{type(read).__name__} {shown}" if not isinstance(read, str) else shown


def refuse_no_values(given: Any, owner: Any = None, where: str = "") -> None:
    """Raises where a config says nan, or null where the class that it is for takes none.

    jsonargparse lets both pass. The class would stumble over them somewhere, or compare with nan
    and find every number good.

    Args:
        given: A parsed config, of dicts and lists.
        owner: The class whose arguments ``given`` has.
        where: The way to it.

    Raises:
        ValueError: names the argument and what it takes.

    Example:
        >>> refuse_no_values({"seed": 1, "size": None}, lambda seed, size: None)
        >>> def function(size: int = 3) -> None: ...
        >>> refuse_no_values({"size": None}, function, "model")
        Traceback (most recent call last):
        ...
        ValueError: model.size is null, but takes int; leave the line out for its default, 3.
        >>> refuse_no_values({"sizes": [1.0, float("nan")]}, None, "model")
        Traceback (most recent call last):
        ...
        ValueError: model.sizes.1 is nan, which is no number; give one, or leave the line out.
    """
    if _is_nan(given):
        raise ValueError(f"{where} is nan, which is no number; give one, or leave the line out.")
    if isinstance(given, list):
        for i, each in enumerate(given):
            refuse_no_values(each, None, f"{where}.{i}")
    if not isinstance(given, dict):
        return
    if isinstance(path := given.get("class_path"), str):
        refuse_no_values(given.get("init_args"), _found(path), f"{where}.init_args")
        return
    accepted = _parameters(owner)
    for name, value in given.items():
        place = f"{where}.{name}" if where else str(name)
        if value is None and name in accepted and not _takes_none(accepted[name]):
            kept = accepted[name].default
            takes = inspect.formatannotation(accepted[name].annotation)
            remedy = f"leave the line out for its default, {kept!r}"
            if kept is inspect.Parameter.empty:
                remedy = "it has no default"
            raise ValueError(f"{place} is null, but takes {takes}; {remedy}.")
        if not (_is_nan(value) and name in accepted and _is_nan(accepted[name].default)):
            refuse_no_values(value, _dataclass_of(accepted.get(name)), place)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _dataclass_of(parameter: inspect.Parameter | None) -> Any:
    """Whose fields a config gives without a class_path."""
    kinds = [] if parameter is None else _alternatives(parameter.annotation)
    return next((kind for kind in kinds if is_dataclass(kind)), None)


def _alternatives(kind: Any) -> list[Any]:
    """The members of a union; of another type itself."""
    if get_origin(kind) is Annotated:
        return _alternatives(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [each for member in get_args(kind) for each in _alternatives(member)]
    return [*get_args(kind)] if get_origin(kind) is Literal else [kind]


def _found(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None


def _parameters(owner: Any) -> dict[str, inspect.Parameter]:
    """With annotations that are types; those of base classes too."""
    found: dict[str, inspect.Parameter] = {}
    for each in reversed(inspect.getmro(owner)) if inspect.isclass(owner) else [owner]:
        try:
            found |= inspect.signature(each, eval_str=True).parameters
        except (NameError, ValueError, TypeError):  # written for type checkers only, or built in
            continue
    return found


def _takes_none(parameter: inspect.Parameter) -> bool:
    free = (inspect.Parameter.empty, Any, None, type(None), object)
    return parameter.default is None or any(
        kind in free or isinstance(kind, TypeVar) for kind in _alternatives(parameter.annotation)
    )
