"""One step beside TRL's RLOO: the same rollout, rewards and reference, through its own trainer.

With K = 1 and KL-to-go off, our return is (1 - alpha) (R - beta KL), beta = alpha / (1 - alpha),
which is (1 - alpha) times TRL's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl import RLOOConfig, RLOOTrainer

from clp_lightning import CLPModule, LoRA, Preference, PromptBatch, Rollout
from clp_lightning.conditioning import Weights
from clp_lightning.functional import masked_sum
from clp_lightning.rewards import Scores
from tests.helpers import prompt_batch
from tests.runs import kind

ALPHA, SCALE, SAMPLES = 0.2, 2.0, 4
PROMPTS = ["tea", "owl and fog?", "a b"]


class WholeSequence(CLPModule):
    """The return of every token holds the KL of the whole response, as in RLOO."""

    def rollout(self, batch: PromptBatch) -> Rollout:
        self.sampled = super().rollout(batch)
        return self.sampled

    def signals(self, scores: Scores, ratio: Tensor, rollout: Rollout) -> Tensor:
        signals = super().signals(scores, ratio, rollout)
        signals[..., -1] = masked_sum(ratio, rollout.response_mask).unsqueeze(-1)
        return signals

    def advantage(self, signals: Tensor, rollout: Rollout) -> Tensor:
        self.advantages = super().advantage(signals, rollout)
        return self.advantages


class Fed(RLOOTrainer):
    """RLOO's trainer, given responses instead of sampling them."""

    responses: list[list[int]]

    def _generate_single_turn(self, prompt_ids: Any, images: Any, fields: Any) -> list[list[int]]:
        return self.responses


def test_advantages_and_gradients(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_folder("llama")
    lora = LoRA(rank=2, scale=SCALE, shared_rank=0, coefficients=Weights())
    module = WholeSequence(
        str(folder), lora, {"kind": kind}, samples_per_prompt=SAMPLES, max_new_tokens=12, seed=0
    )
    module.configure_model()
    module.rewards.leave_raw()
    for parameter in module.policy.trained_parameters().values():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(1))
    preference = Preference(torch.ones(len(PROMPTS), 1), torch.full((len(PROMPTS),), ALPHA))
    batch = prompt_batch(PROMPTS, preference)
    batch.nominal_size = len(batch)
    module.training_step(batch, 0).backward()
    rollout, ours = module.sampled, module.advantages[:, 0]
    assert 0 < rollout.truncated.sum() < len(rollout)

    trainer = trl_trainer(folder, tmp_path, rollout, lora.fold(preference[:1]))
    rows = [{"prompt": prompt} for prompt in rollout.prompts]
    inputs = trainer._generate_and_score_completions(rows)
    assert torch.equal(inputs["completion_mask"].bool(), rollout.response_mask)
    torch.testing.assert_close(ours, (1 - ALPHA) * inputs["advantages"], rtol=1e-4, atol=1e-5)
    assert ours.abs().min() > 1e-3

    trainer._compute_loss(trainer.model, inputs).backward()
    weights = dict(trainer.model.named_parameters())
    for name, layer in lora._layers.items():
        # d loss / d B = scale * (d loss / d weight) A', and likewise for A; c = w = 1.
        full = weights[f"{name}.weight"].grad * (1 - ALPHA) * SCALE
        down, up = layer.lora_A["reward_kind"].weight, layer.lora_B["reward_kind"].weight
        assert up.grad.norm() > 1e-3
        torch.testing.assert_close(up.grad, full @ down.T, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(down.grad, up.T @ full, rtol=1e-3, atol=1e-5)


def trl_trainer(
    folder: Path, run: Path, rollout: Rollout, weights: dict[str, Tensor]
) -> RLOOTrainer:
    """RLOO on the policy's weights, with ``folder`` as its reference."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.load_state_dict(weights)
    args = RLOOConfig(
        output_dir=str(run),
        beta=ALPHA / (1 - ALPHA),
        normalize_advantages=False,
        num_generations=SAMPLES,
        per_device_train_batch_size=len(rollout),
        max_completion_length=rollout.response_ids.shape[1],
        temperature=1.0,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
    )
    data = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS])
    trainer = Fed(model=model, reward_funcs=kind, args=args, train_dataset=data)
    trainer.responses = [
        ids[mask].tolist()
        for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)
    ]
    trainer.model.train()
    return trainer
