"""Random classifiers, saved as plain Hugging Face folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from tests.tiny import PAD, VOCABULARY, tiny_tokenizer

LABELS = ["contradiction", "neutral", "entailment"]


def save_classifier(
    folder: Path, kind: str, labels: list[str], chat: bool = False, problem: str | None = None
) -> Path:
    """A random classifier beside the character tokenizer of the tiny models."""
    tiny_tokenizer(chat=chat).save_pretrained(folder)
    common: dict[str, Any] = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.5,
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
        "pad_token_id": PAD,
        "problem_type": problem,
    }
    torch.manual_seed(0)
    model: Any
    if kind == "bert":
        model = BertForSequenceClassification(BertConfig(**common))
    else:
        model = LlamaForSequenceClassification(LlamaConfig(**common))
    model.save_pretrained(folder)
    return folder


def nli_model(folder: Path, labels: list[str] = LABELS, order: tuple[int, ...] = (0, 1, 2)) -> str:
    """A random classifier; row i of its head, and label i, is row ``order[i]`` of the plain one.

    Its tokenizer joins pairs as BERT's does: text <eos> text <eos>.
    """
    save_classifier(folder, "bert", [labels[i] for i in order])
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder)
    model.classifier.weight.data = model.classifier.weight.data[list(order)]
    model.classifier.bias.data = torch.tensor([0.3, -0.2, 0.1])[list(order)]
    model.save_pretrained(folder)
    path = folder / "tokenizer.json"
    core = json.loads(path.read_text())
    mark = {"SpecialToken": {"id": "<eos>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    core["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, mark],
        "pair": [first, mark, second, mark],
        "special_tokens": {"<eos>": {"id": "<eos>", "ids": [1], "tokens": ["<eos>"]}},
    }
    path.write_text(json.dumps(core))
    return str(folder)
