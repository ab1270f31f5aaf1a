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

    def tell(row: int, *, all_of_it: bool) -> None:
        text = str(policy.tokenizer.decode(ids[row], skip_special_tokens=True))
        if not all_of_it:
            text = _settled(text)
        if text.startswith(said[row]) and (grown := text[len(said[row]) :]):
            said[row] = text
            on_text(row, grown)

    def hear(rows: Tensor, tokens: Tensor) -> None:
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            ids[row].append(token)
            tell(row, all_of_it=False)

    engine.on_tokens = hear
    try:
        yield
        for row in ids:
            tell(row, all_of_it=True)
    finally:
        engine.on_tokens = None


def _settled(text: str) -> str:
    """``text`` without what more tokens may still change.

    That is half a character, and the last space with up to two characters behind it: some
    tokenizers take the space out of " ." and of " n't".
    """
    text = text.rstrip("\ufffd")
    space = text.find(" ", max(len(text) - 3, 0))
    return text if space < 0 else text[:space]
