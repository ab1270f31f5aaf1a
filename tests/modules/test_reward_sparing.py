"""What training a reward model need not do: read a text twice, train the words' embeddings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForSequenceClassification

from tests.reward_models import as_chat, make_data, make_module, make_trainer, pairs


@pytest.mark.parametrize("chat", [True, False])
def test_a_text_of_many_rows_is_read_once(chat: bool, tiny_folder: Callable[..., Path]) -> None:
    rows = pairs()[:4]
    rows[2] |= {name: rows[0][name] for name in ("prompt", "chosen")}
    rows = [as_chat(row) for row in rows] if chat else rows
    module, data = make_module(tiny_folder(chat=chat)), make_data(rows, holdout=0)
    module.configure_model()
    data.setup("fit")
    (batch,) = data.train_dataloader()
    read: list[int] = []
    module.policy.model.register_forward_pre_hook(
        lambda _, args, inputs: read.append(len(inputs["input_ids"])), with_kwargs=True
    )
    found = module.scores(batch)
    alone = [
        module.policy.scores(module.policy.tokens([text])[0])
        for text in module.supervision.texts(batch)
    ]
    assert read == [7] + [1] * 8
    torch.testing.assert_close(found, torch.cat(alone))


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_embeddings_that_are_left_as_they_are(
    precision: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    module = make_module(tiny_folder(), train_embeddings=False)
    trainer = make_trainer(tmp_path, precision=precision)
    trainer.fit(module, make_data(pairs()))
    words = "model.embed_tokens.weight"
    optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    trained = {id(p) for p in module.policy.trained_parameters().values()}
    assert optimized == trained and id(module.policy.model.get_parameter(words)) not in trained
    saved = load_file(tmp_path / "reward/model.safetensors")
    assert torch.equal(saved[words], load_file(tiny_folder() / "model.safetensors")[words])
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert json.loads((tmp_path / "reward/config.json").read_text())["dtype"] == "float32"


def test_a_model_without_a_table_of_embeddings(tiny_folder: Callable[..., Path]) -> None:
    module = make_module(tiny_folder(), train_embeddings=False)
    with (
        patch.object(
            LlamaForSequenceClassification, "get_input_embeddings", side_effect=NotImplementedError
        ),
        pytest.raises(ValueError, match="LlamaForSequenceClassification has no table of words"),
    ):
        module.configure_model()
