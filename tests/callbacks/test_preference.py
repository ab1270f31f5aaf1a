from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clp_lightning import (
    AnnealedAlpha,
    CLPCallback,
    Dirichlet,
    Fixed,
    FixedAlpha,
    Preference,
    PromptBatch,
    PromptText,
    SoftPrompt,
    Vertices,
)
from clp_lightning.callbacks import LogUniformAlpha, UniformAlpha, UniformGrid
from clp_lightning.keyed import generator
from tests.runs import Perturbed, make_data, make_module, make_trainer

NAMES = ["kind", "short", "plain"]


def draw(
    callback: CLPCallback,
    ids: list[int],
    *,
    epoch: int = 0,
    step: int = 0,
    size: int | None = None,
    one_per_batch: bool = False,
) -> Preference:
    """What the callback attaches to a batch of these prompts."""
    conditioner = SimpleNamespace(one_preference_per_batch=one_per_batch)
    module: Any = SimpleNamespace(
        seed=5,
        device=torch.device("cpu"),
        rewards=SimpleNamespace(names=NAMES),
        policy=SimpleNamespace(conditioner=conditioner, is_built=False),
    )
    trainer: Any = SimpleNamespace(global_step=step, estimated_stepping_batches=10)
    prompts: list[Any] = [f"prompt {i}" for i in ids]
    batch = PromptBatch(prompts, torch.tensor(ids), epoch=epoch, nominal_size=size)
    callback.setup(trainer, module, "fit")
    callback.on_train_batch_start(trainer, module, batch, 0)
    assert batch.preference is not None
    return batch.preference


def same(a: Preference, b: Preference) -> bool:
    return torch.equal(a.weights, b.weights) and torch.equal(a.alpha, b.alpha)


def test_draws_depend_on_seed_epoch_and_prompt_only() -> None:
    callback = CLPCallback(Dirichlet(1.0), UniformAlpha(0.1, 0.9))
    both = draw(callback, [7, 9])
    assert same(draw(callback, [9, 7]), both[torch.tensor([1, 0])])  # not on place or company
    assert same(draw(callback, [9], step=4), both[1:])  # not on history
    assert not same(draw(callback, [7, 9], epoch=1), both)
    assert not same(both[:1], both[1:])


def test_per_batch_is_keyed_by_each_slices_first_prompt() -> None:
    callback = CLPCallback(Dirichlet(1.0), per="batch")
    found = draw(callback, [3, 4, 5, 6], size=2)  # two slices of a generation batch
    assert same(found[:1], found[1:2]) and same(found[2:3], found[3:4])
    assert not same(found[:1], found[2:3])
    assert same(draw(callback, [5, 6]), found[2:])


def test_per_step_is_keyed_by_the_step() -> None:
    callback = CLPCallback(Dirichlet(1.0), FixedAlpha(0.2), per="step")
    found = draw(callback, [3, 4], step=2)
    assert same(draw(callback, [8, 9], step=2, epoch=3), found)
    assert same(found[:1], found[1:]) and not same(draw(callback, [3, 4], step=3), found)


def test_the_conditioner_decides_by_default() -> None:
    found = draw(CLPCallback(Dirichlet(1.0)), [3, 4], one_per_batch=True)
    assert same(found[:1], found[1:])
    with pytest.raises(ValueError, match="one preference per batch; set CLPCallback's per to"):
        draw(CLPCallback(per="prompt"), [3, 4], one_per_batch=True)


def test_weight_samplers() -> None:
    draws = {
        sampler: torch.stack([sampler.sample(NAMES, generator(i)) for i in range(3000)])
        for sampler in (Dirichlet(0.5), UniformGrid(4), Vertices(), Fixed({"plain": 1.0} | ZEROS))
    }
    for sampler, rows in draws.items():
        assert rows.shape == (3000, 3) and (rows >= 0).all()
        torch.testing.assert_close(rows.sum(1), torch.ones(3000))
        if not isinstance(sampler, Fixed):  # symmetric: every mean is 1/3, by 6 deviations
            assert (rows.mean(0) - 1 / 3).abs().max() < 6 * 0.47 / 3000**0.5
    dirichlet, grid, vertices, fixed = draws.values()
    # Var w_i = (1/K)(1 - 1/K) / (K c + 1) = (2/9) / 2.5.
    torch.testing.assert_close(dirichlet.var(0), torch.full((3,), 2 / 22.5), rtol=0.1, atol=0)
    assert len(grid.unique(dim=0)) == 15 and torch.equal(grid * 4, (grid * 4).round())
    assert len(vertices.unique(dim=0)) == 3 and (vertices.amax(1) == 1).all()
    assert (fixed == torch.tensor([0.0, 0.0, 1.0])).all()  # by name, in the bank's order


ZEROS = {"kind": 0.0, "short": 0.0}


def test_alpha_samplers() -> None:
    def sample(sampler: Any, progress: float = 0.0) -> list[float]:
        return [sampler.sample(progress, generator(i)) for i in range(2000)]

    assert set(sample(FixedAlpha(0.3))) == {0.3}
    annealed = AnnealedAlpha(0.6, 0.1, 0.5)
    found = [sample(annealed, progress)[0] for progress in (0, 0.25, 0.5, 0.9)]
    assert found == pytest.approx([0.6, 0.35, 0.1, 0.1])
    uniform = torch.tensor(sample(UniformAlpha(0.2, 0.6)))
    assert uniform.min() >= 0.2 and uniform.max() <= 0.6
    assert float(uniform.mean()) == pytest.approx(0.4, abs=0.02)
    log = torch.tensor(sample(LogUniformAlpha(0.01, 1.0)))
    assert log.min() >= 0.01 and log.max() <= 1
    assert float(log.log10().mean()) == pytest.approx(-1, abs=0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dirichlet(0), "concentration must be positive; got 0"),
        (lambda: FixedAlpha(1.5), r"number in \[0, 1\], got 1.5"),
        (lambda: AnnealedAlpha(until=0), r"share of the steps, in \(0, 1\]; got 0"),
        (lambda: UniformAlpha(0.5, 0.1), "low must not be above high"),
        (lambda: LogUniformAlpha(0.0, 0.1), "low must be above 0"),
        (lambda: UniformGrid(0), "divisions must be at least 1; got 0"),
        (lambda: CLPCallback(per="promt"), "per must be None, 'prompt', 'batch' or 'step'"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_annealing_needs_a_number_of_steps() -> None:
    assert FixedAlpha(0.2).sample(math.nan, generator(0)) == 0.2
    with pytest.raises(ValueError, match="max_steps"):
        AnnealedAlpha().sample(math.nan, generator(0))


@pytest.mark.parametrize("conditioner", [SoftPrompt, PromptText])
def test_the_model_decides_too(
    conditioner: Any, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """T5's table of relative positions cannot be mixed per row, whatever the conditioner."""
    module = make_module(tiny_folder("t5"), Perturbed, conditioner=conditioner())
    trainer = make_trainer(tmp_path, limit_val_batches=1)
    trainer.fit(module, make_data(tmp_path))
    assert trainer.global_step == 2
    given = [rollout.preference.weights for rollout, _ in module.seen]
    assert all((rows == rows[:1]).all() for rows in given)
    assert not torch.equal(given[0][:1], given[1][:1])
    refused = make_module(tiny_folder("t5"), conditioner=conditioner())
    with pytest.raises(ValueError, match="one preference per batch; set CLPCallback's per to"):
        make_trainer(tmp_path, CLPCallback(per="prompt")).fit(refused, make_data(tmp_path))


def test_models_that_can_mix_rows_do(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    module = make_module(tiny_folder("llama"), Perturbed, conditioner=SoftPrompt())
    make_trainer(tmp_path).fit(module, make_data(tmp_path))
    rows = module.seen[0][0].preference.weights
    assert not (rows == rows[:1]).all()
