"""What the pages say is true: names exist, code runs, commands are commands."""

from __future__ import annotations

import io
import re
import runpy
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import clp_lightning
from clp_lightning import LoRA, Policy, Preference, SteerablePolicy
from clp_lightning.__main__ import TOOLS, run
from clp_lightning.described import describe
from tests.helpers import NAMES, build_policy
from tests.steerables import make_steerable

ROOT = Path(__file__).parents[1]
PAGES = sorted(ROOT.glob("docs/**/*.md"))
TEXTS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
QUICKSTART = ["support", "brevity", "plain"]


def code_of(page: Path, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands(program: str, pages: list[Path] = TEXTS) -> list[str]:
    """The lines of code that start with ``program``, each once."""
    pattern = rf"^(?: {{4}}|)({program} .*)$"
    found = [line for page in pages for line in re.findall(pattern, page.read_text(), re.M)]
    return sorted({line.split("  #")[0].strip() for line in found})


def namespace_of(page: str) -> dict[str, Any]:
    """What the Python code of a page defines, run from the first block to the last."""
    namespace: dict[str, Any] = {"__name__": "page"}
    for code in code_of(ROOT / "docs" / page):
        exec(code, namespace)
    return namespace


# -- pages -----------------------------------------------------------------------------------


def test_every_public_name_is_on_an_api_page() -> None:
    pages = "\n".join(page.read_text() for page in ROOT.glob("docs/api/*.md"))
    shown = {line.rsplit(".", 1)[1] for line in re.findall(r"^::: (\S+)$", pages, re.MULTILINE)}
    assert set(clp_lightning.__all__) <= shown


@pytest.mark.parametrize("page", [p for p in PAGES if code_of(p)], ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page: Path) -> None:
    assert len(namespace_of(str(page.relative_to(ROOT / "docs")))) > 1


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.stem)
def test_yaml_can_be_read(page: Path) -> None:
    for text in code_of(page, "yaml"):
        assert isinstance(yaml.safe_load(text), dict)


def test_metrics_and_messages_of_the_pages_are_in_the_code() -> None:
    code = "\n".join(path.read_text() for path in ROOT.glob("clp_lightning/**/*.py"))
    code = re.sub(r'" *\n *f?"', "", code)  # literals that go over several lines
    pages = "\n".join(page.read_text() for page in TEXTS)
    metrics = set(re.findall(r"`(?:train|val)/([\w/]+)`", pages))
    assert len(metrics) >= 7
    for name in metrics:
        assert f'"{name.replace("NAME", "")}' in code, name
    rows = (ROOT / "docs/howto/trouble.md").read_text().splitlines()
    told = [found[1] for row in rows if (found := re.match(r"\| `([^`]* [^`]*)` \|", row))]
    assert len(told) >= 6
    for message in told:
        for part in re.split(r"…|'x'|\w+: |^validate ", message):
            assert part.strip() in code, message


def test_the_conditioner_of_the_page(tiny_folder: Callable[..., Path]) -> None:
    policy = build_policy(tiny_folder(), namespace_of("howto/conditioner.md")["OutputBias"]())
    ids = torch.arange(6, 14).reshape(2, 4)
    preference = Preference(torch.eye(2), torch.tensor([0.2, 0.5]))

    def logits(whom: Preference | None) -> torch.Tensor:
        scope = policy.reference() if whom is None else policy.conditioned(whom)
        with scope, policy.rows(torch.arange(2)):
            return policy.model(input_ids=ids).logits.detach()

    reference = logits(None)
    torch.testing.assert_close(logits(preference), reference)
    first, second = policy.conditioner.copies()
    first[0].data[7], second[0].data[9] = 1.0, 2.0
    expected = reference.clone()
    expected[0, :, 7] += 0.8 * 1.0  # (1 - alpha) w_i
    expected[1, :, 9] += 0.5 * 2.0
    torch.testing.assert_close(logits(preference), expected)
    torch.testing.assert_close(logits(None), reference)


def test_the_text_and_the_coefficients_of_the_page(tiny_folder: Callable[..., Path]) -> None:
    page = namespace_of("howto/conditioner.md")
    half = Preference.single([0.25, 0.75], 0.5)
    torch.testing.assert_close(
        page["Sharp"]().copies(half),
        torch.tensor([[0.05, 0.45]]),  # 1/16 and 9/16 of 10/16
    )
    policy = build_policy(tiny_folder(), page["Polite"](rest=LoRA(shared_rank=2)))
    assert policy.conditioner.rewrite("tea?", half) == f"Please care most about {NAMES[1]}.\ntea?"


def test_the_data_of_the_page() -> None:
    page = namespace_of("howto/data.md")
    page["data"].setup("fit")
    (batch, *_) = page["data"].train_dataloader()
    assert len(batch) == 2 and batch.columns["topic"][0] in ("red", "oak")
    (batch, *_) = page["Questions"]().train_dataloader()
    assert batch.prompts[:2] == ["What is 0 + 0?", "What is 1 + 1?"]


@pytest.mark.slow
def test_the_pictures_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = runpy.run_path(str(ROOT / "docs/pictures.py"))
    used = pictures["main"].__globals__
    monkeypatch.setitem(used, "STEPS", {1: "blue"})
    monkeypatch.setitem(used, "FOLDER", tmp_path)
    pictures["main"]()
    drawn = {path.name for path in tmp_path.iterdir()}
    shown = {path.name for path in (ROOT / "docs/pictures").iterdir()}
    assert shown - drawn == {"sliders.png", "sweep.png"} and drawn <= shown


# -- commands --------------------------------------------------------------------------------


@pytest.mark.parametrize("line", commands("python -m clp_lightning"))
def test_a_command_is_understood(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = shlex.split(line)[3:]
    if given[0] == "COMMAND":
        pytest.skip("says what commands look like")
    with pytest.raises(SystemExit) as stopped:
        run([*given, "--print_config"])
    assert not stopped.value.code, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "Namespace(" not in printed  # or the run's config.yaml could not be read again
    understood = yaml.safe_load(printed)
    if given[0] in TOOLS:  # printing does not ask for what is required
        tool = getattr(import_module(f"clp_lightning.{given[0]}"), given[0])
        parameters = signature(tool).parameters.values()
        assert all(understood[p.name] is not None for p in parameters if p.default is p.empty)


@pytest.mark.parametrize("line", commands("make"))
def test_a_make_target_exists(line: str) -> None:
    target = [word for word in shlex.split(line, comments=True)[1:] if "=" not in word]
    subprocess.run(["make", "-n", *target], cwd=ROOT, check=True, capture_output=True)


def test_the_commands_of_the_dial_run(
    tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Those that load a policy, on a tiny one with the quickstart's rewards."""
    page = ROOT / "docs/howto/dial.md"
    conditioner = LoRA(rank=2, shared_rank=0)
    policy = Policy(str(tiny_folder(chat=True)), conditioner)
    policy.build(QUICKSTART)
    trained = make_steerable(tiny_folder(chat=True), statistics=None, max_new_tokens=4).trained
    trained = replace(trained, rewards=QUICKSTART, conditioner=describe(conditioner))
    SteerablePolicy(policy, trained).save_pretrained(tmp_path / "runs/quickstart")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))  # the interactive one ends
    Path("presets.yaml").write_text(code_of(page, "yaml")[0])
    lines = [line for line in commands("python -m clp_lightning", [page]) if " pick " not in line]
    assert len(lines) >= 5
    for line in lines:
        run(shlex.split(line)[3:])
    shown = capsys.readouterr().out
    assert "exported: short-and-true" in shown and "reference" in shown
    assert sorted(path.name for path in Path("presets").iterdir()) == ["faithful", "short"]


def test_ask_of_the_page(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    make_steerable(tiny_folder()).save_pretrained(tmp_path)
    weights = [{"kind": 1, "short": 0}, {"kind": 0, "short": 1}]
    answers = namespace_of("howto/dial.md")["ask"](tmp_path, ["tea?"] * 2, weights)
    policy = SteerablePolicy.from_pretrained(tmp_path)
    expected = policy.generate(["tea?"] * 2, weights, 0.05, temperature=0)
    assert answers == expected.completions
