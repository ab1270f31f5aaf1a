"""Entailment: found by name, equal to plain Transformers, cut on the document's side only."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import (
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from clp_lightning import NLIClassifier, NLITextToText, RewardBank, RewardError
from tests.rewards.classifiers import nli_model, save_classifier
from tests.rewards.rollouts import rollout
from tests.tiny import PAD

DOCUMENTS = ["The tea is hot.", "An owl slept in the old barn all day long.", "Fog."]
SUMMARIES = ["Tea is hot.", "An owl sang", ""]


def scores(reward: Any, completions: list[str] = SUMMARIES, **columns: Any) -> torch.Tensor:
    bank = RewardBank({"nli": reward})
    bank.check_columns(["document"])
    columns = columns or {"document": DOCUMENTS}
    return bank(rollout(completions, **columns)).raw[:, 0]


@torch.no_grad()
def by_hand(folder: str, pairs: list[tuple[str, str]], column: int) -> torch.Tensor:
    """Log-probabilities of unpadded single pairs, special tokens written out, shape (N,)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rows = []
    for premise, hypothesis in pairs:
        text = f"{premise}<eos>{hypothesis}<eos>"
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        rows.append(model(input_ids=ids).logits[0].log_softmax(-1)[column])
    return torch.stack(rows)


# -- classifiers -----------------------------------------------------------------------------


def test_the_order_of_the_labels_does_not_matter(tmp_path: Path) -> None:
    last = nli_model(tmp_path / "last")
    first = nli_model(tmp_path / "first", order=(2, 0, 1))
    expected = by_hand(last, list(zip(DOCUMENTS, SUMMARIES, strict=True)), column=2)
    assert expected.std() > 0.1
    for folder in (last, first):
        for batch_size in (1, 2, 32):
            got = scores(NLIClassifier(folder, batch_size=batch_size))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "labels",
    [
        ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"],
        ["not_entailment", "neutral", "Entailment"],
        ["refuted", "unknown", "entailed"],
    ],
)
def test_the_label_is_known_by_its_name(tmp_path: Path, labels: list[str]) -> None:
    folder = nli_model(tmp_path, labels)
    head = NLIClassifier(folder)
    assert torch.equal(scores(head), scores(NLIClassifier(folder, label=labels[2].lower())))
    assert head._column == 2


@pytest.mark.parametrize(
    "labels",
    [
        ["LABEL_0", "LABEL_1", "LABEL_2"],
        ["contradiction", "neutral", "not_entailment"],
        ["entailment", "neutral", "entailed"],
    ],
)
def test_a_model_without_the_label_is_refused_by_name(tmp_path: Path, labels: list[str]) -> None:
    folder = nli_model(tmp_path / "some-model", labels)
    with pytest.raises(ValueError, match="some-model' is no NLI classifier") as raised:
        NLIClassifier(folder).load()
    assert str(labels) in str(raised.value) and "`label`" in str(raised.value)
    head = NLIClassifier(folder, label=labels[0])
    assert torch.isfinite(scores(head)).all() and head._column == 0


def test_a_reward_model_is_no_nli_classifier(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path, "bert", ["entailment"])  # the log-probability would be 0
    with pytest.raises(ValueError, match="two or more labels"):
        NLIClassifier(str(folder)).load()


def test_only_the_end_of_the_document_is_cut(tmp_path: Path) -> None:
    folder = nli_model(tmp_path)
    head = NLIClassifier(folder, max_length=20)
    documents = ["abcdefgh" + "x" * 80, "abcdefg"]
    got = scores(head, ["It is tea."] * 2, document=documents)
    # 20 tokens: 8 of the document, 10 of the completion and two marks.
    expected = by_hand(folder, [("abcdefgh", "It is tea."), ("abcdefg", "It is tea.")], column=2)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RewardError, match=r"leaves no room for a document: 20 tokens.*reads 20"):
        scores(head, ["It is green tea...", "Tea."], document=documents)


def test_no_document_is_no_score(tmp_path: Path) -> None:
    folder = nli_model(tmp_path)
    got = scores(NLIClassifier(folder), document=[None, DOCUMENTS[1], None])
    assert got.isnan().tolist() == [True, False, True]
    with pytest.raises(ValueError, match=r"'nli' needs the columns \['article'\]"):
        scores(NLIClassifier(folder, document="article"))


# -- text to text ----------------------------------------------------------------------------


@torch.no_grad()
def answered(folder: Path, texts: list[str], ids: list[int]) -> torch.Tensor:
    """Log-probability that the decoder writes ``ids``, token by token, of unpadded single rows."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    rows = []
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt")
        written, total = [model.config.decoder_start_token_id], torch.tensor(0.0)
        for token in ids:
            logits = model(**inputs, decoder_input_ids=torch.tensor([written])).logits[0, -1]
            total = total + logits.log_softmax(-1)[token]
            written.append(token)
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["t5", "t5_v1_1"])
def test_text_to_text_by_hand(tiny_folder: Callable[..., Path], kind: str) -> None:
    folder = tiny_folder(kind)
    one, zero, space = (
        AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(c) for c in "10 "
    )
    texts = [
        "premise: The tea is hot. hypothesis: Tea is hot.",
        "premise: An owl slept in the old barn all day long. hypothesis: An owl sang",
        "premise: Fog. hypothesis: ",
    ]
    expected = answered(folder, texts, [one])
    assert expected.std() > 0.1
    for batch_size in (1, 2, 32):
        got = scores(NLITextToText(str(folder), batch_size=batch_size))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    # Among the whole vocabulary, not against "0" alone.
    both = torch.stack([expected, answered(folder, texts, [zero])])
    assert (both.log_softmax(0)[0] - expected > 0.1).all()
    longer = scores(NLITextToText(str(folder), answer=" 1"))
    torch.testing.assert_close(longer, answered(folder, texts, [space, one]), rtol=1e-4, atol=1e-5)


def test_the_decoder_starts_where_its_config_says(tiny_folder: Callable[..., Path]) -> None:
    texts = [f"premise: {d} hypothesis: {s}" for d, s in zip(DOCUMENTS, SUMMARIES, strict=True)]
    got = {}
    for start in (PAD, 7):
        folder = tiny_folder("t5", decoder_start_token_id=start)
        got[start] = scores(NLITextToText(str(folder)))
        one = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("1")
        expected = answered(folder, texts, [one])
        torch.testing.assert_close(got[start], expected, rtol=1e-4, atol=1e-5)
    assert (got[PAD] - got[7]).abs().max() > 0.1


def test_text_to_text_cuts_the_document_only(tiny_folder: Callable[..., Path]) -> None:
    folder = tiny_folder("t5")
    head = NLITextToText(str(folder), max_length=40)
    documents = ["hypothesis: " + "x" * 80, "Tea."]
    got = scores(head, ["It is tea."] * 2, document=documents)
    # 9 characters of "premise: ", 8 of the document, 23 of " hypothesis: It is tea.".
    texts = [
        "premise: hypothes hypothesis: It is tea.",
        "premise: Tea. hypothesis: It is tea.",
    ]
    assert len(texts[0]) == 40
    one = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("1")
    torch.testing.assert_close(got, answered(folder, texts, [one]), rtol=1e-4, atol=1e-5)
    with pytest.raises(RewardError, match=r"leaves no room for a document: 40 tokens.*reads 40"):
        scores(head, ["It is tea, green o", "Tea."], document=documents)


def test_the_cut_is_between_pieces_of_words(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """As T5's tokenizer makes them: spaces belong to words, and runs of them are one."""
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    text = "premise: the tea is hot and the fog is cold hypothesis: an owl slept 1 0"
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>"
    )
    core.train_from_iterator([text] * 50, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], special_tokens=[("</s>", 1)]
    )
    folder = shutil.copytree(tiny_folder("t5"), tmp_path / "pieces")
    own = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="</s>", pad_token="<pad>"
    )
    own.save_pretrained(folder)

    pair = ("the  tea is   hot and the fog is cold", "an owl slept")
    head = NLITextToText(str(folder))
    head.load()
    (whole,) = head.tokenize([pair])["input_ids"].tolist()
    assert whole == own(f"premise: {pair[0]} hypothesis: {pair[1]}")["input_ids"]
    tail = own(f" hypothesis: {pair[1]}")["input_ids"]
    for cut in (1, 2, 5):
        head.max_length = len(whole) - cut
        (ids,) = head.tokenize([pair])["input_ids"].tolist()
        assert ids == whole[: len(whole) - len(tail) - cut] + tail


def test_models_that_cannot_answer_are_refused(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="is no text-to-text model: .* use NLIClassifier"):
        NLITextToText(str(tiny_folder("llama"))).load()
    head = NLITextToText(str(tiny_folder("t5")), answer="\N{SNOWMAN}")
    with pytest.raises(ValueError, match="has no tokens for the answer"):
        head.load()
    assert head.model is None


def test_its_own_dtype(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    for head, single in [
        (NLIClassifier(nli_model(tmp_path), dtype="bfloat16"), NLIClassifier(str(tmp_path))),
        (
            NLITextToText(str(tiny_folder("t5")), dtype="bfloat16"),
            NLITextToText(str(tiny_folder("t5"))),
        ),
    ]:
        got, expected = scores(head), scores(single)
        assert head.model.dtype == torch.bfloat16 and not head.model.training
        assert 0 < (got - expected).abs().max() < 0.5
