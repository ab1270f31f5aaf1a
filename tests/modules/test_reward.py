"""Reward models: TRL's loss and gradients, plain torch's on labels, and the folder they write."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from clp_lightning import (
    ClassifierHead,
    ClassLabels,
    PreferencePairs,
    Pretrained,
    RewardDataModule,
    RewardModule,
    RunCheckpoint,
    ScalarLabels,
    Supervision,
)
from clp_lightning.cli import main
from tests.reward_models import (
    as_chat,
    make_data,
    make_module,
    make_trainer,
    pairs,
    turn,
    without_prompt,
)
from tests.runs import Capture, write_config


def with_head(base: Path, folder: Path, **options: Any) -> Path:
    """A classifier's folder: the trunk of ``base`` and a head from a fixed seed."""
    module = make_module(base, **options)
    module.configure_model()
    module.save(folder)
    return folder


def one_step(
    base: Path | Pretrained,
    data: RewardDataModule,
    folder: Path,
    supervision: Supervision | None = None,
    **options: Any,
) -> tuple[float, list[Tensor | None]]:
    """Loss and gradients of one optimizer step."""
    Capture.gradients.clear()
    module = make_module(base, supervision=supervision, optimizer=Capture, lr=0.0)
    trainer = make_trainer(folder, **options)
    trainer.fit(module, data)
    return float(trainer.callback_metrics["train/loss"]), Capture.gradients[0]


@torch.no_grad()
def plain_scores(folder: Path, texts: list[str], **options: Any) -> Tensor:
    """By plain Transformers, each text alone and unpadded, shape (N, outputs)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    return torch.cat([model(**tokenizer(t, return_tensors="pt", **options)).logits for t in texts])


@pytest.mark.parametrize("form", ["prompt", "no prompt", "chat", "whole chat", "margin"])
def test_loss_and_gradients_are_those_of_trl(
    form: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    from trl import RewardConfig, RewardTrainer

    chat = "chat" in form
    rows = pairs(8)
    if chat:
        rows = [as_chat(row) for row in rows]
    if form in ("no prompt", "whole chat"):
        rows = [without_prompt(row) for row in rows]
    rows[3] |= {
        name: rows[0][name] for name in ("prompt", "chosen") if name in rows[0]
    }  # is read once
    if form == "margin":
        rows = [{**row, "margin": 0.3 * i - 0.5} for i, row in enumerate(rows)]
    base = with_head(tiny_folder(chat=chat), tmp_path / "base")
    data = make_data(rows, holdout=0, batch_size=8)
    loss, gradients = one_step(base, data, tmp_path)

    settings = RewardConfig(
        str(tmp_path / "trl"),
        per_device_train_batch_size=8,
        use_cpu=True,
        bf16=False,
        report_to=[],
        gradient_checkpointing=False,
    )
    twin = RewardTrainer(
        AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32),
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    (batch,) = list(twin.get_train_dataloader())
    assert len(batch["input_ids"]) == 16 and ("margin" in batch) == (form == "margin")
    expected = twin.compute_loss(twin.model.train(), batch)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    parameters = list(twin.model.named_parameters())
    assert len(parameters) == len(gradients)
    for (name, parameter), gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(
            gradient, parameter.grad, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_every_row_weighs_alike_however_batches_are_cut(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = Pretrained(str(tiny_folder("gpt2")), dtype="float64")
    whole, cut = (
        one_step(base, make_data(pairs(), batch_size=size), tmp_path, accumulate_grad_batches=n)
        for size, n in ((6, 1), (2, 3))
    )
    between = one_step(
        base,
        make_data(pairs(), batch_size=2),
        tmp_path,
        accumulate_grad_batches=3,
        val_check_interval=1,
        limit_val_batches=1,
    )
    assert whole[0] == pytest.approx(cut[0], rel=1e-6) == between[0]
    for a, b in [*zip(whole[1], cut[1], strict=True), *zip(whole[1], between[1], strict=True)]:
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("named", [False, True])
def test_classes_against_plain_torch(
    named: bool, kind: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    names = ["bad", "fair", "good"]
    supervision = ClassLabels(names)
    base = with_head(tiny_folder(kind), tmp_path / "base", supervision=supervision)
    rows = [{"text": row["prompt"], "label": i % 3} for i, row in enumerate(pairs())]
    given = [{**row, "label": names[row["label"]]} for row in rows] if named else rows
    loss, gradients = one_step(
        base, make_data(given, holdout=0, batch_size=12), tmp_path, supervision=supervision
    )

    model = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32)
    assert model.config.id2label == dict(enumerate(names))
    tokenizer = AutoTokenizer.from_pretrained(base)
    total = torch.zeros(())
    for row in rows:
        labels = torch.tensor([row["label"]])
        total = total + model(**tokenizer(row["text"], return_tensors="pt"), labels=labels).loss
    (total / 12).backward()
    assert loss == pytest.approx(float(total) / 12, rel=1e-5)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)


def test_numbers_against_plain_torch(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    supervision = ScalarLabels()
    base = with_head(tiny_folder(), tmp_path / "base", supervision=supervision)
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": i / 4}
        for i, row in enumerate(pairs())
    ]
    loss, _ = one_step(
        base, make_data(rows, holdout=0, batch_size=12), tmp_path, supervision=supervision
    )
    scores = plain_scores(base, [row["prompt"] + row["completion"] for row in rows])
    labels = torch.tensor([row["label"] for row in rows])
    assert loss == pytest.approx(float(F.mse_loss(scores[:, 0], labels)), rel=1e-5)


def test_accuracy_and_calibration_by_hand(
    tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Leads of log 4 (twice), -log 4 and log 1.5: probabilities .8, .8, .8, .6; right but the third.
    # The bin of .8 holds three, two of them right; that of .6 one, right:
    # 3/4 |2/3 - .8| + 1/4 |1 - .6| = .2.
    leads = torch.tensor([math.log(4), math.log(4), -math.log(4), math.log(1.5)])
    scores = torch.cat([leads, torch.zeros(4)]).unsqueeze(-1)
    module = make_module(tiny_folder())
    monkeypatch.setattr(module, "scores", lambda batch: scores)
    trainer = make_trainer(tmp_path, limit_val_batches=1.0)
    trainer.validate(module, make_data(pairs()), verbose=False)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    expected = -F.logsigmoid(leads).mean()
    assert found["val/accuracy"] == pytest.approx(0.75)
    assert found["val/calibration_error"] == pytest.approx(0.2, abs=1e-6)
    assert found["val/loss"] == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "chat"), [("llama", False), ("llama", True), ("gpt2", False), ("gemma3", False)]
)
def test_it_learns_and_its_folder_scores_alike(
    kind: str, chat: bool, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [as_chat(row) for row in pairs()] if chat else pairs()
    module, data = make_module(tiny_folder(kind, chat=chat), lr=3e-3), make_data(rows)
    trainer = make_trainer(tmp_path, max_epochs=15, max_steps=-1)
    trainer.fit(module, data)
    assert float(trainer.callback_metrics["train/loss"]) < 0.3
    folder = tmp_path / "reward"
    assert {file.name for file in folder.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    (batch,) = data.val_dataloader()
    with torch.no_grad():
        own = module.scores(batch)[:, 0]
    assert own.std() > 0.1
    head = ClassifierHead(str(folder))
    answers = [*batch.columns["chosen"], *batch.columns["rejected"]]
    torch.testing.assert_close(torch.tensor(head(batch.prompts * 2, answers)), own)
    texts = module.supervision.texts(batch)
    if chat:
        texts = module.policy.tokenizer.apply_chat_template(texts, tokenize=False)
    plain = plain_scores(folder, texts, add_special_tokens=not chat)[:, 0]
    torch.testing.assert_close(plain, own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("embeddings", [True, False])
def test_a_seeded_run_repeats_and_resumes(
    embeddings: bool, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    def fit(folder: Path, steps: int, seed: int = 3, **options: Any) -> dict[str, Tensor]:
        module = make_module(tiny_folder(), seed=seed, train_embeddings=embeddings)
        trainer = make_trainer(
            folder,
            max_steps=steps,
            enable_checkpointing=True,
            callbacks=[RunCheckpoint(every_n_train_steps=1)],
        )
        trainer.fit(module, make_data(pairs()), **options)
        return {n: p.detach() for n, p in module.policy.trained_parameters().items()}

    whole = fit(tmp_path / "whole", 4)
    again = fit(tmp_path / "again", 3)
    other = fit(tmp_path / "other", 4, seed=4)
    path = tmp_path / "again/checkpoints/last.ckpt"
    assert torch.load(path, weights_only=True)["state_dict"].keys() == {
        f"policy.{n}" for n in whole
    }
    resumed = fit(tmp_path / "again", 4, ckpt_path=path)
    for name, value in whole.items():
        assert torch.equal(resumed[name], value)
    assert any(not torch.equal(again[name], value) for name, value in whole.items())
    assert not torch.equal(other["model.score.weight"], whole["model.score.weight"])
    found = RewardModule.load_from_checkpoint(path, weights_only=True)
    assert isinstance(found.supervision, PreferencePairs)
    assert (
        found.policy.train_embeddings == embeddings == ("model.model.embed_tokens.weight" in whole)
    )
    saved = load_file(tmp_path / "whole/reward/model.safetensors")["model.embed_tokens.weight"]
    before = load_file(tiny_folder() / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(saved, before) != embeddings


def test_long_texts_lose_their_beginning_and_it_is_told(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    module = make_module(tiny_folder(), max_length=5)
    trainer = make_trainer(tmp_path)
    rows = [{"chosen": "a" * (i + 1), "rejected": "b" * 12 + "so"} for i in range(8)]
    data = make_data(rows, holdout=0, batch_size=8)
    with pytest.warns(UserWarning, match="11 of 16 texts of a batch are longer than max_length"):
        trainer.fit(module, data)
    assert float(trainer.callback_metrics["train/truncated"]) == pytest.approx(11 / 16)
    inputs, cut = module.policy.tokens(["b" * 12 + "so", "xy"])
    assert cut.tolist() == [True, False]
    assert module.policy.tokenizer.decode(inputs["input_ids"][0]) == "bbbso"
    assert inputs["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0]]


def test_the_command_line_trains_on_a_jsonl_file(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(as_chat(row)) + "\n" for row in pairs()))
    config = {
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 2,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(tmp_path), "name": "run", "version": ""},
            },
        },
        "model": {
            "class_path": "RewardModule",
            "init_args": {
                "pretrained": str(tiny_folder(chat=True)),
                "supervision": "PreferencePairs",
            },
        },
        "data": {
            "class_path": "RewardDataModule",
            "init_args": {"source": str(rows), "holdout": 4, "batch_size": 4},
        },
    }
    main(["fit", "--config", write_config(tmp_path / "config.yaml", config)])
    head = ClassifierHead(str(tmp_path / "run/reward"))
    scores = head([turn("user", "tea?")], [turn("assistant", "owl")])
    assert math.isfinite(scores[0] or math.nan)
