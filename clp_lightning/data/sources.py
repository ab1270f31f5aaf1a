"""Where rows come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from pyarrow import ArrowException

from .corpus import Corpus
from .docstrings import Docstrings

__all__ = ["Source", "as_source", "has_splits", "load_rows"]

Source: TypeAlias = str | Corpus | Dataset
"""Where rows come from, once it is known to be something that can be read."""

# What reading a file or asking the hub ends in; of files most come wrapped in a DatasetsError.
_UNREADABLE = (
    DatasetsError,
    ArrowException,
    OSError,
    ValueError,
    TypeError,
    LookupError,
    RuntimeError,
    EOFError,
)
_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_FORMS = {
    "json": " Write one object a line, with the same columns and types in all.",
    "csv": " Write a line of column names, then one line a row.",
}


def as_source(name: str, source: Any) -> Source:
    """``source`` itself, or what a path, a DataFrame or the name of the corpus stands for.

    Args:
        name: The argument's name, for the error.
        source: See :class:`PromptDataModule`.

    Raises:
        ValueError: for anything else; says what it may be.
    """
    if isinstance(source, pd.DataFrame):
        return Dataset.from_pandas(source, preserve_index=False)
    if isinstance(source, Path):
        return str(source)
    if isinstance(source, (str, Corpus, Dataset)):
        return Docstrings() if source == "docstrings" else source
    raise ValueError(
        f"{name} is a {type(source).__name__}; give a file, a folder, a data set's name, a "
        "datasets.Dataset (one split: data['train']; rows: Dataset.from_list(rows)), a pandas "
        "DataFrame or Docstrings()."
    )


def has_splits(source: Source) -> bool:
    """Whether a split can be chosen: from a folder and a hub data set it can."""
    return isinstance(source, str) and _builder(Path(source)) is None


def _builder(path: Path) -> str | None:
    return _BUILDERS.get(path.suffix.lower())


def _bad_line(path: Path) -> str | None:
    """Which line of a .jsonl file is no object; the reader counts rows within a block of them."""
    if path.suffix.lower() != ".jsonl":
        return None
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            text = line.strip()
            try:
                found = json.loads(text) if text else {}
            except ValueError as error:
                return f"line {number} is no JSON ({error})"
            if not isinstance(found, dict):
                return f"line {number} is no JSON object"
    return None


def _check_encoding(path: Path) -> None:
    """Readers of data sets let wrong bytes through, which fail where their row is first used."""
    number = 0
    try:
        with path.open(encoding="utf-8") as lines:
            for _ in lines:
                number += 1
    except UnicodeDecodeError as error:
        raise ValueError(
            f"The data file '{path}' is not UTF-8 in or soon behind line {number + 1} ({error}); "
            "save it in that encoding."
        ) from None


def load_rows(source: Source, config: str | None, split: str) -> Dataset:
    """The rows of a source.

    Args:
        source: See :class:`PromptDataModule`.
        config: Configuration of a hub data set.
        split: Split of a folder or hub data set; a file, a Dataset and a corpus have none.

    Raises:
        FileNotFoundError: for a file that does not exist.
        ValueError: naming a source that is empty or cannot be read, a file of an unknown kind, or
            a split that it lacks.
    """
    if isinstance(source, Dataset):
        return source
    if isinstance(source, Corpus):
        return source.load()
    path = Path(source).expanduser()
    builder = _builder(path)
    if builder is not None:
        if not path.is_file():
            raise FileNotFoundError(f"The data file '{source}' does not exist.")
        if path.stat().st_size == 0:
            raise ValueError(f"The data file '{source}' is empty; it needs a row for every prompt.")
        if builder != "parquet":
            _check_encoding(path)
        try:
            return load_dataset(builder, data_files=str(path), split="train")
        except _UNREADABLE as error:
            why = error.__cause__ or error
            raise ValueError(
                f"The data file '{source}' has no rows or is not valid {builder}: "
                f"{_bad_line(path) or why}.{_FORMS.get(builder, '')}"
            ) from error
    if path.is_file():
        raise ValueError(
            f"The data file '{source}' is of an unknown kind '{path.suffix}'; give one of "
            f"{', '.join(_BUILDERS)}, or a folder."
        )
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = load_from_disk(str(path))
        if isinstance(saved, DatasetDict):
            if split not in saved:
                raise ValueError(f"'{source}' has no split '{split}', only {sorted(saved)}.")
            return saved[split]
        return saved
    name, _, revision = (str(path), "", "") if path.is_dir() else source.partition("@")
    try:
        return load_dataset(name, config, split=split, revision=revision or None)
    except _UNREADABLE as error:
        raise ValueError(
            f"Cannot load the data set '{source}' (config {config}, split '{split}'): it is no "
            "file or folder with data here, and as a name on the hub it gave: "
            f"{type(error).__name__}: {error}"
        ) from error
