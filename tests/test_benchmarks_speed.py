"""The speed benchmarks run, on the smallest sizes, and count what they say they count."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor

from clp_lightning import functional

FOLDER = Path(__file__).parents[1] / "benchmarks"
QUICK = ["--size", "tiny", "--rounds", "1", "--warmup", "0", "--device", "cpu"]


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    import conditioning
    import generation
    import lengths
    import loops
    import memory
    import report
    import scaling
    import speed
    import stem
    import step
    import waiting
    import where

    modules: list[ModuleType] = [
        conditioning,
        generation,
        lengths,
        loops,
        memory,
        report,
        scaling,
        speed,
        stem,
        step,
        waiting,
        where,
    ]
    return {module.__name__: module for module in modules}


def test_step_runs_all_sides_on_as_many_tokens(
    scripts: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert scripts["step"].main([*QUICK, "--target", "1e9"]) == 1
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("ratio TRL/ours: ")
    assert all(f"({name})" in last for name in ("rloo", "rloo-defaults", "grpo"))


def test_step_stops_where_a_side_has_fewer_tokens(scripts: dict[str, Any]) -> None:
    step, size = scripts["step"], scripts["speed"].SIZES["tiny"]
    loop = scripts["loops"].Loop("short", lambda loop: None, scripts["speed"].Machine("cpu"))
    loop.tokens = {"generated": size.tokens, "trained": size.tokens}
    step.check_tokens([loop], size)
    loop.tokens["trained"] -= 1
    with pytest.raises(RuntimeError, match="short"):
        step.check_tokens([loop], size)


def test_every_step_is_checked(scripts: dict[str, Any]) -> None:
    def fit(loop: Any) -> None:
        for tokens in (5, 4, 5):  # the last is right again
            loop.count("generated", tokens)
            loop.turn()

    def check(loop: Any) -> None:
        if loop.tokens != {"generated": 5}:
            raise RuntimeError(f"{loop.name} differs")

    loop = scripts["loops"].Loop("middle", fit, scripts["speed"].Machine("cpu"))
    with pytest.raises(RuntimeError, match="middle differs"):
        scripts["loops"].take_turns([loop], 3, 0, check)


def test_phases_exclude_what_is_called_inside_and_sum_to_the_step(scripts: dict[str, Any]) -> None:
    ticks = iter(range(100))

    class Ticking:
        device = "cpu"

        def now(self) -> float:
            return float(next(ticks))

    class Work:
        def outer(self) -> None:
            self.inner()

        def inner(self) -> None:
            pass

    def fit(loop: Any) -> None:
        work = Work()
        loop.time(work, "outer", "outer")
        loop.time(work, "inner", "inner")
        work.outer()
        loop.turn()
        raise ValueError("of the second step")

    loop = scripts["loops"].Loop("ticking", fit, Ticking())
    # Five readings of the clock after the start: into outer, into inner, out, out, and the end.
    assert loop.step() == 5
    assert loop.phases == {"other": 2, "outer": 2, "inner": 1}
    with pytest.raises(ValueError, match="second step"):
        loop.step()


def test_conditioning_runs(scripts: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    forms = ["attention/merge", "attention/row", "prompt"]
    assert scripts["conditioning"].main([*QUICK, "--rewards", "2", "--forms", *forms]) == 0
    out = capsys.readouterr().out
    assert out.count(" prompt ") == 2  # with one preference, and with one for each prompt
    assert "break-even, K = 2, attention, train" in out
    beside = ["--forms", "lora", "--plain", "adapter"]
    assert scripts["conditioning"].main([*QUICK, "--rewards", "2", *beside]) == 0
    assert capsys.readouterr().out.count(" lora ") == 2


@pytest.mark.parametrize("variant", ["clp", "plain", "separate"])
def test_memory_measures_as_many_tokens(
    scripts: dict[str, Any],
    tiny_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    variant: str,
) -> None:
    lengths = []
    loss = functional.policy_gradient_loss

    def noted(logp: Tensor, advantage: Tensor, mask: Tensor, **options: Any) -> Tensor:
        lengths.append(int(mask.sum()))
        return loss(logp, advantage, mask, **options)

    monkeypatch.setattr(functional, "policy_gradient_loss", noted)
    monkeypatch.setattr("clp_lightning.modules.signal.policy_gradient_loss", noted)
    found = scripts["memory"].measure(variant, str(tiny_folder()), "cpu")
    assert 0 < found["loaded"] <= found["peak"]
    assert lengths == [16 * 32] * 2


def test_break_even(scripts: dict[str, Any]) -> None:
    def result(**ratios: float) -> dict[str, Any]:
        return {"ratios": ratios}

    break_even = scripts["conditioning"].break_even
    # Merging costs 0.1 for each of nine preferences, row mixing 0.8 more in 1000 tokens: at eight
    # preferences, 125 tokens each, both cost 1.8.
    merge = {1: result(train=1.1), 9: result(train=1.9)}
    assert break_even(merge, {9: result(train=1.8)}, "train", 1000) == pytest.approx(125)
    assert break_even(merge, {9: result(train=1.0)}, "train", 1000) is None


def test_scaling_runs_and_draws(
    scripts: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "scaling.png"
    arguments = ["--axes", "preferences", "--points", "2", "--plot", str(path)]
    assert scripts["scaling"].main([*QUICK, *arguments]) == 0
    assert path.stat().st_size
    assert capsys.readouterr().out.count("\npreferences") == 2


def test_growth_is_an_exponent(scripts: dict[str, Any]) -> None:
    before, after = {"value": 2, "cost": 3.0}, {"value": 4, "cost": 12.0}
    assert math.isclose(scripts["scaling"].slope(before, after), 2.0)


def test_lengths_tells_of_every_law(
    scripts: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert scripts["lengths"].main(QUICK) == 0
    *_, uniform, geometric, equal = capsys.readouterr().out.splitlines()
    assert uniform.startswith("uniform ") and geometric.startswith("geometric ")
    assert "4.0 of 4 tokens" in equal and "; ratio " in equal


def test_stem_compares_two_steps_of_ours(
    scripts: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert scripts["stem"].main(QUICK) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out[-3:-1]] == ["once", "anew"]
    assert out[-1].startswith("ratio anew/once: ")


def test_waiting_compares_numbers_of_chunks(
    scripts: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert scripts["waiting"].main([*QUICK, "--each", "0.05", "--chunks", "1", "2"]) == 0
    *_, once, twice, ratio = capsys.readouterr().out.splitlines()
    assert once.startswith("chunks=1 ") and twice.startswith("chunks=2 ")
    assert float(once.split()[2]) >= 4 * 50  # milliseconds: every response waits
    assert ratio.startswith("ratio chunks=1/chunks=2: ")


def test_generation_samples_as_many_tokens_on_both_sides(
    scripts: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert scripts["generation"].main([*QUICK, "--target", "1e9"]) == 1
    assert scripts["generation"].main([*QUICK, "--new-tokens", "3", "--target", "0"]) == 0
    assert capsys.readouterr().out.count("ratio generate/ours: ") == 2
    with pytest.raises(RuntimeError, match="5 tokens were sampled, not 6"):
        scripts["generation"].timed(lambda: 5, 6, scripts["speed"].Machine("cpu"))


def test_where_the_time_goes(scripts: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert scripts["where"].main(QUICK) == 0
    out = capsys.readouterr().out
    for part in ("rollout: ", "reference: ", "policy and backward: "):
        assert out.count(part) == 1
    assert out.count("  products ") == out.count("  attention ") == 3
    assert out.count("at the speed of a large one: ") == 3
    assert out.count(" GFLOP/s") == 4  # the products of every pass, and a large one


def test_kinds_of_operations(scripts: dict[str, Any]) -> None:
    found = {name: scripts["where"].kind_of(f"aten::{name}") for name in ("addmm", "expand", "cat")}
    assert found == {"addmm": "products", "expand": "elementwise and other", "cat": "copies"}


@pytest.mark.parametrize(("code", "kept"), [(0, True), (1, True), (2, False), (-9, False)])
def test_a_benchmark_that_did_not_run_is_no_result(
    scripts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kept: bool
) -> None:
    """2 is what an option that is refused ends with; 1 a missed target."""
    report = scripts["report"]
    (tmp_path / "job.py").write_text(
        "import os, signal, sys\n"
        f"os.kill(os.getpid(), signal.SIGKILL) if {code} < 0 else sys.exit({code})\n"
    )
    monkeypatch.setattr(report, "HERE", tmp_path)
    monkeypatch.setattr(report, "OUT", tmp_path)
    monkeypatch.setitem(report.JOBS, "job", (["job.py"], []))
    if kept:
        report.run("job")
    else:
        with pytest.raises(RuntimeError, match="job failed"):
            report.run("job")
    assert (tmp_path / "job.txt").exists() == kept


def test_the_report_has_every_number_it_asks_for(scripts: dict[str, Any]) -> None:
    report = scripts["report"]
    step = (
        "ratio clp/plain: 1.10\n"
        "ratio others/clp-compiled: 4.20 (rloo), 3.60 (rloo-defaults), 0.80 (clp)\n"
        "ratio others/clp-compiled-bf16: 5.20 (rloo), 4.60 (rloo-defaults), 0.70 (clp)\n"
        "ratio TRL/ours: 3.20 (rloo), 2.50 (rloo-defaults), 3.00 (grpo)\n"
    )
    shown = [number.row(step)[2:] for number in report.JOBS["step-10m"][1]]
    assert shown == [["3.20", "**no**"], ["4.20", "yes"], ["5.20", "**no**"], ["2.50", "**no**"]]
    table = (
        " 2 full/merge                1       1.05       1.00       1.01       1.04\n"
        " 2 full/merge                8       1.05       1.00       1.01       2.04\n"
        " 2 lora                      8       1.05       1.00       1.01       1.09\n"
    )
    found = [number.row(table)[2:] for number in report.JOBS["conditioning"][1]]
    missing = ["not measured", "-"]
    assert found == [["2.04", "**no**"], missing, missing, ["1.04", "yes"]]
    found = [number.row(table)[2:] for number in report.JOBS["conditioning-lora"][1]]
    assert found == [["1.09", "yes"]]
