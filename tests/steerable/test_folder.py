from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from clp_lightning import (
    Gate,
    LoRA,
    Mixture,
    PromptText,
    RunCheckpoint,
    SoftPrompt,
    SteerablePolicy,
)
from clp_lightning.conditioning import Conditioner
from tests.helpers import NAMES
from tests.runs import kind, make_data, make_module, make_trainer, short
from tests.steerables import WEIGHTS, make_steerable, named_steerable

PROMPTS = ["tea", "a long walk", "fog?"]
CONDITIONERS: dict[str, Callable[[], Conditioner]] = {
    "lora": lambda: LoRA(rank=2, shared_rank=3),
    "lora-gate": lambda: LoRA(rank=2, shared_rank=0, scale=0.7, coefficients=Gate(hidden=3)),
    "full": lambda: Mixture("full"),
    "logits": lambda: Mixture("logits", rest="freeze"),
    "soft": lambda: SoftPrompt(LoRA(shared_rank=2)),
    "text": lambda: PromptText("word"),
}


def answers(steerable: SteerablePolicy) -> Any:
    rollout = steerable.generate(PROMPTS, WEIGHTS, [0.1, 0.2, 1.0], seed=5)
    return rollout.response_ids, steerable.logprobs(rollout)


@pytest.mark.parametrize("conditioner", CONDITIONERS.values(), ids=CONDITIONERS)
def test_a_saved_policy_is_the_same_policy(
    conditioner: Callable[[], Conditioner], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    saved = make_steerable(tiny_folder("gpt2"), conditioner())
    saved.save_pretrained(tmp_path / "policy")
    loaded = SteerablePolicy.from_pretrained(tmp_path / "policy")
    for got, expected in zip(answers(loaded), answers(saved), strict=True):
        assert torch.equal(got, expected)
    assert loaded.trained.statistics == saved.trained.statistics
    assert loaded.trained.alpha_range == [0.1, 0.6]
    assert not loaded.policy.training
    names = {path.suffix for path in (tmp_path / "policy").rglob("*") if path.is_file()}
    assert names <= {".json", ".safetensors", ".md"}


@pytest.mark.parametrize("base", ["llama", "gpt2", "t5"])
def test_each_adapter_loads_alone_with_plain_peft(
    base: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_folder(base)
    steerable = make_steerable(folder, LoRA(rank=2, shared_rank=3, scale=0.5))
    steerable.save_pretrained(tmp_path / "policy")
    auto = AutoModelForSeq2SeqLM if base == "t5" else AutoModelForCausalLM
    ids = torch.arange(7, 15)[None]
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if base == "t5" else {})
    policy = steerable.policy
    for column, name in enumerate([*NAMES, "shared"]):
        plain = PeftModel.from_pretrained(
            auto.from_pretrained(folder), str(tmp_path / "policy"), subfolder=name
        )
        alone = torch.zeros(1, 3)
        alone[0, column] = 1.0
        with torch.no_grad(), policy.conditioner.open(_scope(alone)):
            expected = policy.model(**inputs).logits
            torch.testing.assert_close(plain(**inputs).logits, expected)


def _scope(coefficients: torch.Tensor) -> Any:
    from clp_lightning.conditioning.base import Scope

    return Scope(coefficients)


def test_a_run_is_loaded_without_its_rewards(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_folder(), base)
    module = make_module(
        base,
        rewards={
            "kind": lambda completions, **_: [len(c) / 9 for c in completions],
            "short": short,
        },
    )
    trainer = make_trainer(tmp_path, RunCheckpoint())
    trainer.fit(module, make_data(tmp_path))
    file = tmp_path / "checkpoints" / "last.ckpt"
    for place in (tmp_path, file):
        loaded = SteerablePolicy.from_pretrained(place)
        for name, parameter in module.policy.trained_parameters().items():
            assert torch.equal(loaded.policy.trained_parameters()[name], parameter)
        assert loaded.names == ["kind", "short"]
        assert loaded.trained.max_new_tokens == 5
        assert loaded.trained.alpha_range == [0.1, 0.6]
        assert loaded.trained.statistics is not None
        mean, std = loaded.trained.statistics["short"]
        assert (mean, std) == (module.rewards.mean[1].item(), module.rewards.std[1].item())
    front = tmp_path / "front.json"
    for step, is_its in ((module.trained_steps, True), (1, False)):
        front.write_text(json.dumps(FRONT | {"global_step": step}))
        loaded = SteerablePolicy.from_pretrained(tmp_path)
        assert (loaded.trained.front is not None) is is_its
    front.write_text(json.dumps(FRONT))  # of a version that did not say
    assert SteerablePolicy.from_pretrained(tmp_path).trained.front == FRONT
    shutil.move(base, tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="If the base lies elsewhere"):
        SteerablePolicy.from_pretrained(tmp_path)
    SteerablePolicy.from_pretrained(tmp_path, base=str(tmp_path / "moved"))
    with pytest.raises(ValueError, match="another base"):
        SteerablePolicy.from_pretrained(tmp_path, base=str(tiny_folder("gpt2")))


def test_adapters_that_training_started_from_are_not_needed_again(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    first = make_steerable(tiny_folder(), LoRA(rank=4, shared_rank=0, targets="all-linear"))
    first.save_pretrained(tmp_path / "first")
    lora = LoRA(rank=2, shared_rank=2, start_from={"kind": str(tmp_path / "first" / "kind")})
    second = make_steerable(tiny_folder(), lora)
    second.save_pretrained(tmp_path / "second")
    shutil.rmtree(tmp_path / "first")
    description = json.loads((tmp_path / "second" / "clp.json").read_text())
    assert str(tmp_path) not in str(description["conditioner"])
    loaded = SteerablePolicy.from_pretrained(tmp_path / "second")
    for got, expected in zip(answers(loaded), answers(second), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "names", [["a", "ab"], ["default", "default_1"], ["lora_A", "reward_a"], ["weight", "0"]]
)
def test_odd_names_of_adapters(
    names: list[str], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    steerable = named_steerable(names, tiny_folder())
    steerable.save_pretrained(tmp_path / "policy")
    loaded = SteerablePolicy.from_pretrained(tmp_path / "policy")
    weights = dict(zip(names, [0.7, 0.3], strict=True))
    both = [p.generate(PROMPTS, weights, 0.0, seed=3).response_ids for p in (steerable, loaded)]
    assert torch.equal(*both)
    for name in names:
        plain = AutoModelForCausalLM.from_pretrained(tiny_folder())
        before = [p.clone() for p in plain.parameters()]
        peft = PeftModel.from_pretrained(plain, tmp_path / "policy" / name).merge_and_unload()
        moved = [not torch.equal(p, q) for p, q in zip(peft.parameters(), before, strict=True)]
        assert any(moved)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a/b", "c"], "cannot be the name"),
        (["a.b", "c"], "cannot be the name"),
        (["..", "c"], "cannot be the name"),
        (["tea", "Tea"], "differ in upper and lower case only"),
    ],
)
def test_names_that_are_no_folder_are_refused_before_training(
    names: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_module("nowhere", rewards=dict.fromkeys(names, kind))


def test_names_that_would_share_a_folder(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="would share a folder"):
        named_steerable(["a", "A"], tiny_folder()).save_pretrained(tmp_path / "policy")
    assert not (tmp_path / "policy").exists()
    with pytest.raises(ValueError, match="cannot be called 'shared'"):
        named_steerable(["a", "shared"], tiny_folder())


@pytest.mark.parametrize(
    "conditioner",
    [SoftPrompt(LoRA(shared_rank=2)), LoRA(rank=2, shared_rank=0), Mixture("attention")],
    ids=["soft-lora", "lora", "attention"],
)
def test_a_reward_may_be_called_shared(
    conditioner: Conditioner, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    saved = named_steerable(["a", "shared"], tiny_folder(), conditioner)
    saved.save_pretrained(tmp_path)
    loaded = SteerablePolicy.from_pretrained(tmp_path)
    for name, parameter in build_items(saved).items():
        assert torch.equal(build_items(loaded)[name], parameter)


def test_a_policy_is_saved_loaded_and_saved_again(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    first, second = tmp_path / "first" / "policy", tmp_path / "second" / "policy"
    conditioner = LoRA(rank=2, shared_rank=2, coefficients=Gate(hidden=3))
    make_steerable(tiny_folder(), conditioner, front=FRONT).save_pretrained(first)
    SteerablePolicy.from_pretrained(first).save_pretrained(first)  # into its own folder
    SteerablePolicy.from_pretrained(first).save_pretrained(second)
    files = {path.relative_to(first) for path in first.rglob("*") if path.is_file()}
    assert files == {path.relative_to(second) for path in second.rglob("*") if path.is_file()}
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes()


def test_saving_again_leaves_nothing_of_the_old(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    make_steerable(tiny_folder(), front=FRONT).save_pretrained(tmp_path)
    assert (tmp_path / "kind").is_dir() and (tmp_path / "front.png").is_file()
    make_steerable(tiny_folder(), Mixture("attention")).save_pretrained(tmp_path)
    assert not (tmp_path / "kind").exists() and not (tmp_path / "front.png").exists()
    SteerablePolicy.from_pretrained(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="is not empty"):
        make_steerable(tiny_folder()).save_pretrained(tmp_path / "other")


FRONT = {
    "rewards": NAMES,
    "decoding": {"temperature": 1.0},
    "points": [
        {
            "weights": WEIGHTS,
            "alpha": 0.1,
            "rewards": {"kind": 0.25, "short": None},
            "kl": 1.5,
            "length": 7.0,
            "value": 0.125,
        }
    ],
    "reference": {"rewards": {"kind": 0.1, "short": -2.0}, "kl": 0.0, "length": 9.0, "n": 4},
}


def test_the_card_says_what_it_is(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_folder(), base)
    (base / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\nlicense: no\n")
    make_steerable(base, front=FRONT).save_pretrained(tmp_path / "policy")
    card = (tmp_path / "policy" / "README.md").read_text()
    for part in (
        "library_name: clp_lightning",
        "license: apache-2.0",
        "- multi-objective",
        "![Front](front.png)",
        'PeftModel.from_pretrained(base, "policy", subfolder="kind")',
        "| 0.70 / 0.30 | 0.1 | 0.25 | - | 1.5 | 7 | 0.125 |",
        'from_pretrained("policy")',
        'weights={"kind": 0.5, "short": 0.5}, alpha=0.1)',
        "alpha from 0.1 to 0.6",
    ):
        assert part in card
    assert (tmp_path / "policy" / "front.png").stat().st_size > 1000
    assert SteerablePolicy.from_pretrained(tmp_path / "policy").trained.front == FRONT


def test_pushing_uploads_what_saving_writes(tiny_folder: Callable[..., Path]) -> None:
    calls: list[Any] = []

    def upload(**given: Any) -> str:
        calls.append({path.name for path in Path(given["folder_path"]).iterdir()})
        calls.append((Path(given["folder_path"]) / "README.md").read_text())
        old = ["old/adapter_config.json", "old/adapter_model.safetensors", "front.png"]
        assert set(filter_repo_objects(old, allow_patterns=given["delete_patterns"])) == {*old}
        return f"https://hub/{given['repo_id']}"

    hub = SimpleNamespace(
        create_repo=lambda repo, **options: calls.append((repo, options)), upload_folder=upload
    )
    url = make_steerable(tiny_folder()).push_to_hub("me/dial", private=True, api=hub)
    assert url == "https://hub/me/dial"
    repo, names, card = calls
    assert repo == ("me/dial", {"private": True, "exist_ok": True})
    assert names == {"clp.json", "weights.safetensors", "README.md", *NAMES, "shared"}
    assert 'from_pretrained("me/dial")' in card


def test_half_precision_adapters_keep_every_digit(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    from clp_lightning import Pretrained

    made = make_steerable(Pretrained(str(tiny_folder()), dtype="bfloat16"))
    made.save_pretrained(tmp_path)
    loaded = SteerablePolicy.from_pretrained(tmp_path)
    for name, parameter in build_items(made).items():
        assert parameter.dtype == torch.float32
        assert torch.equal(build_items(loaded)[name], parameter)


def build_items(steerable: SteerablePolicy) -> dict[str, torch.Tensor]:
    return dict(steerable.policy.trained_parameters())
