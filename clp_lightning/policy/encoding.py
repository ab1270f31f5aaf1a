"""From prompts to padded tokens: chat template, truncation, padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..described import Described, check_choice
from ..types import Message, Prompt

__all__ = ["Encoding", "pad"]


class Encoding(Described):
    """Turns prompts into token ids.

    Conversations go through the model's chat template. A prompt over the limit is shortened
    where it does least harm: the longest user message of a conversation loses its end, so that
    the template and its tail stay whole; a plain string loses its beginning (causal models) or
    its end (encoder-decoder models).

    Args:
        max_prompt_tokens: Limit of a prompt, in tokens.
        on_long: ``truncate`` (counted in ``truncated``) or ``error``.
        chat_template_kwargs: Passed to the chat template, for example ``enable_thinking``.
    """

    def __init__(
        self,
        max_prompt_tokens: int = 512,
        on_long: Literal["truncate", "error"] = "truncate",
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if max_prompt_tokens < 1:
            raise ValueError(f"max_prompt_tokens must be at least 1; got {max_prompt_tokens}.")
        self.max_prompt_tokens = max_prompt_tokens
        self.on_long = check_choice("on_long", on_long, ["truncate", "error"])
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.truncated = 0

    def __call__(
        self,
        prompts: Sequence[Prompt],
        tokenizer: PreTrainedTokenizerBase,
        keep: str = "end",
        rewrite: Callable[[int, Prompt], Prompt] | None = None,
    ) -> list[list[int]]:
        """Token ids of every prompt.

        Args:
            prompts: Strings or conversations.
            tokenizer: The policy's.
            keep: Which part of a plain string survives truncation, ``end`` or ``start``.
            rewrite: Makes another prompt of number i, once it is within the limit, so that
                nothing it writes is cut off; that comes on top of the limit.

        Raises:
            ValueError: for an empty prompt, a conversation without a chat template, a prompt over
                the limit where ``on_long`` is ``error``, or a template that alone is over it.
        """
        encoded = []
        truncated = self.truncated
        for row, prompt in enumerate(prompts):
            fitting, ids = self._fit(prompt, tokenizer, keep)
            encoded.append(ids if rewrite is None else self._ids(rewrite(row, fitting), tokenizer))
        if rewrite is not None:
            self.truncated = truncated  # counted with the reference's prompts, which are these
        return encoded

    def _ids(self, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        if not isinstance(prompt, str):
            return self._render(prompt, tokenizer)
        ids: list[int] = tokenizer(prompt)["input_ids"]
        return ids

    def _fit(
        self, prompt: Prompt, tokenizer: PreTrainedTokenizerBase, keep: str
    ) -> tuple[Prompt, list[int]]:
        """The prompt within the limit, and its token ids."""
        ids = self._ids(prompt, tokenizer)
        if not ids:
            raise ValueError(f"The prompt {prompt!r} has no tokens; remove it from the data.")
        if len(ids) <= self.max_prompt_tokens:
            return prompt, ids
        if self.on_long == "error":
            raise ValueError(
                f"A prompt has {len(ids)} tokens, over max_prompt_tokens={self.max_prompt_tokens}: "
                f"{str(prompt)[:80]!r}... Raise the limit, or set on_long='truncate'."
            )
        self.truncated += 1
        if isinstance(prompt, str):
            ids = _cut(prompt, tokenizer, self.max_prompt_tokens, keep)
            text: Any = tokenizer.decode(ids, skip_special_tokens=True)
            return text, ids
        return self._shorten(prompt, tokenizer)

    def _render(self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
        if not tokenizer.chat_template:
            raise ValueError(
                "The prompts are conversations, but the tokenizer has no chat template. Use plain "
                "string prompts, or a model whose tokenizer has one."
            )
        prefill = messages[-1]["role"] == "assistant"
        text: str = tokenizer.apply_chat_template(  # type: ignore[assignment]
            list(messages),
            tokenize=False,
            add_generation_prompt=not prefill,
            continue_final_message=prefill,
            **self.chat_template_kwargs,
        )
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _shorten(
        self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase
    ) -> tuple[Prompt, list[int]]:
        """Takes tokens off the end of the longest user message until the whole fits."""
        texts = [
            m["content"] if m["role"] == "user" and isinstance(m["content"], str) else ""
            for m in messages
        ]
        longest = max(range(len(texts)), key=lambda i: len(texts[i]))
        if not texts[longest]:
            raise ValueError(
                f"A conversation is over max_prompt_tokens={self.max_prompt_tokens} and has no "
                f"user message of plain text to shorten: {str(messages)[:80]!r}... Raise the limit."
            )
        content = tokenizer(texts[longest], add_special_tokens=False)["input_ids"]
        kept = len(content)
        while True:
            message = {**messages[longest], "content": tokenizer.decode(content[:kept])}
            shorter = [*messages[:longest], message, *messages[longest + 1 :]]
            ids = self._render(shorter, tokenizer)
            excess = len(ids) - self.max_prompt_tokens
            if excess <= 0:
                return shorter, ids
            if kept == 0:
                raise ValueError(
                    f"The chat template alone has {len(ids)} tokens, over "
                    f"max_prompt_tokens={self.max_prompt_tokens}. Raise the limit."
                )
            kept = max(0, kept - excess)


def _cut(prompt: str, tokenizer: PreTrainedTokenizerBase, limit: int, keep: str) -> list[int]:
    """The prompt within ``limit`` tokens, the tokenizer's own special tokens kept."""
    side = tokenizer.truncation_side
    tokenizer.truncation_side = "left" if keep == "end" else "right"
    try:
        ids: list[int] = tokenizer(prompt, truncation=True, max_length=limit)["input_ids"]
    finally:
        tokenizer.truncation_side = side
    return ids


def pad(rows: Sequence[Sequence[int]], pad_id: int, *, side: str) -> tuple[Tensor, Tensor]:
    """Token ids, shape (B, L), and their mask, True where a token stands.

    The mask comes from positions: a prompt may well contain the pad token.

    Example:
        >>> ids, mask = pad([[5], [6, 7]], pad_id=0, side="left")
        >>> ids.tolist(), mask.tolist()
        ([[0, 5], [6, 7]], [[False, True], [True, True]])
    """
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad_id)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for row, tokens in enumerate(rows):
        where = slice(longest - len(tokens), None) if side == "left" else slice(len(tokens))
        ids[row, where] = torch.tensor(tokens)
        mask[row, where] = True
    return ids, mask
