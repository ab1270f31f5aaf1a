"""What foreign code raises is kept for the asker; nothing else of the package takes everything."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from clp_lightning.attempts import attempt, in_thread

PACKAGE = Path(__file__).parents[1] / "clp_lightning"


def test_a_result_and_an_exception_are_kept() -> None:
    assert attempt(lambda: 3).result() == 3
    outcome = attempt(lambda: 1 // 0)
    assert isinstance(outcome.exception(), ZeroDivisionError)


def test_the_users_interrupt_goes_through() -> None:
    def call() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt(call)


def test_an_exit_is_kept() -> None:
    def call() -> None:
        raise SystemExit(0)

    assert isinstance(attempt(call).exception(), SystemExit)
    assert isinstance(in_thread(call).exception(), SystemExit)


def test_a_thread_has_the_callers_modes() -> None:
    def modes() -> tuple[bool, bool, torch.dtype]:
        enabled = torch.is_autocast_enabled("cpu")
        return torch.is_grad_enabled(), enabled, torch.get_autocast_dtype("cpu")

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert in_thread(modes).result() == (False, True, torch.bfloat16)
    assert in_thread(modes).result()[:2] == (True, False)


def test_only_the_command_line_and_attempts_take_every_exception() -> None:
    wide: dict[str, list[ast.ExceptHandler]] = {}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ExceptHandler) and _takes_everything(node):
                wide.setdefault(str(file.relative_to(PACKAGE)), []).append(node)
    assert set(wide) - {"__main__.py"} == {"attempts.py", "modules/ahead.py"}
    (passes_on,) = wide["modules/ahead.py"]
    assert isinstance(passes_on.body[-1], ast.Raise) and passes_on.body[-1].exc is None


def _takes_everything(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    return any(
        getattr(node, "id", getattr(node, "attr", "")) in ("Exception", "BaseException")
        for node in ast.walk(handler.type)
    )
