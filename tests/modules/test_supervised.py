"""The supervised loss, its accumulation, and the folder that it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from lightning.pytorch import Trainer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from clp_lightning import (
    Pretrained,
    PromptBatch,
    PromptDataModule,
    Rollout,
    Rouge,
    RunCheckpoint,
    SupervisedModule,
)
from tests.runs import Capture, make_data, read_lines
from tests.tiny import CHAT_TEMPLATE, ENCODER_DECODERS, EOS, save_tiny

# The tiny template with the marks that TRL reads the assistant's turns from.
MARKED = CHAT_TEMPLATE.replace(
    "{{ message['content'] }}<|end|>\n{% endfor %}",
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|end|>"
    "{% endgeneration %}{% else %}{{ message['content'] }}<|end|>{% endif %}\n{% endfor %}",
)


def make_module(base: Path | Pretrained, **options: Any) -> SupervisedModule:
    arguments: dict[str, Any] = {"response_column": "answer", "lora_rank": 2, "lr": 1e-2, "seed": 3}
    return SupervisedModule(
        base if isinstance(base, Pretrained) else str(base), **(arguments | options)
    )


def make_trainer(folder: Path, **options: Any) -> Trainer:
    arguments: dict[str, Any] = {
        "accelerator": "cpu",
        "default_root_dir": folder,
        "logger": False,
        "enable_checkpointing": False,
        "max_steps": 4,
        "limit_val_batches": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**(arguments | options))


def plain_loss(folder: Path, rows: list[dict[str, Any]]) -> Tensor:
    """Mean over response tokens, each row alone and unpadded, by Transformers' own loss."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, count = torch.zeros(()), 0
    for row in rows:
        prompt, answer = (
            tokenizer(row[name], add_special_tokens=False)["input_ids"]
            for name in ("prompt", "answer")
        )
        answer = [*answer, EOS]
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss
        total, count = total + loss * len(answer), count + len(answer)
    return total / count


def test_the_loss_is_the_mean_over_response_tokens(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_folder()
    data = make_data(tmp_path)
    rows = read_lines(tmp_path / "rows.jsonl")
    trainer = make_trainer(tmp_path, max_steps=1, accumulate_grad_batches=3, limit_val_batches=1.0)
    module = make_module(base, lr=0.0)
    trainer.fit(module, data)
    data = make_data(tmp_path)  # at its first pass
    data.setup()
    trained = [row for batch in list(data.train_dataloader())[:3] for row in batch.prompt_ids]
    expected = plain_loss(base, [rows[int(row)] for row in trained])
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(float(expected), rel=1e-5)
    trainer.validate(module, data)
    held_out = [row for batch in data.val_dataloader() for row in batch.prompt_ids]
    expected = plain_loss(base, [rows[int(row)] for row in held_out])
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(float(expected), rel=1e-5)


def test_every_token_weighs_alike_however_batches_are_cut(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = Pretrained(str(tiny_folder("gpt2")), dtype="float64")
    found = []
    between = {"val_check_interval": 1, "limit_val_batches": 1}  # a validation after each of them
    for size, accumulate, options in ((6, 1, {}), (2, 3, {}), (2, 3, between)):
        Capture.gradients.clear()
        module = make_module(base, optimizer=Capture, lr=0.0)
        trainer = make_trainer(tmp_path, max_steps=1, accumulate_grad_batches=accumulate, **options)
        trainer.fit(module, make_data(tmp_path, batch_size=size))
        found.append(Capture.gradients[0])
    assert any(g is not None and g.any() for g in found[0])
    for gradients in found[1:]:
        for a, b in zip(found[0], gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def save_chat(folder: Path) -> Path:
    """A tiny chat model whose tokenizer's stop token closes the turns, as in real ones."""
    save_tiny(folder, "llama", chat=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token, tokenizer.chat_template = "<|end|>", MARKED
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("form", ["text", "chat", "all turns", "all turns of a response"])
def test_loss_and_gradients_are_those_of_trl(form: str, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    base = save_chat(tmp_path / "base")
    words = ["tea", "fog", "ink", "owl"]
    rows: list[dict[str, Any]] = [
        {"prompt": f"{word} is" + " ?" * i, "completion": f" {word * (i + 1)}."}
        for i, word in enumerate(words)
    ]
    theirs = rows
    if form != "text":
        rows = theirs = [
            {
                "prompt": [turn("user", row["prompt"])],
                "completion": [turn("assistant", row["completion"])],
            }
            for row in rows
        ]
    if "all turns" in form:
        again = [turn("user", "And?"), turn("assistant", "No more.")]
        theirs = [{"messages": row["prompt"] + row["completion"] + again} for row in rows]
        rows = theirs
    if form == "all turns of a response":
        rows = [{"prompt": r["messages"][:1], "completion": r["messages"][1:]} for r in theirs]

    Capture.gradients.clear()
    turns = "all" if form == "all turns" else "response"
    module = SupervisedModule(
        str(base), assistant_turns=turns, lora_rank=0, optimizer=Capture, lr=0.0
    )
    data = PromptDataModule(Dataset.from_list(rows), holdout=0, batch_size=4)
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(module, data)

    settings = SFTConfig(
        str(tmp_path / "trl"),
        per_device_train_batch_size=4,
        assistant_only_loss="all turns" in form,
        use_cpu=True,
        bf16=False,
        report_to=[],
        gradient_checkpointing=False,
    )
    twin = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=settings,
        train_dataset=Dataset.from_list(theirs),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    (batch,) = list(twin.get_train_dataloader())
    learnt = int((batch["labels"] != -100).sum())
    answers = sum(len(word) * (i + 1) + 3 for i, word in enumerate(words))  # " ", "." and a stop
    assert learnt == answers + (4 * len("No more.<") if "all turns" in form else 0)
    expected = twin.compute_loss(twin.model.train(), batch)
    expected.backward()
    loss = float(trainer.callback_metrics["train/loss"])
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for (name, parameter), gradient in zip(
        twin.model.named_parameters(), Capture.gradients[0], strict=True
    ):
        torch.testing.assert_close(
            gradient, parameter.grad, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_every_assistant_turn_answers_the_turns_before_it(tmp_path: Path) -> None:
    greeting, ask, say, more = (
        turn("assistant", "Hi."),
        turn("user", "tea"),
        turn("assistant", "hot"),
        turn("user", "more"),
    )
    batch = PromptBatch(
        [[greeting, ask, say, more], [ask]],
        torch.tensor([7, 9]),
        {"completion": [[turn("assistant", "no")], [say, more, turn("assistant", "yes")]]},
    )
    found = {}
    for turns in ("response", "all"):
        module = SupervisedModule(str(save_chat(tmp_path / turns)), assistant_turns=turns)
        module.configure_model()
        rollout = module.encode(batch)
        found[turns] = list(
            zip(rollout.prompt_ids.tolist(), rollout.prompts, rollout.completions, strict=True)
        )
    answered = [
        (7, [greeting, ask], "hot"),  # nobody asked for the greeting
        (7, [greeting, ask, say, more], "no"),
        (9, [ask], "hot"),
        (9, [ask, say, more], "yes"),
    ]
    assert found == {"response": answered[1:], "all": answered}
    for prompt, answer in ((batch.prompts[0], [ask]), ("tea", [ask, say])):
        wrong = PromptBatch([prompt], torch.tensor([8]), {"completion": [answer]})
        with pytest.raises(ValueError, match="Row 8: the response has turns of .* needs one of"):
            module.encode(wrong)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_rouge_is_that_of_transformers_greedy_answers(
    kind: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base, data = tiny_folder(kind), make_data(tmp_path)
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    model, tokenizer = auto.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    rows = read_lines(tmp_path / "rows.jsonl")
    answers = []
    for row in rows:
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        out = model.generate(ids, do_sample=False, max_new_tokens=6)[0]
        new = out[1:] if kind == "t5" else out[ids.shape[1] :]
        answers.append(tokenizer.decode(new, skip_special_tokens=True))
        row["answer"] = f"{answers[-1]} owl"  # part of it is right
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text)
    trainer = make_trainer(tmp_path, limit_val_batches=1.0)
    trainer.validate(make_module(base, rouge=True, max_response_tokens=6), data, verbose=False)
    held_out = [int(i) for batch in data.val_dataloader() for i in batch.prompt_ids]
    scores = Rouge("answer")(
        [""] * 4,
        [answers[i] for i in held_out],
        answer=[rows[i]["answer"] for i in held_out],
    )
    expected = sum(score for score in scores if score is not None) / 4
    assert 0.1 < expected < 0.9
    assert float(trainer.callback_metrics["val/rougeL"]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", *ENCODER_DECODERS])
def test_it_learns_and_writes_a_plain_folder(
    kind: str, lora_rank: int, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_folder(kind)
    module, data = make_module(base, lora_rank=lora_rank), make_data(tmp_path)
    trainer = make_trainer(tmp_path, max_steps=6, limit_val_batches=1.0)
    trainer.validate(module, data, verbose=False)
    before = float(trainer.callback_metrics["val/loss"])
    trainer.fit(module, data)
    trainer.validate(module, data, verbose=False)
    after = float(trainer.callback_metrics["val/loss"])
    assert after < before - 0.1

    # As a base of its own, without any adapter, it gives the same loss.
    again = make_module(tmp_path / "base")
    trainer = make_trainer(tmp_path, limit_val_batches=1.0)
    trainer.validate(again, data, verbose=False)
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(after, rel=1e-4)
    names = {file.name for file in (tmp_path / "base").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any("adapter" in name or "partial" in name for name in names)


def test_checkpoints_hold_the_adapter_only_and_resume(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    def fit(folder: Path, steps: int, **options: Any) -> SupervisedModule:
        module = make_module(tiny_folder())
        checkpoint = RunCheckpoint(every_n_train_steps=1)
        trainer = make_trainer(
            folder, max_steps=steps, enable_checkpointing=True, callbacks=[checkpoint]
        )
        folder.mkdir(exist_ok=True)
        trainer.fit(module, make_data(folder), **options)
        return module

    whole = fit(tmp_path / "whole", 5)
    fit(tmp_path / "part", 3)
    path = tmp_path / "part/checkpoints/last.ckpt"
    state = torch.load(path, weights_only=True)["state_dict"]
    assert state and all("lora_" in name for name in state)
    resumed = fit(tmp_path / "part", 5, ckpt_path=path)
    for name, parameter in whole.policy.trained_parameters().items():
        assert torch.equal(resumed.policy.trained_parameters()[name], parameter)
    found = SupervisedModule.load_from_checkpoint(path, weights_only=True)
    assert found.response_column == "answer"


def test_long_responses_are_cut_and_have_no_stop_token(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    module, data = make_module(tiny_folder(), max_response_tokens=3), make_data(tmp_path)
    make_trainer(tmp_path, max_steps=1).fit(module, data)
    rollout = module.encode(next(iter(data.train_dataloader())))
    assert rollout.response_ids.shape[1] == 3  # "tea." has four tokens and a stop token
    assert not (rollout.response_ids == EOS).any() and rollout.truncated.all()


def test_responses_may_be_messages(tiny_folder: Callable[..., Path]) -> None:
    module = make_module(tiny_folder(), response_column="completion")
    module.configure_model()

    def encode(*answers: Any) -> Rollout:
        columns = {"completion": list(answers)}
        ids = torch.arange(5, 5 + len(answers))
        return module.encode(PromptBatch(["tea"] * len(answers), ids, columns))

    rollout = encode([{"role": "assistant", "content": "owl"}], "owl")
    assert rollout.completions == ["owl", "owl"]
    assert torch.equal(rollout.response_ids[0], rollout.response_ids[1])
    for wrong in (None, 3, [], ["owl"], [{"role": "assistant", "content": None}]):
        with pytest.raises(ValueError, match="Row 6: the response in column 'completion' is "):
            encode("owl", wrong)


def test_a_missing_column_is_named_before_the_model_is_loaded(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    module = make_module(tiny_folder(), response_column="summary")
    with pytest.raises(ValueError, match=r"no column 'summary' .* \['answer', 'topic'\]. Set resp"):
        make_trainer(tmp_path).fit(module, make_data(tmp_path))
    assert not module.policy.is_built
