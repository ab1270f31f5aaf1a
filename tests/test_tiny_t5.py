"""The tiny T5: its model, its tokenizer, and the configs that `make tiny-t5` runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.tiny_t5.base import build
from benchmarks.tiny_t5.run import METHODS
from clp_lightning.cli import main
from clp_lightning.pretrained import fingerprint, load_model, load_tokenizer
from tests.test_smollm2_benchmark import budget, read

CONFIGS = Path("configs/tiny_t5")


@pytest.fixture(scope="module")
def random_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_t5") / "random"
    build(folder)
    return folder


def test_it_is_the_same_model_at_every_build(random_t5: Path, tmp_path: Path) -> None:
    build(tmp_path)
    assert fingerprint(str(tmp_path)) == fingerprint(str(random_t5))
    written = [(folder / "tokenizer.json").read_text() for folder in (tmp_path, random_t5)]
    assert written[0] == written[1]


def test_tokenizer_and_model_fit(random_t5: Path) -> None:
    tokenizer, model = load_tokenizer(str(random_t5)), load_model(str(random_t5))
    text = "Return the sum, as an int64 of 12 values (or None)."
    ids = tokenizer(text)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id == model.config.eos_token_id
    assert tokenizer.unk_token_id not in ids and len(ids) < len(text) / 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.pad_token_id == model.config.decoder_start_token_id == 0


@pytest.mark.parametrize("method", METHODS)
def test_methods_differ_in_the_method_alone(method: str) -> None:
    assert budget(read(CONFIGS / f"{method}.yaml")) == budget(read(CONFIGS / "full.yaml"))


def test_every_config_is_run() -> None:
    stems = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert stems == {"supervised", *METHODS}
    sampler = read(CONFIGS / "soups.yaml")["trainer"]["callbacks"][0]["init_args"]
    assert (sampler["weights"]["class_path"], sampler["per"]) == ("Vertices", "step")


def shortened(name: str, base: Path, folder: Path, **more: Any) -> None:
    """One of the runs with a step instead of hundreds, from another base."""
    config: dict[str, Any] = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    config["trainer"] |= {"max_steps": 1, "accumulate_grad_batches": 1, "log_every_n_steps": 1}
    config["trainer"]["logger"]["init_args"] |= {"save_dir": str(folder), "name": name}
    config["model"]["init_args"] |= {"pretrained": str(base)} | more
    config["data"]["init_args"] |= {"limit": 40, "holdout": 4, "batch_size": 4}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(path)])


@pytest.mark.slow
def test_the_runs_in_short(random_t5: Path, tmp_path: Path) -> None:
    shortened("supervised", random_t5, tmp_path, max_response_tokens=6)
    base = tmp_path / "supervised" / "base"
    assert fingerprint(str(base)) != fingerprint(str(random_t5))
    for method in METHODS:
        small = {"statistics_prompts": 4, "max_new_tokens": 4, "grid": {"divisions": 1}}
        shortened(method, base, tmp_path, **small)
        front = json.loads((tmp_path / method / "front.json").read_text())
        assert len(front["points"]) == 3
        assert all(point["length"] >= 1 for point in front["points"])
