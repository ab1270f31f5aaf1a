"""The sweep over a grid of preferences: validate, test and predict."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from ..functional.kl import log_ratio
from ..functional.logprobs import masked_sum
from ..metrics import Front, FrontReport, Grid
from ..types import Preference, PromptBatch, Rollout
from .cost import Cost
from .statistics import EVALUATION_EPOCH, fit_statistics, uniform_preference
from .stop import ask_rewards, empty_front, raise_together

if TYPE_CHECKING:
    from ..policy import Engine, Policy, Sampling
    from ..rewards import RewardBank

__all__ = ["FrontSweep"]

REFERENCE = -1


class FrontSweep(LightningModule):
    """The evaluation half of ``CLPModule``: every prompt under every preference of a grid.

    Attributes:
        full_grid: Use ``grid`` rather than ``small_grid`` during ``fit``.
        front_report: The newest front.
    """

    policy: Policy
    rewards: RewardBank
    engine: Engine
    sampling: Sampling
    cost: Cost
    grid: Grid
    small_grid: Grid
    eval_samples: int
    eval_rows: int
    statistics_prompts: int
    statistics_samples: int
    reference_point: list[float] | None
    trainer_state: Callable[[], Any]
    full_grid: bool = False
    front_report: FrontReport | None = None
    front: Front

    def describe_sweep(
        self,
        grid: Grid | None,
        small_grid: Grid | None,
        eval_samples: int,
        eval_rows: int,
        reference_point: list[float] | None,
    ) -> None:
        """Sets what fronts are measured on; a wrong name, weight or number is an early error."""
        names = self.rewards.names
        self.grid = grid or Grid()
        self.small_grid = small_grid or Grid(divisions=1, alphas=self.grid.alphas)
        for each in (self.grid, self.small_grid):
            Front(names, each.preferences(names), reference_point)
        for name, number in (("eval_samples", eval_samples), ("eval_rows", eval_rows)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1; got {number}.")
        self.eval_samples, self.eval_rows = eval_samples, eval_rows
        self.reference_point = reference_point

    @property
    def decoding(self) -> dict[str, Any]:
        """Under which decoding fronts are measured."""
        precision = self.engine.precision
        lower = {"precision": precision} if precision else {}
        return {"engine": type(self.engine).__name__, **lower, **self.sampling.to_dict()}

    def cost_report(self) -> dict[str, float | None]:
        """What training has cost so far, and what an answer takes; None is unknown.

        See ``Cost``, and: trained_parameters; models, networks in memory (a base with all its
        deltas is one); forwards, policies that are run for every token.
        """
        trained = self.policy.trained_parameters().values()
        return {
            **self.cost.to_dict(),
            "trained_parameters": sum(parameter.numel() for parameter in trained),
            "models": 1,
            "forwards": self.engine.forwards(self.policy, len(self.rewards.names)),
        }

    @property
    def eval_preferences(self) -> Preference:
        """The grid in use, G rows."""
        in_fit = self.trainer.state.fn == "fit" and not self.full_grid
        grid = self.small_grid if in_fit else self.grid
        return grid.preferences(self.rewards.names)

    # -- hooks --------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        self.cost.stop()

    def on_validation_end(self) -> None:
        if self.trainer.state.fn == "fit":
            self.cost.start()

    def on_validation_epoch_start(self) -> None:
        fit_statistics(self, self.statistics_prompts, self.statistics_samples)  # type: ignore[arg-type]
        front = Front(self.rewards.names, self.eval_preferences, self.reference_point)
        self.front = front.to(self.device)  # NCCL gathers from the GPU only

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        for rollout, point in self.sweep(batch, with_reference=True):
            self._add(rollout, point)
        raise_together(self)  # type: ignore[arg-type]

    def on_validation_epoch_end(self) -> None:
        self._report_front("val")

    def _report_front(self, stage: str) -> None:
        try:
            self.front_report = self.front.compute()
        except ValueError as error:
            raise empty_front(self, error) from None  # type: ignore[arg-type]
        for name, value in self.front_report.scalars().items():
            # Equal on all ranks already; sync_dist keeps Lightning from warning of it.
            in_bar = (stage, name) == ("val", "value")
            self.log(f"{stage}/{name}", value, prog_bar=in_bar, sync_dist=True)

    def on_test_epoch_start(self) -> None:
        self.on_validation_epoch_start()

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self._report_front("test")

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """One record per response: what was asked, under which preference, and the answer."""
        swept = self.sweep(batch, with_reference=False)
        answers = [replace(rollout, stem=None) for rollout, _ in swept]  # they are not scored
        scores = [ask_rewards(self, rollout).raw for rollout in answers]  # type: ignore[arg-type]
        raise_together(self)  # type: ignore[arg-type]
        return [
            self._record(rollout, raw[row], row)
            for rollout, raw in zip(answers, scores, strict=True)
            for row in range(len(rollout))
        ]

    # -- the sweep ----------------------------------------------------------------------------

    def sweep(
        self, batch: PromptBatch, *, with_reference: bool
    ) -> Iterator[tuple[Rollout, Tensor]]:
        """Responses to every prompt under every preference of the grid.

        All points draw with the same uniform numbers, so that differences between them are the
        policy's.

        Yields:
            A rollout and the point of each of its rows (-1 = the reference), shape (B,).
        """
        grid = self.eval_preferences
        batch = replace(PromptBatch.check(batch), epoch=EVALUATION_EPOCH, part=0, parts=1)
        size = max(1, self.eval_rows // self.eval_samples)
        if with_reference:
            for start in self._starts(len(batch), size):
                rows = range(start, min(start + size, len(batch)))
                yield self._respond(batch.select(rows), grid, REFERENCE)
        prompts = [row for row in range(len(batch)) for _ in range(len(grid))]
        points = list(range(len(grid))) * len(batch)
        for start in self._starts(len(prompts), size):
            part = slice(start, start + size)
            yield self._respond(batch.select(prompts[part]), grid, points[part])

    def _starts(self, rows: int, size: int) -> list[int]:
        """Where parts of ``size`` rows begin; the last comes again while others have more.

        Devices that share the weights must ask the policy equally often; what comes twice is
        counted once.
        """
        starts = list(range(0, rows, size))
        return starts + starts[-1:] * (self.policy.most(len(starts)) - len(starts))

    def _respond(
        self, batch: PromptBatch, grid: Preference, points: list[int] | int
    ) -> tuple[Rollout, Tensor]:
        if isinstance(points, int):
            preference = uniform_preference(len(batch), grid.num_rewards).to(self.device)
            asked = replace(batch, preference=preference)
            with self.policy.reference():
                rollout = self.engine.generate(self.policy, asked, self.eval_samples, self.sampling)
            return rollout, torch.full((len(rollout),), points)
        asked = replace(batch, preference=grid[torch.tensor(points)].to(self.device))
        rollout = self.engine.generate(self.policy, asked, self.eval_samples, self.sampling)
        return rollout, torch.tensor(points)[rollout.groups.cpu()]

    def _add(self, rollout: Rollout, point: Tensor) -> None:
        scores = ask_rewards(self, rollout)  # type: ignore[arg-type]
        ratio = torch.zeros(len(rollout))
        if int(point[0]) != REFERENCE:
            with self.policy.reference():
                ref_logp = self.policy.logprobs(rollout)
            ratio = masked_sum(log_ratio(self._logprobs(rollout), ref_logp), rollout.response_mask)
        kept = scores.kept.cpu()
        self.front.update(
            point=point[kept],
            prompt_ids=rollout.prompt_ids[kept],
            sample=rollout.sample[kept],
            rewards=scores.raw.cpu()[kept],
            normalized=self.rewards.normalize(scores.raw).cpu()[kept],
            log_ratio=ratio.cpu()[kept],
            length=rollout.lengths.cpu()[kept],
            truncated=rollout.truncated.cpu()[kept],
        )

    def _logprobs(self, rollout: Rollout) -> Tensor:
        """Of the distribution that was sampled from: the sampler's own where it kept them."""
        if rollout.logp is not None:
            return rollout.logp
        return self.engine.logprobs(self.policy, rollout)

    def _record(self, rollout: Rollout, raw: Tensor, row: int) -> dict[str, Any]:
        names = self.rewards.names
        # The shortest number that float32 keeps as this one: 0.1, not 0.10000000149.
        scores = [None if value.isnan() else float(str(value.numpy())) for value in raw.cpu()]
        return {
            "prompt_id": int(rollout.prompt_ids[row]),
            "sample": int(rollout.sample[row]),
            "prompt": rollout.prompts[row],
            "completion": rollout.completions[row],
            **rollout.preference[row : row + 1].to_dicts(names)[0],
            "truncated": bool(rollout.truncated[row]),
            "rewards": dict(zip(names, scores, strict=True)),
        }
