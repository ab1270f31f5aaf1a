"""Rows in TRL's formats become batches."""

from __future__ import annotations

from typing import Any

import pytest

from clp_lightning.data import RESERVED, BatchKey, PromptFormat, collate


def batch(rows: list[dict[str, Any]], **options: Any) -> Any:
    return collate(rows, list(range(7, 7 + len(rows))), PromptFormat(list(rows[0]), **options))


USER, SYSTEM = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Be kind."}
ANSWER = {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    ("row", "prompt", "columns"),
    [
        ({"prompt": "p", "level": 3}, "p", {"level": 3}),
        ({"prompt": [SYSTEM, USER]}, [SYSTEM, USER], {}),
        ({"prompt": "p", "completion": "c"}, "p", {"completion": "c"}),
        ({"prompt": [USER], "completion": [ANSWER]}, [USER], {"completion": [ANSWER]}),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "p", {"chosen": "a", "rejected": "b"}),
        ({"text": "t", "n": 1}, "t", {"n": 1}),
        ({"messages": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER], {"completion": [ANSWER]}),
        ({"messages": [USER]}, [USER], {"completion": None}),
    ],
)
def test_trl_formats(row: dict[str, Any], prompt: Any, columns: dict[str, Any]) -> None:
    got = batch([row, row])
    assert got.prompts == [prompt, prompt]
    assert got.columns == {name: [value, value] for name, value in columns.items()}
    assert got.prompt_ids.tolist() == [7, 8]
    assert str(got.prompt_ids.dtype) == "torch.int64"


def test_keys_that_are_none_are_dropped_from_messages() -> None:
    call = {"name": "f", "arguments": {"x": 1, "y": None}}
    message = {**USER, "name": None, "tool_calls": [call]}
    got = batch([{"prompt": [message], "completion": [{**ANSWER, "name": None}], "note": None}])
    clean = {**USER, "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}
    assert got.prompts == [[clean]]
    assert got.columns == {"completion": [[ANSWER]], "note": [None]}


def test_template_and_conversation() -> None:
    rows = [{"document": "D", "summary": "S"}]
    assert batch(rows, template="Summarise: {document}").prompts == ["Summarise: D"]
    got = batch(rows, template="{document}?", system="Be kind.", conversational=True)
    assert got.prompts == [[SYSTEM, {"role": "user", "content": "D?"}]]
    assert got.columns == {"document": ["D"], "summary": ["S"]}
    nested = [{"meta": {"title": "T"}}]
    assert batch(nested, template="{{{meta[title]}}}").prompts == ["{T}"]
    # A template outranks a prompt column, which then is a column like any other.
    got = batch([{"prompt": "p", "x": 1}], template="{prompt}{x}")
    assert (got.prompts, got.columns) == (["p1"], {"prompt": ["p"], "x": [1]})


def test_columns_appear_under_their_new_names_only() -> None:
    rename = {"prompt": "question", "completion": "answer", "solution": "answer"}
    got = batch([{"question": "q", "answer": "a", "id": 1}], rename=rename)
    assert got.prompts == ["q"]
    assert got.columns == {"id": [1], "completion": ["a"], "solution": ["a"]}


def test_the_key_says_epoch_and_part() -> None:
    key = BatchKey((0,), epoch=3, part=1, parts=2, nominal_size=4)
    got = collate([{"prompt": "p"}], [0], PromptFormat(["prompt"]), key)
    assert (got.epoch, got.part, got.parts, got.nominal_size) == (3, 1, 2, 4)


@pytest.mark.parametrize("prompt", ["", "  \n", [], None])
def test_an_empty_prompt_names_its_row(prompt: Any) -> None:
    with pytest.raises(ValueError, match="Row 8 has an empty prompt"):
        batch([{"prompt": "fine"}, {"prompt": prompt}])


def test_a_template_writes_neither_none_nor_brackets() -> None:
    with pytest.raises(
        ValueError, match="Row 8: its 'document', which the template names, is miss"
    ):
        batch([{"document": "D"}, {"document": None}], template="Summarise: {document}")
    with pytest.raises(ValueError, match=r"Row 7: its 'document' is a list; .* {document\[...]}"):
        batch([{"document": ["D"]}], template="Summarise: {document}")
    assert batch([{"document": ["D"], "n": 3}], template="{document[0]}{n}").prompts == ["D3"]
    assert batch([{"document": ["D"]}], template="{document!r}").prompts == ["['D']"]


@pytest.mark.parametrize(("title", "said"), [(None, "None"), (float("nan"), "nan")])
def test_a_template_writes_no_part_that_is_missing(title: Any, said: str) -> None:
    message = rf"Row 7: its 'meta\[title\]', which the template names, is {said}; fill it"
    with pytest.raises(ValueError, match=message):
        batch([{"meta": {"title": title}}], template="Summarise: {meta[title]}")


def test_prompts_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="Row 7: the prompt is a int"):
        batch([{"prompt": 3}])
    with pytest.raises(ValueError, match="Row 7 has a message without a role"):
        batch([{"prompt": [{"content": "Hi"}]}])
    with pytest.raises(ValueError, match="Row 7 has an empty prompt"):
        batch([{"messages": [ANSWER]}])


@pytest.mark.parametrize("name", RESERVED)
def test_reserved_columns_are_refused_with_a_remedy(name: str) -> None:
    with pytest.raises(ValueError, match=f"reserved name.*columns={{'my_{name}': '{name}'}}"):
        PromptFormat(["prompt", name])
    renamed = PromptFormat(["prompt", name], {f"my_{name}": name})
    assert set(renamed.columns) == {"prompt", f"my_{name}"}


def test_unknown_columns_are_named_beside_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"names \['body'\]; the data has: a, b"):
        PromptFormat(["b", "a"], {"prompt": "body"})
    with pytest.raises(ValueError, match=r"template names \['c'\]; the columns are: a, b"):
        PromptFormat(["a", "b"], template="{a} {c}")
    with pytest.raises(ValueError, match=r"No column is called prompt.*there are: a, b"):
        PromptFormat(["a", "b"])
    with pytest.raises(ValueError, match=r"would replace \['b'\]"):
        PromptFormat(["a", "b", "prompt"], {"b": "a"})
    with pytest.raises(ValueError, match="needs a conversation"):
        PromptFormat(["prompt"], system="Be kind.")
