"""AUC by hand, cross-encoders and several heads: RewardModule for a consistency reward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from clp_lightning import (
    ClassifierHead,
    ClassLabels,
    CrossEncoderHead,
    PreferencePairs,
    PromptBatch,
    RewardDataModule,
    ScalarLabels,
)
from tests.reward_models import as_chat, make_data, make_module, make_trainer, pairs
from tests.rewards.test_nli import nli_model

CLASSES = ["corrupted", "consistent"]


def score_of(batch: PromptBatch) -> Tensor:
    """What the texts say themselves."""
    return torch.tensor([[float(answer)] for _, answer in PreferencePairs().answered(batch)])


def test_auc_by_hand(
    tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of swapped words .9 beats .8 and .1, .3 beats .1: 3 of 4; of others both beat both. Together
    # .9 beats three, .3 two, 30 and 25 all four: 13 of 16. In float32 30 and 20 are equally sure.
    rows = [
        {"prompt": "p", "chosen": chosen, "rejected": rejected, "kind": kind}
        for chosen, rejected, kind in (
            ("0.9", "0.8", "swapped"),
            ("30", "20", "other"),
            ("0.3", "0.1", "swapped"),
            ("25", "-2", "other"),
        )
    ]
    module = make_module(tiny_folder(), auc_by="kind")
    monkeypatch.setattr(module, "scores", score_of)
    trainer = make_trainer(tmp_path, limit_val_batches=1.0)
    train = [{**row, "kind": "never held out"} for row in rows]
    data = RewardDataModule(
        Dataset.from_list(train), eval_source=Dataset.from_list(rows), batch_size=2
    )
    trainer.validate(module, data, verbose=False)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert found["val/auc/swapped"] == pytest.approx(3 / 4)
    assert found["val/auc/other"] == pytest.approx(1.0)
    assert found["val/auc"] == pytest.approx(13 / 16)
    assert "val/auc/never held out" not in found


def test_what_is_ranked() -> None:
    scores = torch.tensor([[0.5, 2.0], [1.0, -1.0]])
    batch = PromptBatch(["p"] * 2, torch.arange(2), {"label": ["consistent", 0]})
    found = ClassLabels(CLASSES).ranking(scores, batch)
    assert found is not None
    assert found[0].tolist() == [1.5, -2.0] and found[1].tolist() == [True, False]
    assert ClassLabels(["a", "b", "c"]).ranking(torch.zeros(2, 3), batch) is None
    assert ScalarLabels().ranking(scores, batch) is None


def test_an_unknown_column_is_named_before_the_model_is_loaded(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    module = make_module(tiny_folder(), auc_by="kind")
    with pytest.raises(ValueError, match="auc_by names the column 'kind'; there are"):
        make_trainer(tmp_path).fit(module, make_data(pairs()))
    assert not module.policy.is_built


def labelled(number: int = 12) -> list[dict[str, Any]]:
    return [
        {"prompt": row["prompt"], "completion": f"say {row['chosen']}", "label": CLASSES[i % 2]}
        for i, row in enumerate(pairs(number))
    ]


@pytest.mark.parametrize("max_length", [512, 14])
def test_a_cross_encoder_is_scored_alike_as_a_reward(max_length: int, tmp_path: Path) -> None:
    base = nli_model(tmp_path / "base")
    module = make_module(
        Path(base), supervision=ClassLabels(CLASSES), max_length=max_length, cross_encoder=True
    )
    data = make_data(labelled())
    make_trainer(tmp_path).fit(module, data)
    (batch,) = data.val_dataloader()
    with torch.no_grad():
        own = module.scores(batch).log_softmax(-1)[:, 1]
    reward = CrossEncoderHead(
        str(tmp_path / "reward"), "text", label="consistent", max_length=max_length
    )
    found = reward(["unused"] * 4, batch.columns["completion"], text=batch.prompts)
    torch.testing.assert_close(torch.tensor(found), own)
    assert own.std() > 0

    # And by plain Transformers, each pair alone.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "reward")
    tokenizer.truncation_side = "right"
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    options: dict[str, Any] = {"truncation": "only_first", "max_length": max_length}
    cut = False
    for prompt, answer, expected in zip(
        batch.prompts, batch.columns["completion"], own, strict=True
    ):
        inputs = tokenizer(prompt, answer, return_tensors="pt", **options)
        cut |= inputs["input_ids"].shape[1] == max_length
        logp = plain(**inputs).logits.log_softmax(-1)[0, 1]
        torch.testing.assert_close(logp, expected, rtol=1e-4, atol=1e-5)
    assert cut == (max_length == 14)


def test_a_cross_encoder_from_pairs(tmp_path: Path) -> None:
    module = make_module(Path(nli_model(tmp_path / "base")), cross_encoder=True)
    data = make_data(pairs())
    make_trainer(tmp_path).fit(module, data)
    (batch,) = data.val_dataloader()
    with torch.no_grad():
        own = module.scores(batch)[:, 0]
    answers = [*batch.columns["chosen"], *batch.columns["rejected"]]
    reward = CrossEncoderHead(str(tmp_path / "reward"), "text")
    found = reward(["unused"] * 8, answers, text=batch.prompts * 2)
    torch.testing.assert_close(torch.tensor(found), own)


def test_nothing_may_be_the_worse_answer_to_a_prompt(tmp_path: Path) -> None:
    module = make_module(Path(nli_model(tmp_path / "base")), cross_encoder=True, lr=0.03)
    rows = [{**row, "rejected": ""} for row in pairs()]
    make_trainer(tmp_path, max_steps=8).fit(module, make_data(rows))
    reward = CrossEncoderHead(str(tmp_path / "reward"), "text")
    chosen, nothing = reward(["unused"] * 2, [rows[0]["chosen"], ""], text=[rows[0]["prompt"]] * 2)
    assert chosen is not None and nothing is not None and chosen > nothing + 1
    for change in ({"chosen": ""}, {"prompt": "", "rejected": ""}):
        batch = PromptBatch(
            [change.get("prompt", "p")],
            torch.arange(1),
            {"chosen": [change.get("chosen", "a")], "rejected": [""]},
        )
        with pytest.raises(ValueError, match="it must be text or messages, and not empty"):
            PreferencePairs().check(batch)


def test_what_a_cross_encoder_cannot_read(tmp_path: Path) -> None:
    base = Path(nli_model(tmp_path / "base"))
    options: dict[str, Any] = {"supervision": ClassLabels(CLASSES), "cross_encoder": True}
    chats = [{**as_chat(row), "label": 1} for row in pairs()]
    with pytest.raises(ValueError, match="is a conversation; a cross-encoder reads"):
        make_trainer(tmp_path).fit(make_module(base, **options), make_data(chats))


def test_an_answer_that_leaves_no_room_is_cut_to_half(tmp_path: Path) -> None:
    module = make_module(Path(nli_model(tmp_path / "base")), max_length=12, cross_encoder=True)
    module.configure_model()
    # Ten characters and two marks leave no room; nine leave room for one.
    texts = [("document", "abcdefghij"), ("document", "abcdefghi"), ("doc", "abc")]
    inputs, cut = module.policy.tokens(texts)
    found = module.policy.tokenizer.batch_decode(inputs["input_ids"], skip_special_tokens=True)
    assert found == ["docuabcdef", "dabcdefghi", "docabc"]
    assert cut.tolist() == [True, True, False]


def test_several_heads_on_one_trunk(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Each head has its own column, and the loss is that of Transformers' own regression."""
    names = ["helpful", "short"]
    rows = [
        {"text": row["prompt"], "helpful": float(i), "short": 1 - i / 4}
        for i, row in enumerate(pairs(8))
    ]
    module = make_module(tiny_folder(), supervision=ScalarLabels(names), lr=0.0)
    trainer = make_trainer(tmp_path)
    trainer.fit(module, make_data(rows, holdout=0, batch_size=8))

    folder = tmp_path / "reward"
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert plain.config.id2label == dict(enumerate(names))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    labels = torch.tensor([[row["helpful"], row["short"]] for row in rows])
    with torch.no_grad():
        expected = plain(**inputs, labels=labels)
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(float(expected.loss))
    for column, name in enumerate(names):
        head = ClassifierHead(str(folder), label=name)
        texts: Any = [row["text"] for row in rows]
        found = torch.tensor(head(texts, [""] * 8))
        torch.testing.assert_close(found, expected.logits[:, column])


def test_mistakes_in_several_heads(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    for columns in ([], ["a", "a"]):
        with pytest.raises(ValueError, match="columns must be different names, at least one"):
            ScalarLabels(columns)
    module = make_module(tiny_folder(), supervision=ScalarLabels(["helpful", "short"]))
    rows = [{"text": "so", "helpful": 1.0, "short": None if i == 3 else 2.0} for i in range(8)]
    with pytest.raises(ValueError, match="Row 3: the short is None; it must be a finite number"):
        make_trainer(tmp_path).fit(module, make_data(rows))
