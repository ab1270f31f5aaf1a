"""Live runs in float32: devices draw the same tokens, until a draw that rounding can decide."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clp_lightning import Policy, Pretrained, PromptBatch, Rollout
from clp_lightning.keyed import uniforms
from clp_lightning.policy import Sampling, TransformersEngine
from tests.devices import PER_STEP, Case, Job, conditioner, run_group, trainer_of
from tests.runs import make_data, make_module, write_rows
from tests.test_ddp import EVALUATION
from tests.test_devices import load

CASES = [Case("llama", "lora"), Case("llama", "full"), Case("t5", "attention")]
Key = tuple[int, int, int]  # epoch, prompt id, sample


class Margins(TransformersEngine):
    """The ordinary engine; keeps of every token how far its draw was from choosing another.

    Attributes:
        drawn: For every response its weights and alpha, its tokens, and the margin of each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.drawn: dict[Key, tuple[list[float], list[int], list[float]]] = {}

    @torch.no_grad()
    def generate(self, policy: Policy, batch: PromptBatch, n: int, sampling: Sampling) -> Rollout:
        rollout = super().generate(policy, batch, n, sampling)
        if batch.epoch >= EVALUATION:
            return rollout
        with policy.conditioned(rollout.preference):
            margins = margins_of(policy, rollout, batch.epoch, sampling)
        who = torch.cat([rollout.preference.weights, rollout.preference.alpha[:, None]], -1)
        for row, length in enumerate(rollout.lengths.tolist()):
            key = (batch.epoch, int(rollout.prompt_ids[row]), int(rollout.sample[row]))
            tokens = rollout.response_ids[row, :length].tolist()
            self.drawn[key] = (who[row].tolist(), tokens, margins[row, :length].tolist())
        return rollout


def margins_of(policy: Policy, rollout: Rollout, epoch: int, sampling: Sampling) -> Tensor:
    """From the uniform number of a token to the nearer end of its part of [0, 1), shape (B, T)."""
    ids = rollout.response_ids.unsqueeze(-1)
    probabilities = policy.log_distributions(rollout).double().exp()
    above = probabilities.cumsum(-1).gather(-1, ids)
    below = above - probabilities.gather(-1, ids)
    uniform = uniforms(sampling.seed, epoch, rollout.prompt_ids, rollout.sample, ids.shape[1])
    uniform = uniform.to(above).unsqueeze(-1)
    return torch.minimum(uniform - below, above - uniform).squeeze(-1)


def live(case: Case, base: Path, folder: Path, layout: str) -> dict[Key, Any]:
    """What a process drew in ten steps of AdamW."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    engine = Margins()
    module = make_module(
        Pretrained(str(base)),
        conditioner=conditioner(case.conditioned),
        engine=engine,
        samples_per_prompt=4,
        max_new_tokens=12,
        statistics_prompts=0,
        lr=1e-2,
    )
    source = str(write_rows(folder / f"rows-{os.environ.get('RANK', '0')}.jsonl", 40))
    data = make_data(folder, source=source, holdout=0, batch_size=2)
    settings = {"accumulate_grad_batches": PER_STEP // 2 // world, "max_steps": 10}
    trainer_of(folder, layout, **settings).fit(module, data)
    return engine.drawn


def first_difference(one: dict[Key, Any], many: dict[Key, Any]) -> tuple[Key, int] | None:
    """In the order in which ``one`` drew: of which response, and at which token."""
    for key, (_, tokens, _) in one.items():
        other = many[key][1]
        for place, (own, found) in enumerate(zip(tokens, other, strict=False)):
            if own != found:
                return key, place
        assert len(tokens) == len(other)  # one ended, and the other went on
    return None


@pytest.mark.slow
def test_the_first_difference_is_a_draw_on_the_border(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    jobs: list[Job] = [(str(case), live, (case, tiny_folder(case.model))) for case in CASES]
    for layout, world in (("one", 1), ("ddp", 2), ("fsdp", 2)):
        (tmp_path / layout).mkdir()
        run_group(jobs, tmp_path / layout, layout, world, timeout=300)
    for case in CASES:
        one: dict[Key, Any] = load(tmp_path / "one", str(case))
        assert len(one) == 10 * PER_STEP * 4
        assert min(margin for _, _, margins in one.values() for margin in margins) > -1e-5
        for layout in ("ddp", "fsdp"):
            many: dict[Key, Any] = {}
            for rank in range(2):
                many |= load(tmp_path / layout, str(case), rank)
            assert {key: own[0] for key, own in one.items()} == {k: v[0] for k, v in many.items()}
            if (found := first_difference(one, many)) is not None:
                key, place = found
                assert one[key][2][place] < 1e-4
