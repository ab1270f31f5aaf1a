from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from clp_lightning import (
    Gate,
    LoRA,
    Policy,
    Preference,
    Pretrained,
    Sampling,
    TransformersEngine,
    Weights,
)
from clp_lightning.conditioning.targets import select_layers
from tests.helpers import NAMES, build_policy, prompt_batch
from tests.tiny import tiny_model

ATTENTION = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "gpt2": {"c_attn", "c_proj"},
    "t5": {"q", "k", "v", "o"},
}


@pytest.mark.parametrize("kind", list(ATTENTION))
def test_attention_preset_knows_fused_projections(kind: str) -> None:
    names = select_layers(tiny_model(kind), "attention")
    assert {name.split(".")[-1] for name in names} == ATTENTION[kind]
    assert not any("mlp" in name for name in names)


def test_all_linear_presets() -> None:
    model = tiny_model("llama")
    without, with_output = (select_layers(model, t) for t in ("all-linear", "all-linear+output"))
    assert set(with_output) - set(without) == {"lm_head"}
    assert len(without) == 2 * 7


def test_patterns_and_last_blocks() -> None:
    model = tiny_model("llama")
    assert select_layers(model, [r"mlp\.up"], last_blocks=1) == ["model.layers.1.mlp.up_proj"]
    with pytest.raises(ValueError, match=r"'c_attn' matches no linear layer.*q_proj"):
        select_layers(model, ["q_proj", "c_attn"])
    with pytest.raises(ValueError, match="Unknown preset 'atention'"):
        select_layers(model, "atention")


def test_mixture_is_the_sum_of_the_adapters(tiny_folder: Callable[..., Path]) -> None:
    """Against PEFT's own forward: adapters scaled by c_i and added."""
    folder = tiny_folder("llama")
    policy = build_policy(folder, LoRA(rank=3, scale=2.0, shared_rank=0), perturb=0.2)
    weights, alpha = torch.tensor([0.3, 0.7]), 0.25
    base = AutoModelForCausalLM.from_pretrained(folder)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    plain = get_peft_model(base, config, adapter_name="kind_")
    plain.add_adapter("short_", config)
    theirs = dict(plain.named_parameters())
    for name, parameter in policy.model.named_parameters():
        if "lora_" in name:
            other = name.replace("reward_kind", "kind_").replace("reward_short", "short_")
            theirs[f"base_model.model.{other}"].data.copy_(parameter)
    plain.base_model.set_adapter(["kind_", "short_"])
    for layer in plain.modules():
        for i, adapter in enumerate(["kind_", "short_"]):
            if isinstance(layer, LoraLayer):
                layer.scaling[adapter] *= (1 - alpha) * float(weights[i])
    ids = torch.arange(5, 15)[None]
    with torch.no_grad(), policy.conditioner.merged(Preference.single(weights, alpha)):
        got = policy.model(ids).logits
    torch.testing.assert_close(got, plain(ids).logits, atol=1e-5, rtol=1e-5)


def test_alpha_one_and_coefficients(tiny_folder: Callable[..., Path]) -> None:
    policy = build_policy(tiny_folder("llama"), perturb=0.2)
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        with policy.conditioner.merged(Preference.single([0.3, 0.7], 1.0)):
            at_one = policy.model(ids).logits
        with policy.conditioner.reference():
            reference = policy.model(ids).logits
        with policy.conditioner.merged(Preference.single([0.3, 0.7], 0.5)):
            half = policy.model(ids).logits
    torch.testing.assert_close(at_one, reference, atol=1e-6, rtol=0)
    assert (half - reference).abs().max() > 0.1


def test_gradients_scale_with_the_coefficients(tiny_folder: Callable[..., Path]) -> None:
    """At one point of theta: with A fixed, d loss / d B_i = c_i * d loss / d Delta * A'."""
    policy = build_policy(tiny_folder("llama"), LoRA(rank=2, shared_rank=0))
    ids = torch.arange(5, 15)[None]
    rows = [[0.25, 0.75], [0.5, 0.5]]
    norms = []
    for weights in rows:  # B = 0: every preference has the same theta
        policy.zero_grad()
        with policy.conditioner.merged(Preference.single(weights, 0.2)):
            policy.model(ids).logits.square().mean().backward()
        copies = policy.conditioner.copies()
        norms.append(
            [torch.stack([p.grad.norm() for p in c if p.grad is not None]).norm() for c in copies]
        )
    torch.testing.assert_close(norms[0][0] / norms[1][0], torch.tensor(0.5), atol=1e-5, rtol=0)
    torch.testing.assert_close(norms[0][1] / norms[1][1], torch.tensor(1.5), atol=1e-5, rtol=0)


def test_shared_coefficient_and_gate() -> None:
    preference = Preference(torch.tensor([[0.25, 0.75]]), torch.tensor([0.5]))
    assert Weights()(preference).tolist() == [[0.25, 0.75, 0.5]]
    assert Weights(shared="constant")(preference).tolist() == [[0.25, 0.75, 1.0]]
    gate = Gate()
    gate.build(2, seed=0)
    torch.testing.assert_close(gate(preference), torch.tensor([[0.125, 0.375, 0.5]]))


def test_idle_copies_keep_no_gradient(tiny_folder: Callable[..., Path]) -> None:
    policy = build_policy(tiny_folder("llama"))
    with policy.conditioner.merged(Preference.single([1.0, 0.0], 0.2)):
        policy.model(torch.arange(5, 15)[None]).logits.sum().backward()
    policy.conditioner.drop_idle_gradients(torch.tensor([True, False, True]))
    used, idle = policy.conditioner.copies()
    assert all(p.grad is not None for p in [*used, *policy.conditioner.shared()])
    assert all(p.grad is None for p in idle)


def test_rows_that_do_not_match_are_refused(tiny_folder: Callable[..., Path]) -> None:
    policy = build_policy(tiny_folder("llama"))
    preference = Preference(torch.full((3, 2), 0.5), torch.full((3,), 0.1))
    with (
        policy.conditioner.rows(preference),
        pytest.raises(ValueError, match="3 preferences meet .* 2 rows"),
    ):
        policy.model(torch.zeros(2, 4, dtype=torch.long))


def test_start_from_existing_adapters(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_folder("llama")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    tuned.save_pretrained(tmp_path / "adapter")
    lora = LoRA(
        rank=2,
        shared_rank=0,
        coefficients=Weights(),
        start_from={"kind": str(tmp_path / "adapter")},
    )
    policy = build_policy(folder, lora)
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        with policy.conditioner.merged(Preference.single([1.0, 0.0], 0.0)):
            got = policy.model(ids).logits
        loaded = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter"
        )
        torch.testing.assert_close(got, loaded(ids).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="unknown.*not among the rewards"):
        build_policy(folder, LoRA(start_from={"unknown": "x"}))


def test_last_blocks_and_seed_reach_the_model(tiny_folder: Callable[..., Path]) -> None:
    found = []
    for seed in (0, 0, 1):
        policy = Policy(str(tiny_folder("llama")), LoRA(rank=2, last_blocks=1, shared_rank=0))
        policy.build(NAMES, seed=seed)
        found.append(policy.trained_parameters())
    assert found[0] and all(".layers.1." in name for name in found[0])
    down = [name for name in found[0] if "lora_A" in name]
    assert all(torch.equal(found[0][name], found[1][name]) for name in down)
    assert not any(torch.equal(found[0][name], found[2][name]) for name in down)


def test_nonlinear_adapters_are_refused(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_folder("llama")
    for options in ({"use_dora": True}, {"lora_dropout": 0.1}):
        config = LoraConfig(r=4, target_modules=["q_proj"], **options)
        tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
        tuned.save_pretrained(tmp_path / "adapter")
        with pytest.raises(ValueError, match=r"q_proj is refused: .*(DoRA|dropout)"):
            build_policy(folder, LoRA(start_from={"kind": str(tmp_path / "adapter")}))


def test_only_adapters_are_trained(tiny_folder: Callable[..., Path]) -> None:
    policy = build_policy(tiny_folder("llama"))
    assert all("lora_" in name for name in policy.trained_parameters())
    trained = {id(p) for p in policy.trained_parameters().values()}
    copies = [p for copy in policy.conditioner.copies() for p in copy]
    assert {id(p) for p in [*copies, *policy.conditioner.shared()]} == trained
    assert len(policy.conditioner.copies()) == len(NAMES)


def test_folding_needs_one_preference(tiny_folder: Callable[..., Path]) -> None:
    policy = build_policy(tiny_folder("llama"))
    with pytest.raises(ValueError, match="one preference"):
        policy.conditioner.fold(Preference(torch.full((2, 2), 0.5), torch.zeros(2)))


def test_bfloat16_base_keeps_adapters_in_float32(tiny_folder: Callable[..., Path]) -> None:
    policy = Policy(Pretrained(str(tiny_folder("llama")), dtype="bfloat16"), LoRA())
    policy.build(NAMES)
    assert policy.model.lm_head.base_layer.weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in policy.trained_parameters().values())
    rollout = TransformersEngine().generate(policy, prompt_batch(["ab"]), 2, Sampling(4))
    with policy.conditioned(rollout.preference):
        assert policy.logprobs(rollout).dtype == torch.float32


def test_a_delta_is_folded_into_a_bfloat16_base_with_one_rounding(
    tiny_folder: Callable[..., Path],
) -> None:
    spec = Pretrained(str(tiny_folder("llama")), dtype="bfloat16")
    conditioner = LoRA(rank=2, shared_rank=2)
    build_policy(spec, conditioner, perturb=0.3)
    at = torch.tensor([0.3, 0.5, 0.8])
    folded = conditioner.fold_at(at)
    for name, layer in conditioner._layers.items():
        exact = layer.base_layer.weight.double() + conditioner.delta(layer, at).double()
        assert folded[f"{name}.weight"].dtype == torch.bfloat16
        half_a_step = exact.abs() * 2**-8 * (1 + 1e-5)
        assert ((folded[f"{name}.weight"].double() - exact).abs() <= half_a_step).all(), name


def test_a_gate_is_seeded_by_the_run(tiny_folder: Callable[..., Path]) -> None:
    gates = []
    for noise in (1, 2):
        torch.manual_seed(noise)  # a global stream decides nothing
        gate = Gate()
        build_policy(tiny_folder("llama"), LoRA(rank=2, coefficients=gate))
        gates.append(torch.cat([p.flatten() for p in gate.parameters()]))
    assert torch.equal(*gates)
    assert gates[0].abs().max() > 0


def test_what_lies_below_the_adapters_is_computed_once(tiny_folder: Callable[..., Path]) -> None:
    """However many blocks these are: in floating point 22 * (15 / 22) is not 15."""
    folder = tiny_folder(num_hidden_layers=22)
    stem = build_policy(folder, LoRA(rank=2, last_blocks=7)).stem
    assert stem is not None and len(stem) == 15


def test_experts_in_one_parameter_are_refused(tiny_folder: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"experts are one parameter; name other layers"):
        build_policy(tiny_folder("deepseek"))
