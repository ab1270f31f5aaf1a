"""Damaged bases: one message that names the file or the model, and says what to do."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from clp_lightning.__main__ import run
from clp_lightning.intact import check_finite_weights, loaded
from clp_lightning.pretrained import Pretrained, fingerprint, load_model, load_tokenizer
from tests.runs import run_config, write_config
from tests.tiny import tiny_model

WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def cut(share: float) -> Callable[[bytes], bytes]:
    return lambda content: content[: int(len(content) * share)]


def text(old: str, new: str) -> Callable[[bytes], bytes]:
    return lambda content: content.replace(old.encode(), new.encode())


def spoilt(file: Path, value: float) -> None:
    tensors = load_file(file)
    key = next(name for name in tensors if "up_proj" in name or "lora_B" in name)
    tensors[key][0, 0] = value
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (WEIGHTS, cut(0.5), r"model\.safetensors has \d+ bytes, but its header says .* Fetch it"),
        (WEIGHTS, cut(0.001), "model.safetensors is no safetensors file, or the start of one"),
        (WEIGHTS, cut(0), "model.safetensors is no safetensors file"),
        (WEIGHTS, lambda content: content + b"0", "bytes, but its header says"),
        (
            WEIGHTS,
            lambda _: POINTER,
            "is a pointer of git-lfs, not the weights: run `git lfs pull`",
        ),
        (
            CONFIG,
            text('"hidden_size": 32', '"hidden_size": 64'),
            r"do not fit each other: lm_head.weight has shape \(101, 32\) in the weights and "
            r"\(101, 64\) by config.json \(21 tensors differ\). Put back",
        ),
        (CONFIG, text('"hidden_size": 32', '"hidden_size": "x"'), "'hidden_size' expected int"),
        (CONFIG, text('"num_attention_heads": 4', '"num_attention_heads": 0'), "ZeroDivision"),
        (CONFIG, text('"silu"', '"nonesuch"'), "KeyError: 'nonesuch'.*Its config.json does not"),
        (CONFIG, cut(0.5), "config.json' is not a valid JSON"),
    ],
)
def test_a_damaged_base_is_named(
    file: str,
    change: Callable[[bytes], bytes],
    message: str,
    tiny_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(tiny_folder(), tmp_path / "broken")
    path = folder / file
    before = path.read_bytes()
    path.write_bytes(change(before))
    assert path.read_bytes() != before
    with pytest.raises((ValueError, OSError), match=rf"(?s)(broken.*{message}|{message}.*broken)"):
        load_model(str(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_that_are_not_finite(
    value: float, dtype: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_folder(), tmp_path / "diverged")
    load_model(Pretrained(str(folder), dtype=dtype))
    spoilt(folder / WEIGHTS, value)
    with pytest.raises(ValueError, match=r"weights of '\S+diverged' are not finite: .*up_proj"):
        load_model(Pretrained(str(folder), dtype=dtype))


def test_large_weights_are_finite() -> None:
    layer = nn.Linear(64, 64).half()
    nn.init.constant_(layer.weight, 60_000)  # their sum is infinite
    check_finite_weights(layer, "x")
    with torch.device("meta"):
        check_finite_weights(nn.Linear(2, 2), "x")


@pytest.mark.parametrize("content", ['{"weight_map": {', "{}", "[]"])
def test_a_damaged_index(content: str, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(fingerprint(str(tmp_path))) == 64
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ValueError, match=r"index\.json names no files of weights"):
        fingerprint(str(tmp_path))


def test_a_damaged_shard_has_no_fingerprint(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="40KB")
    shard = next(tmp_path.glob("model-00002*"))
    shard.write_bytes(cut(0.5)(shard.read_bytes()))
    with pytest.raises(ValueError, match=r"model-00002\S+ has \d+ bytes"):
        fingerprint(str(tmp_path))


@pytest.mark.parametrize("content", ["{", "[1]", POINTER.decode()])
def test_a_damaged_tokenizer(
    content: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_folder(), tmp_path / "base")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="No tokenizer of .*base"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("adapter_model.safetensors", "adapter_model.safetensors has .* bytes"),
        ("adapter_config.json", "'.*tuned' cannot be loaded"),
        ("nan", "weights of '.*tuned' are not finite"),
    ],
)
def test_a_damaged_adapter(
    file: str, message: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    settings = LoraConfig(r=2, target_modules=["up_proj"])
    get_peft_model(tiny_model("llama"), settings).save_pretrained(tmp_path / "tuned")
    spec = Pretrained(str(tiny_folder()), adapter=str(tmp_path / "tuned"))
    load_model(spec)
    if file == "nan":
        spoilt(tmp_path / "tuned/adapter_model.safetensors", float("nan"))
    else:
        path = tmp_path / "tuned" / file
        path.write_bytes(cut(0.5)(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        load_model(spec)


@pytest.mark.parametrize(
    "error", [ModuleNotFoundError("no gguf"), MemoryError(), RuntimeError("CUDA out of memory")]
)
def test_what_is_no_fault_of_the_model_is_not_blamed_on_it(error: Exception) -> None:
    def load() -> None:
        raise error

    with pytest.raises(type(error), match=re.escape(str(error))) as found:
        loaded("x", load)
    assert found.value is error


def test_the_command_line_says_it_in_a_line(
    tiny_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tiny_folder(), tmp_path / "broken")
    settings = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(settings | {"hidden_size": 64}))
    config = write_config(tmp_path / "config.yaml", run_config(tmp_path / "run", folder))
    with pytest.raises(SystemExit) as end:
        run(["fit", "--config", config])
    assert end.value.code == 2
    assert f"error: The files of '{folder}' do not fit each other" in capsys.readouterr().err
