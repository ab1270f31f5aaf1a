"""What can be imported from the top level."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import clp_lightning

ROOT = Path(__file__).parents[1]


def test_every_name_can_be_imported() -> None:
    for name in clp_lightning.__all__:
        assert getattr(clp_lightning, name).__name__ == name


@pytest.mark.parametrize(
    "name",
    [
        "AlphaSampler",
        "Pattern",
        "RewardError",
        "TrainingDiverged",
        "WeightSampler",
        "completion_text",
    ],
)
def test_what_users_subclass_and_catch_is_there(name: str) -> None:
    assert name in dir(clp_lightning)


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Lora'"):
        _ = clp_lightning.Lora


def test_every_section_that_is_cited_exists() -> None:
    headings = re.findall(r"^## (\d+)\. ", (ROOT / "docs/method.md").read_text(), re.MULTILINE)
    assert headings == ["1", "2", "3", "4", "5", "6"]
    cited = []
    for path in [*ROOT.glob("clp_lightning/**/*.py"), *ROOT.glob("tests/**/*.py")]:
        text = " ".join(path.read_text().split())
        for page, section in re.findall(r"([\w./]+)[:,]? section (\d)", text):
            assert page == "docs/method.md" and section in headings, f"{path}: {page} {section}"
            cited.append(section)
    assert set(cited) == set(headings)
