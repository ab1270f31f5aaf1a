"""Starting from an already tuned LoRA: the reference is the base with it, by plain PEFT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from clp_lightning import (
    LoRA,
    Mixture,
    Policy,
    Preference,
    Pretrained,
    RewardModule,
    SteerablePolicy,
)
from clp_lightning.conditioning import Conditioner
from clp_lightning.export import export_adapter, export_model
from clp_lightning.pretrained import check_available, fingerprint, load_model
from tests.helpers import build_policy
from tests.runs import make_data, make_module, make_trainer
from tests.steerables import WEIGHTS, make_steerable
from tests.tiny import ENCODER_DECODERS

IDS = torch.tensor([[40, 41, 42, 43, 44], [50, 51, 52, 53, 54]])
CONDITIONERS: dict[str, Callable[[], Conditioner]] = {
    "lora": lambda: LoRA(rank=2, shared_rank=2),
    "full": lambda: Mixture("full"),
    "attention": lambda: Mixture("attention"),
}
# On plain layers, on the output layer where it is the embedding table too, on that table, and with
# every factor that PEFT scales an adapter by.
TARGETS: dict[str, dict[str, Any]] = {
    "llama": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "gpt2": {"target_modules": ["c_attn", "lm_head"], "fan_in_fan_out": True},
    "gemma3": {"target_modules": ["q_proj", "lm_head"], "alpha_pattern": {"lm_head": 7}},
    "qwen3": {"target_modules": ["v_proj"], "rank_pattern": {"layers.1": 3}, "use_dora": True},
    "t5": {"target_modules": ["q", "wo", "lm_head"]},
    "t5_v1_1": {"target_modules": ["v", "lm_head"]},
}


def tune(base: Path, folder: Path, kind: str, whole_tables: bool = True, **options: Any) -> Path:
    """A LoRA away from zero, as PEFT saves it.

    Args:
        base: The model's folder.
        folder: Where to.
        kind: Of the model.
        whole_tables: Save, beside the factors, the tables that they are on, as PEFT does.
        **options: Of the LoRA; by default those of ``TARGETS``.
    """
    settings = {"r": 2, "lora_alpha": 5} | (options or TARGETS[kind])
    torch.manual_seed(4)
    tuned = get_peft_model(plain_model(base, kind), LoraConfig(**settings))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    tuned.save_pretrained(folder, save_embedding_layers="auto" if whole_tables else False)
    return folder


def plain_model(base: Path, kind: str) -> Any:
    auto = AutoModelForSeq2SeqLM if kind in ENCODER_DECODERS else AutoModelForCausalLM
    return auto.from_pretrained(base, dtype=torch.float32)


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    decoder = {"decoder_input_ids": IDS[:, 1:4].contiguous()}
    extra = decoder if model.config.is_encoder_decoder else {}
    found: Tensor = model(input_ids=IDS, **extra).logits
    return found


def by_peft(base: Path, adapter: Path, kind: str) -> Tensor:
    """Base and tuned LoRA, side by side in plain PEFT."""
    return logits_of(PeftModel.from_pretrained(plain_model(base, kind), adapter).eval())


def asked(policy: Policy, preference: Preference | None) -> Tensor:
    """Logits under a preference, or of the reference."""
    scope = policy.reference() if preference is None else policy.conditioned(preference)
    with scope, policy.rows(torch.zeros(len(IDS), dtype=torch.long)):
        return logits_of(policy.model)


@pytest.fixture
def tuned(tiny_folder: Callable[..., Path], tmp_path: Path) -> Pretrained:
    base = tiny_folder("llama")
    return Pretrained(str(base), adapter=str(tune(base, tmp_path / "tuned", "llama")))


@pytest.mark.parametrize("kind", list(TARGETS))
def test_loading_merges_it_exactly(
    kind: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_folder(kind)
    adapter = tune(base, tmp_path / "tuned", kind)
    random = torch.get_rng_state()
    model = load_model(Pretrained(str(base), adapter=str(adapter)))
    assert torch.equal(torch.get_rng_state(), random)
    expected = by_peft(base, adapter, kind)
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, logits_of(plain_model(base, kind)), atol=0.1)
    assert not any("lora" in name for name in model.state_dict()) and not model.training


@pytest.mark.parametrize("name", list(CONDITIONERS))
@pytest.mark.parametrize("kind", ["llama", "gemma3", "t5"])
def test_step_0_is_base_and_tuned_lora_for_every_preference(
    name: str, kind: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_folder(kind)
    adapter = tune(base, tmp_path / "tuned", kind)
    spec = Pretrained(str(base), adapter=str(adapter))
    policy = build_policy(spec, CONDITIONERS[name]())
    expected = by_peft(base, adapter, kind)
    for weights, alpha in (([1.0, 0.0], 0.0), ([0.3, 0.7], 0.2), ([0.5, 0.5], 0.9)):
        got = asked(policy, Preference.single(weights, alpha)).log_softmax(-1)
        log_ratio = got - asked(policy, None).log_softmax(-1)
        assert float((got.exp() * log_ratio).sum(-1).abs().max()) == 0.0  # KL
    # Away from step 0 the reference stays what training started from.
    moved = build_policy(spec, CONDITIONERS[name](), perturb=0.1)
    for who in (policy, moved):
        torch.testing.assert_close(asked(who, None), expected, rtol=1e-4, atol=1e-4)
    at_one = asked(moved, Preference.single([0.5, 0.5], 1.0))
    torch.testing.assert_close(at_one, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(asked(moved, Preference.single([1.0, 0.0], 0.0)), expected, atol=0.1)


def test_a_run_starts_at_kl_0_and_is_read_again(tuned: Pretrained, tmp_path: Path) -> None:
    from clp_lightning import RunCheckpoint

    module = make_module(tuned, lr=0.1)
    trainer = make_trainer(tmp_path, RunCheckpoint(every_n_train_steps=1), max_steps=1)
    trainer.fit(module, make_data(tmp_path))
    assert trainer.callback_metrics["train/kl"] == 0.0
    identity = module.base_identity()
    assert identity["adapter"] == tuned.adapter and identity["fingerprint"] == fingerprint(tuned)

    again = SteerablePolicy.from_pretrained(tmp_path)
    preference = again.preference(WEIGHTS, 0.1)
    expected = asked(module.policy.eval(), preference)
    assert not torch.allclose(expected, asked(module.policy, None), atol=1e-3)  # it was trained
    torch.testing.assert_close(asked(again.policy, preference), expected)

    again.save_pretrained(tmp_path / "saved")
    assert str(tuned.adapter) in (tmp_path / "saved/README.md").read_text()
    saved = SteerablePolicy.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(asked(saved.policy, preference), expected)

    assert tuned.adapter is not None
    moved = shutil.move(tuned.adapter, tmp_path / "moved")
    here = Pretrained(tuned.name, adapter=str(moved))
    message = "The adapter '.*tuned' was not found. Looked.* or in Python base=Pretrained"
    for place in (tmp_path, tmp_path / "saved"):
        with pytest.raises(FileNotFoundError, match=message):
            SteerablePolicy.from_pretrained(place)
        found = SteerablePolicy.from_pretrained(place, base=here)
        torch.testing.assert_close(asked(found.policy, preference), expected)


def test_a_reward_model_starts_from_it_too(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_folder("llama")
    adapter = tune(base, tmp_path / "tuned", "llama", task_type="CAUSAL_LM", **TARGETS["llama"])
    module = RewardModule(Pretrained(str(base), adapter=str(adapter)))
    module.configure_model()
    trunk = module.policy.model.base_model
    tuned = PeftModel.from_pretrained(plain_model(base, "llama"), adapter).eval()
    expected = tuned.get_base_model().model(IDS).last_hidden_state
    torch.testing.assert_close(trunk(IDS).last_hidden_state, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", list(CONDITIONERS))
@pytest.mark.parametrize("kind", ["llama", "gemma3", "t5", "t5_v1_1"])
def test_an_export_needs_the_base_alone(
    name: str, kind: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_folder(kind)
    adapter = tune(base, tmp_path / "tuned", kind, whole_tables=False)
    steerable = make_steerable(Pretrained(str(base), adapter=str(adapter)), CONDITIONERS[name]())
    preference = steerable.preference(WEIGHTS, 0.2)
    expected = asked(steerable.policy, preference)
    export_model(steerable, preference, tmp_path / "plain")
    plain = plain_model(tmp_path / "plain", kind).eval()
    torch.testing.assert_close(logits_of(plain), expected, rtol=1e-4, atol=1e-4)
    if name == "lora":
        notes = export_adapter(steerable, preference, tmp_path / "adapter")
        got = by_peft(base, tmp_path / "adapter", kind)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        tied = kind in ("gemma3", "t5")
        assert any("do not merge it" in note for note in notes) == tied


def test_supervised_training_goes_on_from_it(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    from clp_lightning import SupervisedModule

    for kind in ("gemma3", "t5"):  # tied tensors that the adapter takes apart
        base = tiny_folder(kind)
        adapter = tune(base, tmp_path / kind, kind)
        for rank in (0, 2):
            spec = Pretrained(str(base), adapter=str(adapter))
            module = SupervisedModule(spec, lora_rank=rank, seed=0)
            module.configure_model()
            module.save(tmp_path / f"{kind}-{rank}")
            got = logits_of(plain_model(tmp_path / f"{kind}-{rank}", kind).eval())
            torch.testing.assert_close(got, by_peft(base, adapter, kind), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "tensor"), [("qwen3", "magnitude"), ("t5", "lm_head.base_layer")])
def test_an_adapter_with_more_than_lora_is_not_stacked(
    kind: str, tensor: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_folder(kind)
    spec = Pretrained(str(base), adapter=str(tune(base, tmp_path / "tuned", kind)))
    steerable = make_steerable(spec)
    with pytest.raises(ValueError, match=f"more than a plain LoRA .*{tensor}.* --format hf"):
        export_adapter(steerable, steerable.preference(WEIGHTS, 0.2), tmp_path / "adapter")


def test_the_fingerprint_covers_it(
    tuned: Pretrained, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base, mark = tuned.name, fingerprint(tuned)
    assert mark != fingerprint(base)
    assert tuned.adapter is not None
    moved = tmp_path / "moved"
    shutil.copytree(tuned.adapter, moved)
    config = json.loads((moved / "adapter_config.json").read_text())
    config["target_modules"] = config["target_modules"][::-1]
    config["base_model_name_or_path"] = "elsewhere"
    (moved / "adapter_config.json").write_text(json.dumps(config))
    assert fingerprint(Pretrained(base, adapter=str(moved))) == mark
    (moved / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 6}))
    assert fingerprint(Pretrained(base, adapter=str(moved))) != mark
    other = tune(Path(base), tmp_path / "other", "llama", r=3, target_modules=["q_proj"])
    assert fingerprint(Pretrained(base, adapter=str(other))) not in (mark, fingerprint(base))


def test_a_missing_adapter_is_one_early_error(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = str(tiny_folder())
    missing = Pretrained(base, adapter=str(tmp_path / "none"))
    for look in (check_available, load_model, fingerprint):
        with pytest.raises(FileNotFoundError, match="The adapter '.*none' was not found. Looked"):
            look(missing)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="lacks adapter_config.json and adapter_model.saf"):
        load_model(Pretrained(base, adapter=str(tmp_path / "empty")))


def test_what_cannot_be_merged_is_refused(
    tuned: Pretrained, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(ValueError, match="cannot be merged exactly into a quantised base. Merge"):
        Pretrained(tuned.name, adapter=tuned.adapter, quantization_config=quantised)

    model = plain_model(tiny_folder(), "llama")
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(model, config).save_pretrained(tmp_path / "prompt")
    with pytest.raises(ValueError, match="PROMPT_TUNING, which is no change of weights"):
        load_model(Pretrained(tuned.name, adapter=str(tmp_path / "prompt")))

    other = {"gpt2": "does not fit its base", "llama": "differ in 4 tensors"}
    for kind, message in other.items():
        base = tiny_folder(kind, **({"num_hidden_layers": 1} if kind == "llama" else {}))
        with pytest.raises(ValueError, match=message):
            load_model(Pretrained(str(base), adapter=tuned.adapter))
