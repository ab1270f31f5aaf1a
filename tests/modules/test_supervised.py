"""The supervised loss, its accumulation, and the folder that it writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from clp_lightning import Pretrained, PromptBatch, Rollout, RunCheckpoint, SupervisedModule
from tests.runs import Capture, make_data, read_lines
from tests.tiny import ENCODER_DECODERS, EOS


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
