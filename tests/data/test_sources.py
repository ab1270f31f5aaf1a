"""Which data set is asked of the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from clp_lightning.data import sources
from clp_lightning.data.sources import load_rows

ROWS = Dataset.from_list([{"prompt": "tea?"}])


def test_a_revision_stands_behind_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(name: str, config: str | None, **options: Any) -> Dataset:
        asked.append((name, config, options["split"], options["revision"]))
        return ROWS

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    for source in ("some/set", "some/set@refs/convert/parquet", "set@v1.0"):
        assert load_rows(source, "small", "train") is ROWS
    assert asked == [
        ("some/set", "small", "train", None),
        ("some/set", "small", "train", "refs/convert/parquet"),
        ("set", "small", "train", "v1.0"),
    ]


def test_a_folder_may_have_such_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ROWS.save_to_disk(tmp_path / "set@refs/main")
    (tmp_path / "other@v2").mkdir()
    ROWS.to_json(tmp_path / "other@v2/train.jsonl")
    monkeypatch.chdir(tmp_path)
    for source in ("set@refs/main", "other@v2"):
        assert load_rows(source, None, "train").to_list() == ROWS.to_list()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "tea', "line 31 is no JSON (Unterminated string"),
        ('["tea"]', "line 31 is no JSON object. Write one object a line"),
        ("tea", "line 31 is no JSON (Expecting value"),
    ],
)
def test_the_line_that_is_wrong_is_named(line: str, said: str, tmp_path: Path) -> None:
    lines = ['{"prompt": "tea"}'] * 40
    lines[30] = line
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"rows\.jsonl' .*" + re.escape(said)):
        load_rows(str(path), None, "train")
