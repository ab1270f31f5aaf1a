"""Checkpoints of weights that are split over processes: one file, for any number of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from torch import Tensor

from clp_lightning import Critic, LoRA, MuonAdamW, RunCheckpoint
from clp_lightning.conditioning import Gate, Mixture
from tests.devices import Case, Job, finetune, go_on, run_group, train, trainer_of, validate
from tests.runs import fails_on_tea, kind, make_data, make_module
from tests.test_devices import check_equal as check_training

CASES = [Case("llama", name) for name in ("lora", "full", "attention")]
Run = Callable[[str, int, str | None], Path]


def read(folder: Path, case: Case, name: str = "last") -> Any:
    """Of the run in ``folder``."""
    return torch.load(folder / str(case) / f"checkpoints/{name}.ckpt", weights_only=True)


def check_equal(one: Any, other: Any, *, within: float) -> None:
    """Weights, optimizer, schedule and progress."""
    assert one.keys() == other.keys()
    for name in ("global_step", "lr_schedulers", "loops", "PromptDataModule", "clp_lightning"):
        if name in one and within == 0:
            assert other[name] == one[name]
    assert other["global_step"] == one["global_step"]
    assert other["state_dict"].keys() == one["state_dict"].keys()
    for name, weight in one["state_dict"].items():
        torch.testing.assert_close(other["state_dict"][name], weight, rtol=0, atol=within)
    (own,), (found,) = one["optimizer_states"], other["optimizer_states"]
    assert found["param_groups"] == own["param_groups"]
    assert found["state"].keys() == own["state"].keys()
    for number, entries in own["state"].items():
        assert found["state"][number].keys() == entries.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for name, value in entries.items():
            torch.testing.assert_close(found["state"][number][name], value, rtol=0, atol=within)
    assert max(float(entries["exp_avg"].abs().max()) for entries in own["state"].values()) > 1e-3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[..., Path]) -> Run:
    """The folder of four steps in a layout, all of them or the last two after another layout's."""
    base = tiny_folder("llama")

    @cache
    def run(layout: str, world: int, after: str | None) -> Path:
        folder = tmp_path_factory.mktemp(layout)
        sources: dict[str, Path | None] = {str(case): None for case in CASES}
        if after is not None:
            begun = run(after, 2, None)
            sources = {name: begun / name / "checkpoints/previous.ckpt" for name in sources}
        jobs: list[Job] = [(str(c), go_on, (c, base, sources[str(c)])) for c in CASES]
        run_group(jobs, folder, layout, world, timeout=600)
        return folder

    return run


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    ("after", "layout", "world"),
    [("fsdp", "fsdp", 2), ("ddp", "fsdp", 2), ("fsdp", "ddp", 2), ("fsdp", "one", 1)],
)
def test_a_run_goes_on_in_another_layout(
    after: str, layout: str, world: int, case: Case, run: Run
) -> None:
    whole, resumed = run(after, 2, None), run(layout, world, after)
    before, end = read(whole, case, "previous"), read(whole, case)
    assert (before["global_step"], end["global_step"]) == (2, 4)
    check_equal(end, read(resumed, case), within=0 if after == layout else 1e-10)


@pytest.mark.slow
def test_the_front_of_a_checkpoint(
    run: Run, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    source = run("ddp", 2, None) / str(CASES[1]) / "checkpoints/last.ckpt"
    jobs: list[Job] = [("run", validate, (CASES[1], tiny_folder("llama"), source))]
    found = []
    for layout, world in (("one", 1), ("fsdp", 2)):
        (tmp_path / layout).mkdir()
        run_group(jobs, tmp_path / layout, layout, world, timeout=240)
        found.append(json.loads((tmp_path / layout / "run/front.json").read_text()))
    one, many = found
    assert one["points"][0]["kl"] != 0
    for own, other in zip(one["points"], many["points"], strict=True):
        assert other["rewards"] == own["rewards"]
        assert other["kl"] == pytest.approx(own["kl"], abs=1e-10)


def test_shards_go_on_from_the_checkpoint_before_a_damaged_one(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    case, ends = CASES[0], []
    last = tmp_path / str(case) / "checkpoints/last.ckpt"
    for _ in range(2):
        jobs: list[Job] = [(str(case), go_on, (case, tiny_folder("llama"), "last"))]
        run_group(jobs, tmp_path, "fsdp", 2, timeout=240)
        ends.append(read(tmp_path, case))
        last.write_bytes(last.read_bytes()[:-100])
    check_equal(*ends, within=0)
    told = torch.load(tmp_path / f"{case}.0.pt")
    assert any("previous.ckpt, the one before it, is taken" in warning for warning in told)


@pytest.mark.slow
@pytest.mark.parametrize("kind_of", ["reward", "lora", "full"])
def test_finetuning_in_shards(
    kind_of: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    jobs: list[Job] = [("run", finetune, (kind_of, tiny_folder("llama")))]
    for layout, world in (("one", 1), ("fsdp", 2)):
        (tmp_path / layout).mkdir()
        run_group(jobs, tmp_path / layout, layout, world, timeout=240)
    one, many = (tmp_path / "one", tmp_path / "fsdp")
    name = "reward" if kind_of == "reward" else "base"
    weights, others = (load_file(f / f"run/{name}/model.safetensors") for f in (one, many))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert weight.dtype == torch.float64
        torch.testing.assert_close(others[name], weight, rtol=0, atol=1e-10)
    logged, same = torch.load(one / "run.0.pt"), torch.load(many / "run.0.pt")
    assert logged["val/loss"] > 0 and same == pytest.approx(logged)


DROPS: dict[str, Any] = {"rewards": {"kind": kind, "tea": fails_on_tea}, "max_dropped": 1.0}
LEARNED = [
    Case("llama", "lora", options={"critic": Critic(), "lr": 0.1}),
    Case("llama", "full", options={"conditioner": Mixture(coefficients=Gate())}),
    # Where all responses to a batch are dropped on one process, and on both.
    Case("llama", "attention", drops=True, options=DROPS),
    Case("llama", "prompt", drops=True, options=DROPS | {"kl": "vocabulary"}),
    Case("llama", "logits", drops=True, options=DROPS | {"critic": Critic()}),
]


@pytest.mark.slow
def test_gates_critics_and_nothing_left(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny_folder("llama")
    jobs: list[Job] = [(str(case), train, (case, base, 4)) for case in LEARNED]
    for layout, world in (("one", 1), ("fsdp", 2)):
        (tmp_path / layout).mkdir()
        run_group(jobs, tmp_path / layout, layout, world, timeout=600)
    for case in LEARNED:
        one, many = (torch.load(tmp_path / f"{n}/{case}.0.pt") for n in ("one", "fsdp"))
        # Gates and critics are float32, whose rounding grows from step to step.
        del one["gradients"][1:], many["gradients"][1:]
        check_training(one, many, within=1e-4 if "critic" in case.options else 1e-8)
        assert any(one["dropped"]) == case.drops


def refused(base: Path, folder: Path, layout: str) -> list[str]:
    """What is said of folders of shards, to be written and to be read."""
    (folder / "last.ckpt").mkdir()
    found = []
    for pretrained, whole, path in (
        (folder / "nowhere", False, None),
        (base, True, folder / "last.ckpt"),
    ):
        module = make_module(pretrained, conditioner=LoRA(rank=2))
        strategy = ModelParallelStrategy(1, 1, save_distributed_checkpoint=not whole)
        trainer = trainer_of(folder, layout, RunCheckpoint(), devices=1, strategy=strategy)
        with pytest.raises(ValueError, match="folder of shards") as error:
            trainer.fit(module, make_data(folder), ckpt_path=path)
        found.append(str(error.value))
    return found


def test_folders_of_shards_are_refused(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    run_group([("job", refused, (tiny_folder("llama"),))], tmp_path, "one", 1, timeout=120)
    writing, reading = torch.load(tmp_path / "job.0.pt")
    assert "Set save_distributed_checkpoint: false" in writing  # and not: there is no such model
    assert "last.ckpt is a folder of shards" in reading


def exact_newton_schulz(grad: Tensor, coefficients: Any, steps: int, eps: float) -> Tensor:
    """Muon's iteration in the gradient's own precision; torch's is in bfloat16."""
    a, b, c = coefficients
    found = grad.T if grad.shape[0] > grad.shape[1] else grad
    found = found / found.norm().clamp(min=eps)
    for _ in range(steps):
        gram = found @ found.T
        found = a * found + (b * gram + c * gram @ gram) @ found
    return found.T if grad.shape[0] > grad.shape[1] else found


def train_by_muon(case: Case, base: Path, folder: Path, layout: str) -> dict[str, Any]:
    """Two steps, without the rounding of bfloat16."""
    torch.optim._muon._zeropower_via_newtonschulz = exact_newton_schulz
    return train(case, base, 2, folder, layout)


@pytest.mark.slow
def test_muon_differs_by_the_rounding_of_bfloat16_only(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_folder("llama")
    case = Case("llama", "full", options={"optimizer": MuonAdamW, "lr": 0.01})
    for layout, world in (("one", 1), ("fsdp", 2)):
        (tmp_path / layout).mkdir()
        jobs: list[Job] = [("job", train_by_muon, (case, base))]
        run_group(jobs, tmp_path / layout, layout, world, timeout=300)
    one, many = (torch.load(tmp_path / f"{n}/job.0.pt")["weights"] for n in ("one", "fsdp"))
    assert max(float((one[name] - many[name]).abs().max()) for name in one) < 1e-12
