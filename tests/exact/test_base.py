from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from clp_lightning.exact import ExactTask, build_base, task_tokenizer, train_base


@pytest.fixture(scope="module", params=[False, True], ids=["fixed", "stop"])
def built(
    request: pytest.FixtureRequest, base_folder: Callable[[ExactTask], Path]
) -> tuple[ExactTask, Path]:
    task = ExactTask(stop=request.param, num_contexts=3)
    return task, base_folder(task)


def response_logp(model: torch.nn.Module, task: ExactTask) -> torch.Tensor:
    """Log-probability of every response, by plain Transformers, (X, S)."""
    rows = []
    for context in task.contexts:
        ids = torch.cat([context.expand(len(task.responses), 2), task.responses], dim=-1)
        with torch.no_grad():
            logits = model(input_ids=ids[:, :-1]).logits[:, 1:].double()
        token = logits.log_softmax(-1).gather(-1, ids[:, 2:, None]).squeeze(-1)
        rows.append((token * task.response_mask).sum(-1))
    return torch.stack(rows)


def test_base_is_the_chain(built: tuple[ExactTask, Path]) -> None:
    task, folder = built
    model = AutoModelForCausalLM.from_pretrained(folder)
    logp = response_logp(model, task)
    torch.testing.assert_close(logp.exp().sum(-1), torch.ones(3, dtype=torch.float64))
    kl = (task.chain_logp.exp() * (task.chain_logp - logp)).sum(-1)
    assert (kl < 0.01).all()  # nats a response; an untrained model is at about 1.5


def test_folder_is_plain_hugging_face(built: tuple[ExactTask, Path]) -> None:
    task, folder = built
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer) == 6
    assert not model.config.tie_word_embeddings
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == task.stop_id
    assert model.generation_config.bos_token_id is None
    assert tokenizer.pad_token_id == task.pad_id
    assert tokenizer(task.prompts)["input_ids"] == task.contexts.tolist()
    assert tokenizer.decode(list(range(6))) == "a b c d e f"


def test_prompts_hold_the_padding_token_unharmed() -> None:
    task = ExactTask(num_contexts=30)
    ids = task_tokenizer(task)(task.prompts)["input_ids"]
    assert any(task.pad_id in row for row in ids)
    assert ids == task.contexts.tolist()


def test_training_is_deterministic_and_leaves_the_global_stream_alone(
    built: tuple[ExactTask, Path],
) -> None:
    task, folder = built
    torch.manual_seed(7)  # nothing that the base depends on
    before = torch.get_rng_state()
    again = train_base(task).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    saved = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(saved[name], again[name]) for name in again)


def test_build_skips_what_is_there_and_refuses_another_task(
    built: tuple[ExactTask, Path],
) -> None:
    task, folder = built
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert build_base(task, folder) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert not [p for p in folder.parent.iterdir() if p.name.startswith(".")]  # no scratch left
    assert build_base(replace(task, num_rewards=3, correlation=0.5), folder) == folder
    with pytest.raises(ValueError, match="choose another folder"):
        build_base(ExactTask(task_seed=1), folder)


def test_build_refuses_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="does not hold the base"):
        build_base(ExactTask(), tmp_path)
