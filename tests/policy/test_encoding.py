from __future__ import annotations

import pytest
from tokenizers.processors import TemplateProcessing

from clp_lightning import Encoding
from clp_lightning.policy.encoding import pad
from tests.tiny import END, tiny_tokenizer

CHAT = tiny_tokenizer(chat=True)
BARE = tiny_tokenizer()


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_conversation_goes_through_the_template() -> None:
    (ids,) = Encoding()([user("hi")], CHAT)
    text = CHAT.decode(ids)
    assert text == ("<|start|>system\nHelp.<|end|>\n<|start|>user\nhi<|end|>\n<|start|>assistant\n")


def test_truncation_keeps_the_template_and_its_tail() -> None:
    whole = len(Encoding()([user("")], CHAT)[0])
    encoding = Encoding(max_prompt_tokens=whole + 5)
    (ids,) = encoding([user("abcdefghij")], CHAT)
    assert "user\nabcde<|end|>\n<|start|>assistant\n" in CHAT.decode(ids)
    assert len(ids) == whole + 5
    assert encoding.truncated == 1
    assert ids.count(END) == 2


def test_the_template_alone_is_too_long() -> None:
    with pytest.raises(ValueError, match="template alone has .* tokens"):
        Encoding(max_prompt_tokens=10)([user("abcdefghij")], CHAT)


def test_strings_keep_the_side_that_is_asked_for() -> None:
    for keep, kept in {"start": "abc", "end": "def"}.items():
        assert BARE.decode(Encoding(3)(["abcdef"], BARE, keep=keep)[0]) == kept
        assert BARE.truncation_side == "right"


def test_the_template_gets_its_arguments() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = "{{ mood }}{{ messages[0]['content'] }}"
    encoding = Encoding(chat_template_kwargs={"mood": "calm: "})
    assert tokenizer.decode(encoding([user("hi")], tokenizer)[0]) == "calm: hi"


def test_the_template_alone_writes_special_tokens() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    start = ("<|start|>", tokenizer.convert_tokens_to_ids("<|start|>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A", special_tokens=[start]
    )
    assert tokenizer("hi")["input_ids"][0] == start[1]
    assert Encoding()([user("hi")], tokenizer) == Encoding()([user("hi")], CHAT)
    # A plain string has no template, so the tokenizer's own are kept, also where it is cut.
    (cut,) = Encoding(3)(["abcdef"], tokenizer)
    assert tokenizer.decode(cut) == "<|start|>ef"


def test_the_longest_user_message_is_shortened() -> None:
    messages = [*user("short"), {"role": "assistant", "content": "ok" * 20}, *user("abcdefghij")]
    whole = len(Encoding()([messages], CHAT)[0])
    (ids,) = Encoding(max_prompt_tokens=whole - 4)([messages], CHAT)
    text = CHAT.decode(ids)
    assert "user\nshort<|end|>" in text and "user\nabcdef<|end|>" in text
    assert "ok" * 20 in text


def test_error_mode_names_the_prompt() -> None:
    with pytest.raises(ValueError, match=r"6 tokens.*max_prompt_tokens=3.*abcdef"):
        Encoding(3, on_long="error")(["abcdef"], BARE)


def test_no_chat_template() -> None:
    with pytest.raises(ValueError, match="no chat template"):
        Encoding()([user("hi")], BARE)


def test_an_assistant_turn_is_continued() -> None:
    messages = [*user("hi"), {"role": "assistant", "content": "Sure"}]
    (ids,) = Encoding()([messages], CHAT)
    assert CHAT.decode(ids).endswith("assistant\nSure")


def test_an_empty_prompt() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        Encoding()([""], BARE)


def test_pad_token_inside_a_prompt_is_attended() -> None:
    ids, mask = pad([[0, 5], [7]], 0, side="left")
    assert ids.tolist() == [[0, 5], [0, 7]]
    assert mask.tolist() == [[True, True], [False, True]]
    ids, mask = pad([[0, 5], [7]], 0, side="right")
    assert ids.tolist() == [[0, 5], [7, 0]] and mask.tolist() == [[True, True], [True, False]]


def test_nothing_but_user_text_is_shortened() -> None:
    system = {"role": "system", "content": "Never lie. " * 9}
    with pytest.raises(ValueError, match="no user message of plain text"):
        Encoding(max_prompt_tokens=60)([[system, {"role": "assistant", "content": "ok"}]], CHAT)


def test_a_misspelt_choice() -> None:
    with pytest.raises(ValueError, match="on_long must be 'truncate' or 'error'; got 'truncat'"):
        Encoding(on_long="truncat")  # type: ignore[arg-type]
