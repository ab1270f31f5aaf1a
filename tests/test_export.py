from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from clp_lightning import (
    Gate,
    LoRA,
    Mixture,
    Preference,
    PromptText,
    SoftPrompt,
    SteerablePolicy,
)
from clp_lightning.__main__ import run
from clp_lightning.conditioning import Conditioner
from clp_lightning.export import export_adapter, export_model
from tests.runs import Backwards
from tests.steerables import WEIGHTS, make_steerable

ALPHA = 0.1
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "gpt2": ("gpt2", {}),  # tied
    "gemma3": ("gemma3", {}),  # tied, its embeddings scaled
    "t5": ("t5", {}),  # tied, and the output layer's input scaled
    "t5_v1_1": ("t5_v1_1", {}),
}
CONDITIONERS: dict[str, Callable[[], Conditioner]] = {
    "lora": lambda: LoRA(rank=2, shared_rank=3),
    "lora-gate": lambda: LoRA(rank=2, shared_rank=0, coefficients=Gate(hidden=3)),
    "full": lambda: Mixture("full"),
    "full-split": lambda: Mixture("full", tied="split"),
    "attention": lambda: Mixture("attention"),
    "logits": lambda: Mixture("logits"),
    "logits-keep": lambda: Mixture("logits", tied="keep"),
    "attention-gate": lambda: Mixture("attention", rest="freeze", coefficients=Gate(hidden=3)),
    "soft": lambda: SoftPrompt(),
    "soft-lora": lambda: SoftPrompt(LoRA(shared_rank=2)),
    "soft-gate": lambda: SoftPrompt(coefficients=Gate(hidden=3)),
    "text": lambda: PromptText(),
}
CASES = [f"{base}/{name}" for base in ("llama", "gpt2", "t5") for name in CONDITIONERS]
CASES += [
    f"{base}/{name}"
    for base in ("llama-tied", "gemma3", "t5_v1_1")
    for name in ("lora", "full", "logits", "soft")
]
PEFT = [f"{base}/{name}" for base in BASES for name in ("peft", "peft-gate")]

# Loads every folder by plain Transformers or PEFT where this library cannot be imported.
READER = """
import json, sys
from pathlib import Path

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "clp_lightning":
            raise ImportError("blocked")

sys.meta_path.insert(0, Blocked())
try:
    import clp_lightning
    sys.exit("the library could be imported")
except ImportError:
    pass
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

for job in json.loads(sys.stdin.read()):
    config = AutoConfig.from_pretrained(job["model"])
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model, info = auto.from_pretrained(job["model"], output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], (job, info)
    if job["adapter"]:
        from peft import PeftModel
        model = PeftModel.from_pretrained(model, job["adapter"])
    with torch.no_grad():
        logits = model.eval()(**load_file(job["inputs"])).logits
    save_file({"logits": logits.float()}, job["output"])
"""


def inputs_of(steerable: SteerablePolicy) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[9, 40, 71, 12, 33, 20], [55, 6, 7, 80, 90, 31]])
    if steerable.policy.model.config.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": ids[:, 1:4].contiguous()}
    return {"input_ids": ids}


@torch.no_grad()
def logits_of(steerable: SteerablePolicy, preference: Preference | None) -> torch.Tensor:
    """Of the policy under one preference, or of the reference."""
    policy, inputs = steerable.policy, inputs_of(steerable)
    scope = policy.reference() if preference is None else policy.conditioned(preference)
    rows = torch.zeros(len(inputs["input_ids"]), dtype=torch.long)
    with scope, policy.rows(rows):
        logits: torch.Tensor = policy.model(**inputs).logits
    return logits


def read_elsewhere(jobs: list[dict[str, str]]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", READER],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def read(
    tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, torch.Tensor]]:
    """By case the logits of the policy and of its exports, at one preference and at alpha = 1."""
    root = tmp_path_factory.mktemp("exports")
    result: dict[str, dict[str, torch.Tensor]] = {base: {} for base in BASES}
    jobs: list[dict[str, str]] = []

    def add(case: str, what: str, model: Path, adapter: Path | None, inputs: Path) -> None:
        output = root / f"{len(jobs)}.safetensors"
        given = {"model": model, "adapter": adapter or "", "inputs": inputs, "output": output}
        jobs.append(
            {name: str(path) for name, path in given.items()} | {"case": case, "what": what}
        )

    for case in [*CASES, *PEFT]:
        base, name = case.split("/")
        kind, options = BASES[base]
        folder = tiny_folder(kind, **options)
        steerable = make_steerable(folder, CONDITIONERS[name.replace("peft", "lora")]())
        inputs = root / f"{base}.safetensors"
        if not inputs.exists():
            save_file(inputs_of(steerable), inputs)
            add(base, "base", folder, None, inputs)
        mixed = steerable.preference(WEIGHTS, ALPHA)
        result[case] = {"steered": logits_of(steerable, mixed)}
        for what, preference in {
            "exported": mixed,
            "at 1": steerable.preference(WEIGHTS, 1.0),
        }.items():
            out = root / case / what
            if name.startswith("peft"):
                export_adapter(steerable, preference, out)
                add(case, what, folder, out, inputs)
            else:
                export_model(steerable, preference, out)
                add(case, what, out, None, inputs)
    read_elsewhere(jobs)
    for job in jobs:
        result[job["case"]][job["what"]] = load_file(job["output"])["logits"]
    return result


@pytest.mark.parametrize("case", [*CASES, *PEFT])
def test_an_export_answers_as_the_policy_does(
    case: str, read: dict[str, dict[str, torch.Tensor]]
) -> None:
    found, base = read[case], read[case.split("/")[0]]["base"]
    assert (found["steered"] - base).abs().max() > 0.05
    # Of the largest logit: in single precision the sum of weights rounds once more than the
    # policy does; in double precision they agree to 1e-13.
    atol = 1e-5 * found["steered"].abs().max()
    torch.testing.assert_close(found["exported"], found["steered"], atol=atol, rtol=0)


@pytest.mark.parametrize("case", [*CASES, *PEFT])
def test_at_alpha_1_an_export_is_the_reference_to_the_last_digit(
    case: str, read: dict[str, dict[str, torch.Tensor]]
) -> None:
    assert torch.equal(read[case]["at 1"], read[case.split("/")[0]]["base"])


def test_what_else_the_folder_holds(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    own = {"top_k": 3, "do_sample": True, "max_length": 77}
    base = tiny_folder("gpt2", chat=True, generation=own, resid_pdrop=0.25)
    steerable = make_steerable(base, Mixture("logits"))
    export_model(steerable, steerable.preference(WEIGHTS, ALPHA), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *(path.name for path in base.iterdir()),
        "README.md",
    }
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (base / name).read_bytes()
    config = json.loads((tmp_path / "config.json").read_text())
    expected = json.loads((base / "config.json").read_text())
    assert config == expected | {"tie_word_embeddings": False}
    assert config["resid_pdrop"] == 0.25  # ours is 0, the base's is kept


def test_templates_beside_the_default_one_are_kept(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_folder(chat=True), base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tools": "{{ tools }}"}
    tokenizer.save_pretrained(base)
    steerable = make_steerable(base)
    export_model(steerable, steerable.preference(WEIGHTS, ALPHA), tmp_path / "out")
    found = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert found == tokenizer.chat_template


def test_half_precision_stays(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    from clp_lightning import Pretrained

    spec = Pretrained(str(tiny_folder()), dtype="bfloat16")
    steerable = make_steerable(spec)
    export_model(steerable, steerable.preference(WEIGHTS, ALPHA), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_adapter_has_one_rank_everywhere(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    steerable = make_steerable(tiny_folder(), LoRA(rank=2, shared_rank=3))
    export_adapter(steerable, steerable.preference(WEIGHTS, ALPHA), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (7, 7.0, {})
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == str(tiny_folder())
    ranks = {
        len(tensor)
        for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items()
        if "lora_A" in name
    }
    assert ranks == {7}


def test_text_goes_into_the_chat_template(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny_folder(chat=True)
    steerable = make_steerable(base, PromptText())
    preference = steerable.preference(WEIGHTS, ALPHA)
    export_model(steerable, preference, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    talks = [
        [{"role": "user", "content": "tea?"}],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "tea?"},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": 'with "milk"'},
        ],
    ]
    for talk in talks:
        text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        (ids,) = tokenizer([text], add_special_tokens=False)["input_ids"]
        expected, _ = steerable.policy.encode([talk], preference)
        assert "[kind: 0.70, short: 0.30; stay close: 0.10]\n" in text
        assert ids == expected[0].tolist()
    job = {"model": tmp_path, "adapter": "", "inputs": "in", "output": "out"}
    paths = {name: str(tmp_path / value) if value else "" for name, value in job.items()}
    save_file(inputs_of(steerable), paths["inputs"])
    read_elsewhere([paths])
    steered = logits_of(steerable, preference)
    assert (steered - logits_of(steerable, None)).abs().max() > 0.05
    found = load_file(paths["output"])["logits"]
    torch.testing.assert_close(found, steered, atol=1e-5, rtol=1e-5)


class Suffix(PromptText):
    """Writes its text where no chat template of ours would."""

    def rewrite(self, prompt: Any, preference: Preference) -> Any:
        return f"{prompt} {self.text(preference.weights[0].tolist(), 0.0)}"


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_text_without_a_template_is_told(
    kind: str, tiny_folder: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    steerable = make_steerable(tiny_folder(kind), PromptText())
    steerable.save_pretrained(tmp_path / "policy")
    capsys.readouterr()
    asked = ["--weights", "kind=.7,short=.3", "--alpha", ".1", "--out", str(tmp_path / "out")]
    run(["export", "--ckpt", str(tmp_path / "policy"), *asked])
    shown, card = capsys.readouterr().out, (tmp_path / "out" / "README.md").read_text()
    for text in (shown, card):
        (written,) = re.findall(r'put (".*") in front of every prompt', text)
        assert json.loads(written) == "[kind: 0.70, short: 0.30; stay close: 0.10]\n"
    preference = steerable.preference(WEIGHTS, ALPHA)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    (ids,) = tokenizer([json.loads(written) + "tea?"])["input_ids"]
    assert ids == steerable.policy.encode(["tea?"], preference)[0][0].tolist()


def test_what_cannot_be_exported_says_why(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    refused: list[tuple[Conditioner, Any, str]] = [
        (Suffix(), export_model, "Suffix rewrites prompts"),
        (Backwards(), export_model, "Backwards rewrites prompts"),
        (SoftPrompt(), export_adapter, "SoftPrompt policy is no adapter"),
        (Mixture(), export_adapter, "Mixture policy is no adapter"),
    ]
    for conditioner, write, message in refused:
        steerable = make_steerable(tiny_folder(), conditioner)
        with pytest.raises(ValueError, match=message):
            write(steerable, steerable.preference(WEIGHTS, ALPHA), tmp_path / "out")
        assert not (tmp_path / "out").exists()
