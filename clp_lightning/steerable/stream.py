"""Text as it comes, from tokens as they come."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from ..policy import Engine, Policy, TransformersEngine

__all__ = ["OnText", "streaming"]

OnText = Callable[[int, str], None]
"""Called with the number of a response and the text that it has just grown by."""


@contextmanager
def streaming(engine: Engine, policy: Policy, on_text: OnText | None) -> Iterator[None]:
    """Inside the block, ``on_text`` hears what ``engine`` samples.

    Raises:
        ValueError: this engine does not tell its tokens before the end.
    """
    if on_text is None:
        yield
        return
    if not isinstance(engine, TransformersEngine):
        raise ValueError(f"{type(engine).__name__} cannot stream; leave on_text out.")
    ids: dict[int, list[int]] = defaultdict(list)
    said: dict[int, str] = defaultdict(str)

    def hear(rows: Tensor, tokens: Tensor) -> None:
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            ids[row].append(token)
            text = str(policy.tokenizer.decode(ids[row], skip_special_tokens=True))
            # Half a character is not told, nor what the tokenizer may still take back.
            if text.endswith("\ufffd") or not text.startswith(said[row]):
                continue
            if grown := text[len(said[row]) :]:
                said[row] = text
                on_text(row, grown)

    engine.on_tokens = hear
    try:
        yield
    finally:
        engine.on_tokens = None
