"""Rewards that read a document and the completion: natural language inference and its like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from ..pretrained import load_config
from ..types import Prompt
from .base import Completion, completion_text
from .heads import ClassifierHead, Head, Text

__all__ = ["CrossEncoderHead", "NLIClassifier", "NLITextToText"]

_ENTAILED = ("entailment", "entailed")


class _Entailment(Head):
    """Scores (document, completion) pairs; the prompt plays no part."""

    document: str

    def __call__(
        self, prompts: list[Prompt], completions: list[Completion], **columns: Any
    ) -> list[float | None]:
        """A log-probability per completion; None where there is no document."""
        documents: list[str | None] = columns[self.document]
        pairs = {
            row: (document, completion_text(completions[row]))
            for row, document in enumerate(documents)
            if document is not None
        }
        scores: list[float | None] = [None] * len(documents)
        if pairs:
            for row, score in zip(pairs, self.run(list(pairs.values())).tolist(), strict=True):
                scores[row] = score
        return scores

    def too_long(self, hypothesis: str, tokens: int) -> ValueError:
        """What is raised where cutting the document is not enough."""
        return ValueError(
            f"The completion {hypothesis[:80]!r}... leaves no room for a document: {tokens} tokens "
            f"with what stands around it, and '{self.pretrained.name}' reads {self.limit}. Only "
            "documents are cut. Raise max_length, if the model can read more, or lower "
            "max_new_tokens."
        )


class CrossEncoderHead(_Entailment, ClassifierHead):
    """A classifier of text pairs as a reward: of a document and the completion.

    What ``RewardModule(cross_encoder=True)`` trains. With one output its value is the reward; of
    several the one that ``label`` names counts: its log-probability, or its value in a regressor.
    A document that is too long loses its end, a completion nothing.

    Args:
        name: A folder, an installed package that carries a model, or a name on the hub.
        document: Column with the document.
        label: Which output counts, where there are several.
        revision: Branch, tag or commit on the hub.
        device: Where the classifier runs; by default on the policy's device.
        dtype: Floating-point type of its weights.
        batch_size: Pairs per forward pass.
        max_length: Longer pairs are cut to this many tokens.
    """

    def __init__(
        self,
        name: str,
        document: str = "document",
        label: str | None = None,
        revision: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 32,
        max_length: int = 512,
    ) -> None:
        super().__init__(name, label, revision, device, dtype, batch_size, max_length)
        self.document = document
        self.required_columns = (document,)

    def load(self) -> None:
        """Load the classifier and find its label.

        Raises:
            ValueError: naming the labels there are, where the choice is not clear.
        """
        super().load()
        self.tokenizer.truncation_side = "right"

    def tokenize(self, texts: Sequence[Text], add_special_tokens: bool = True) -> Any:
        """Pairs as the tokenizer joins them; only documents are cut."""
        documents, completions = map(list, zip(*texts, strict=True))
        around = self.tokenizer.num_special_tokens_to_add(pair=True)
        plain = self.tokenizer(completions, add_special_tokens=False, verbose=False)["input_ids"]
        for completion, ids in zip(completions, plain, strict=True):
            if len(ids) + around >= self.limit:
                raise self.too_long(completion, len(ids) + around)
        return self.tokenizer(
            documents,
            completions,
            padding=True,
            truncation="only_first",
            max_length=self.limit,
            return_tensors="pt",
        )


class NLIClassifier(CrossEncoderHead):
    """Log-probability that a document entails the completion, by a classifier of text pairs.

    The class is found by its name, "entailment" or "entailed" in capitals or not, because models
    disagree about the order: it is the last of roberta-large-mnli and the first of many others.
    A document that is too long loses its end, a completion nothing.

    Args:
        name: A folder, an installed package that carries a model, or a name on the hub.
        document: Column with the premise.
        label: What the model calls entailment, where it calls it something else.
        revision: Branch, tag or commit on the hub.
        device: Where the classifier runs; by default on the policy's device.
        dtype: Floating-point type of its weights.
        batch_size: Pairs per forward pass.
        max_length: Longer pairs are cut to this many tokens.
    """

    def find_column(self, config: Any) -> int:
        """Which of the model's outputs is entailment.

        Raises:
            ValueError: no class, or more than one, is called entailment; names those there are.
        """
        wanted = _ENTAILED if self.label is None else (self.label.lower(),)
        numbered = [*config.id2label.items(), *((i, name) for name, i in config.label2id.items())]
        found = {int(i) for i, name in numbered if str(name).strip().lower() in wanted}
        if len(found) != 1 or config.num_labels < 2:
            raise ValueError(
                f"'{self.pretrained.name}' is no NLI classifier as it is: exactly one of two or "
                f"more labels must be called {' or '.join(wanted)}, and it has "
                f"{list(config.id2label.values())}. Use another model, or name the label of "
                "entailment with `label`."
            )
        return found.pop()


class NLITextToText(_Entailment):
    """Log-probability that an encoder-decoder answers "1": the document entails the completion.

    For google/t5_xxl_true_nli_mixture (Honovich et al. 2022) and models trained like it: they read
    "premise: ... hypothesis: ..." and write 1 or 0. The probability is that of the answer's tokens
    among the whole vocabulary, and not renormalised against "0". It is the model's own
    likelihood, which is what the log-probability of "entailed" means; the trained models have
    nearly all their mass on the two answers, where both agree; where they have not, on text unlike
    any that they saw, two tiny numbers would be compared, and garbage could win; and T5 writes "0"
    with another number of tokens than "1". A document that is too long loses its end; the
    completion and what stands before it stay whole.

    Args:
        name: A folder, an installed package that carries a model, or a name on the hub.
        document: Column with the premise.
        answer: What the model writes where the premise entails the hypothesis.
        revision: Branch, tag or commit on the hub.
        device: Where the model runs; by default on the policy's device.
        dtype: Floating-point type of its weights.
        batch_size: Texts per forward pass.
        max_length: Longer texts are cut to this many tokens.
    """

    auto_class = AutoModelForSeq2SeqLM

    def __init__(
        self,
        name: str,
        document: str = "document",
        answer: str = "1",
        revision: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 32,
        max_length: int = 512,
    ) -> None:
        super().__init__(name, revision, device, dtype, batch_size, max_length)
        self.document = document
        self.required_columns = (document,)
        self.answer = answer
        self._answer: Tensor

    def load(self) -> None:
        """Load the model, and the tokens of its answer.

        Raises:
            ValueError: it is no encoder-decoder, or has no such answer.
        """
        if self.model is not None:
            return
        name, config = self.pretrained.name, load_config(self.pretrained)
        if not config.is_encoder_decoder or config.decoder_start_token_id is None:
            raise ValueError(
                f"'{name}' is no text-to-text model: NLITextToText needs an encoder-decoder with a "
                "decoder_start_token_id in its config. For a classifier use NLIClassifier."
            )
        super().load()
        ids = self.tokenizer(self.answer, add_special_tokens=False)["input_ids"]
        if not ids or self.tokenizer.unk_token_id in ids:
            self.model = None
            raise ValueError(f"'{name}' has no tokens for the answer {self.answer!r}.")
        self._answer = torch.tensor([config.decoder_start_token_id, *ids])

    def tokenize(self, texts: Sequence[Text], add_special_tokens: bool = True) -> Any:
        """The text of every pair, cut in the document only."""
        rows = [self._ids(*pair) for pair in texts]
        return self.tokenizer.pad({"input_ids": rows}, return_tensors="pt")

    def _ids(self, document: str, completion: str) -> list[int]:
        before = f"premise: {document}"
        whole = self.tokenizer(
            f"{before} hypothesis: {completion}", return_offsets_mapping=True, verbose=False
        )
        ids: list[int] = whole["input_ids"]
        excess = len(ids) - self.limit
        if excess <= 0:
            return ids
        # Characters of every token; those of special tokens are (0, 0).
        spans = whole["offset_mapping"]
        first = next(i for i, (_, end) in enumerate(spans) if end > len("premise: "))
        behind = next(i for i, (start, _) in enumerate(spans) if start >= len(before))
        if behind - excess <= first:
            raise self.too_long(completion, len(ids) - (behind - first))
        return ids[: behind - excess] + ids[behind:]

    def read(self, inputs: Any) -> Tensor:
        """Log-probability of the answer's tokens, shape (N,)."""
        tokens = self._answer.to(self.device).expand(len(inputs["input_ids"]), -1)
        logits = self.model(**inputs, decoder_input_ids=tokens[:, :-1]).logits
        logp: Tensor = logits.float().log_softmax(-1).gather(-1, tokens[:, 1:, None])
        return logp.sum((1, 2))
