"""A sequence classifier: the network of a reward model while it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from .. import pretrained as pretrained_models
from ..conditioning import Unconditioned
from ..pretrained import Pretrained
from ..tuned import merge_adapter
from ..types import Message
from .linear import speed_up_linears
from .policy import Policy

__all__ = ["Classifier"]


class Classifier(Policy):
    """One trunk and one head, both trained; no preference reaches it.

    Texts are read as ``ClassifierHead`` reads them: padded on the right, cut on the left. Pairs are
    read as ``CrossEncoderHead`` reads them.

    Args:
        pretrained: The trunk: a language model, an encoder or a classifier.
        outputs: Names of the head's outputs.
        problem_type: What Transformers calls the task; written into the configuration.
        max_length: Longer texts lose their beginning.
        train_embeddings: Whether the words' embeddings are trained too.
    """

    def __init__(
        self,
        pretrained: str | Pretrained,
        outputs: Sequence[str],
        problem_type: str | None = None,
        max_length: int = 512,
        train_embeddings: bool = True,
    ) -> None:
        super().__init__(pretrained, Unconditioned())
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, not {max_length}.")
        self.outputs, self.problem_type = list(outputs), problem_type
        self.max_length, self.train_embeddings = max_length, train_embeddings

    def build(self, names: Sequence[str] = (), seed: int = 0) -> None:
        """Loads the trunk, with the head of its files or a new one; a second call does nothing.

        Args:
            names: Unused: there are no preferences.
            seed: Key of a new head's weights.

        Raises:
            ValueError: the files lack weights of the trunk itself.
        """
        if self.is_built:
            return
        self.tokenizer = pretrained_models.load_tokenizer(self.pretrained)
        self.tokenizer.padding_side = "right"
        self.model = self._load(seed)
        speed_up_linears(self.model)
        self.conditioner.attach_once(self.model, names, seed)
        if not self.train_embeddings:
            self._embeddings().requires_grad_(False)
        self.train()

    def _embeddings(self) -> nn.Module:
        try:
            return self.model.get_input_embeddings()
        except NotImplementedError:
            raise ValueError(
                f"{type(self.model).__name__} has no table of words' embeddings that could be left "
                "as it is; leave out train_embeddings: false."
            ) from None

    def _load(self, seed: int) -> PreTrainedModel:
        spec = self.pretrained
        config: Any = pretrained_models.load_config(spec)
        config.id2label = dict(enumerate(self.outputs))
        config.label2id = {name: i for i, name in enumerate(self.outputs)}
        config.problem_type = self.problem_type
        # Classifiers of decoders read the last token that is not padding, found by this id.
        config.get_text_config().pad_token_id = self.pad_id
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                pretrained_models.locate(spec),
                config=config,
                dtype=getattr(torch, spec.dtype),
                attn_implementation=spec.attn_implementation,
                trust_remote_code=spec.trust_remote_code,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # a head for other labels gives way to a new one
                output_loading_info=True,
            )
        new = {*loading["missing_keys"], *(key[0] for key in loading["mismatched_keys"])}
        trunk = f"{model.base_model_prefix}."
        # BERT's pooler belongs to the head: masked language models are saved without one.
        if lacking := sorted(n for n in new if n.startswith(trunk) and "pooler" not in n):
            raise ValueError(
                f"The files of '{spec.name}' hold no weights for {', '.join(lacking[:5])} of "
                f"{type(model).__name__}, which would be random. Use another base."
            )
        return model if spec.adapter is None else merge_adapter(model, spec.adapter)

    def tokens(
        self, texts: Sequence[str | list[Message] | tuple[str, str]]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs of the model, shape (B, L), and which texts were cut, shape (B,).

        Args:
            texts: B strings; or B conversations, which go through the chat template; or B pairs,
                of which the first text is cut, at its end, as ``CrossEncoderHead`` cuts it, and
                a second text that would leave it no room is cut to half the limit.

        Raises:
            ValueError: for conversations where there is no chat template.
        """
        tokenizer: Any = self.tokenizer
        pairs, chats = isinstance(texts[0], tuple), isinstance(texts[0], list)
        if chats:
            if tokenizer.chat_template is None:
                raise ValueError(
                    f"The tokenizer of '{self.pretrained.name}' has no chat template, and the data "
                    "are conversations. Use plain texts, or a model with a template."
                )
            texts = tokenizer.apply_chat_template(texts, tokenize=False)
        given: Any = [list(side) for side in zip(*texts, strict=True)] if pairs else [texts]
        options = {"add_special_tokens": not chats, "verbose": False}
        limit = min(self.max_length, tokenizer.model_max_length)
        # The answer is at the end of one text; a pair's document matters most at its beginning.
        tokenizer.truncation_side = "right" if pairs else "left"
        whole = tokenizer(*given, **options)["input_ids"]
        if pairs:
            given[1] = self._with_room(given[1], limit)
        inputs = tokenizer(
            *given,
            padding=True,
            truncation="only_first" if pairs else True,
            max_length=limit,
            return_tensors="pt",
            **options,
        )
        cut = torch.tensor([len(ids) > limit for ids in whole])
        return {name: value.to(self.model.device) for name, value in inputs.items()}, cut

    def _with_room(self, answers: Sequence[str], limit: int) -> list[str]:
        """The answers, less the end of those that would leave no room for a prompt."""
        tokenizer: Any = self.tokenizer
        around = tokenizer.num_special_tokens_to_add(pair=True)
        plain = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
        spans = tokenizer(answers, **plain)["offset_mapping"]
        return [
            answer if len(row) + around < limit else answer[: row[limit // 2][0]]
            for answer, row in zip(answers, spans, strict=True)
        ]

    def scores(self, inputs: dict[str, Tensor]) -> Tensor:
        """What the head says of every text, float32 or wider, shape (B, outputs)."""
        logits: Tensor = self.model(**inputs).logits
        return logits if logits.dtype == torch.float64 else logits.float()
