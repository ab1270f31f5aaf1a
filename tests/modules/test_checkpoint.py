"""What a checkpoint holds, and what it is refused for."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clp_lightning import CLPModule, FrontCallback, LoRA, Preference, RunCheckpoint, Weights
from clp_lightning.cli import main
from clp_lightning.pretrained import fingerprint
from tests.helpers import prompt_batch
from tests.runs import (
    Counted,
    kind,
    make_data,
    make_module,
    make_trainer,
    run_config,
    write_config,
)


@pytest.fixture(scope="module")
def run(
    tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    """Folder and module of a run of two steps that was made in Python."""
    folder = tmp_path_factory.mktemp("run")
    module = make_module(tiny_folder())
    make_trainer(folder, RunCheckpoint()).fit(module, make_data(folder))
    return folder / "checkpoints/last.ckpt", module


def read(path: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


def test_it_holds_what_was_trained_and_nothing_frozen(
    run: tuple[Path, Any], tiny_folder: Callable[..., Path]
) -> None:
    path, module = run
    checkpoint = read(path)
    trained = {f"policy.{name}" for name, p in module.policy.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    statistics = {"rewards.mean", "rewards.std", "rewards.fitted"}
    assert checkpoint["state_dict"].keys() == trained | statistics
    # Adam's two moments of each trained parameter, whatever the order.
    (optimizer,) = checkpoint["optimizer_states"]
    shapes = sorted(tuple(state["exp_avg"].shape) for state in optimizer["state"].values())
    assert shapes == sorted(tuple(checkpoint["state_dict"][name].shape) for name in trained)

    identity = checkpoint["clp_lightning"]
    described = identity.pop("policy")  # what SteerablePolicy reads
    assert described["conditioner"]["init_args"] == {"rank": 2, "shared_rank": 2}
    assert (described["max_new_tokens"], described["alpha_range"]) == (5, [0.1, 0.6])
    assert identity == {
        "base": {
            "name": str(tiny_folder()),
            "revision": None,
            "fingerprint": fingerprint(str(tiny_folder())),
        },
        "rewards": ["kind", "short"],
        "reward_settings": {
            "kind": {
                "class_path": "clp_lightning.rewards.base.Function",
                "init_args": {"function": "tests.runs.kind", "kwargs": None, "factory": False},
            },
            "short": {
                "class_path": "tests.runs.Counted",
                "init_args": {"target": 1.0, "letter": "m"},
            },
        },
        "coefficients": "clp_lightning.conditioning.base.Scaled, shared: scaled",
        "scale": 2.0,
        "temperature": 1.0,
    }
    assert checkpoint["state_dict"]["rewards.fitted"]
    torch.testing.assert_close(checkpoint["state_dict"]["rewards.mean"], module.rewards.mean)
    assert module.rewards.mean.abs().min() > 0


def same_answers(found: Any, module: Any) -> None:
    """Both policies answer alike under a preference, and unlike the reference."""
    asked = prompt_batch(["tea 1", "owl"], Preference(torch.eye(2), torch.tensor([0.1, 0.4])))
    rollout = module.generate(asked)
    logps = []
    for policy in (module.policy, found.policy):
        with policy.conditioned(rollout.preference), torch.no_grad():
            logps.append(policy.logprobs(rollout))
    torch.testing.assert_close(logps[1], logps[0], rtol=0, atol=0)
    with found.policy.reference():
        assert not torch.allclose(found.policy.logprobs(rollout), logps[0], atol=1e-4)


def test_it_rebuilds_a_module_made_in_python(run: tuple[Path, Any]) -> None:
    path, module = run
    found = CLPModule.load_from_checkpoint(path, weights_only=True)
    assert found.rewards.names == module.rewards.names
    assert found.rewards.rewards["short"].target == 1  # type: ignore[attr-defined]
    assert (found.lr, found.grid, found.seed) == (module.lr, module.grid, module.seed)
    torch.testing.assert_close(found.rewards.mean, module.rewards.mean)
    same_answers(found, module)


def test_it_rebuilds_a_module_made_on_the_command_line(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    config = run_config(tmp_path, tiny_folder(), limit_val_batches=0)
    more = ["--model.rewards.short.init_args.target=9"]
    cli = main(["fit", "--config", write_config(tmp_path / "config.yaml", config), *more])
    path = tmp_path / "run/checkpoints/last.ckpt"
    found = CLPModule.load_from_checkpoint(path, weights_only=True)
    assert found.rewards.rewards["short"].target == 9  # type: ignore[attr-defined]
    same_answers(found, cli.model)


def test_loading_warns_of_nothing(run: tuple[Path, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)  # of what Lightning calls, told once
        # From its description, and with rewards that were made in other words.
        CLPModule.load_from_checkpoint(run[0], weights_only=True)
        rewards = {"kind": "tests.runs.kind", "short": Counted(letter="m")}
        CLPModule.load_from_checkpoint(run[0], weights_only=True, rewards=rewards)


def test_other_rewards_under_the_same_names_are_told(
    run: tuple[Path, Any], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    path, _ = run
    swapped = {"kind": Counted(), "short": kind}
    with pytest.warns(UserWarning, match="Reward 'kind' is another one.*Counted") as told:
        CLPModule.load_from_checkpoint(path, weights_only=True, rewards=swapped)
    assert sum("is another one" in str(warning.message) for warning in told) == 2
    module = make_module(tiny_folder(), rewards={"kind": kind, "short": Counted(target=4)})
    with pytest.warns(UserWarning, match=r"Reward 'short' .*'target': 1\.0.*'target': 4"):
        make_trainer(tmp_path).fit(module, make_data(tmp_path), ckpt_path=path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what a lambda does is not known
        unknown = {"kind": lambda completions, **_: [0.0 for _ in completions], "short": Counted()}
        CLPModule.load_from_checkpoint(path, weights_only=True, rewards=unknown)


def test_what_python_code_passes_is_kept_as_plain_data(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder, numbers = tiny_folder(), {"lr": np.float32(0.5), "weight_decay": np.float64(0.25)}
    module = CLPModule(
        pretrained=folder,
        conditioner=LoRA(rank=2, shared_rank=2, scale=np.float32(2)),  # type: ignore[arg-type]
        rewards={"kind": kind},
        temperature=np.float64(0.5),
        reference_point=np.array([-2.0]),  # type: ignore[arg-type]
        statistics_prompts=2,
        max_new_tokens=np.int64(2),  # type: ignore[arg-type]
        warmup_steps=np.int64(2),
        **numbers,  # type: ignore[arg-type]
    )
    callbacks = [RunCheckpoint(), FrontCallback()]
    make_trainer(tmp_path, *callbacks, limit_val_batches=1).fit(module, make_data(tmp_path))
    path = tmp_path / "checkpoints/last.ckpt"
    arguments = read(path)["hyper_parameters"]  # with weights_only
    assert (arguments["pretrained"], arguments["lr"]) == (str(folder), 0.5)
    found = CLPModule.load_from_checkpoint(path, weights_only=True)
    assert (found.lr, found.weight_decay, found.reference_point) == (0.5, 0.25, [-2.0])
    trainer = make_trainer(tmp_path, max_steps=3)
    trainer.fit(found, make_data(tmp_path), ckpt_path=path, weights_only=True)
    assert trainer.global_step == 3


def test_a_lambda_must_be_passed_again(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    rewards = {"kind": kind, "len": lambda completions, **_: [len(c) / 9 for c in completions]}
    module = make_module(tiny_folder(), rewards=rewards)
    make_trainer(tmp_path, RunCheckpoint()).fit(module, make_data(tmp_path))
    path = tmp_path / "checkpoints/last.ckpt"
    with pytest.raises(ValueError, match="Reward 'len' was a lambda.*Pass all rewards again"):
        CLPModule.load_from_checkpoint(path, weights_only=True)
    found = CLPModule.load_from_checkpoint(path, rewards=rewards, weights_only=True)
    same_answers(found, module)


class OfScript(Counted):
    """Says that it is a script's, as does ``of_script``."""


def of_script(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


OfScript.__module__ = of_script.__module__ = "__main__"


@pytest.mark.parametrize("reward", [OfScript(), of_script])
def test_rewards_of_another_script_must_be_passed_again(
    reward: Any, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    rewards = {"kind": kind, "own": reward}
    make_trainer(tmp_path, RunCheckpoint()).fit(
        make_module(tiny_folder(), rewards=rewards), make_data(tmp_path)
    )
    path = tmp_path / "checkpoints/last.ckpt"
    with pytest.raises(ValueError, match=r"(?s)__main__.*pass all rewards again"):
        CLPModule.load_from_checkpoint(path, weights_only=True)
    found = CLPModule.load_from_checkpoint(path, rewards=rewards, weights_only=True)
    assert found.rewards.names == ["kind", "own"]


def test_optimizers_made_in_python_are_rebuilt(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR
    module = make_module(
        tiny_folder(),
        optimizer=functools.partial(torch.optim.AdamW, betas=(0.5, 0.75)),
        lr_scheduler=functools.partial(schedule, T_max=10),
    )
    make_trainer(tmp_path, RunCheckpoint()).fit(module, make_data(tmp_path))
    found = CLPModule.load_from_checkpoint(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    made = found.configure_optimizers()
    assert isinstance(made["optimizer"], torch.optim.AdamW)
    assert tuple(made["optimizer"].defaults["betas"]) == (0.5, 0.75)
    (inner,) = made["lr_scheduler"]["scheduler"]._schedulers
    assert isinstance(inner, schedule) and inner.T_max == 10


@pytest.mark.parametrize("name", ["optimizer", "lr_scheduler"])
def test_a_lambda_optimizer_must_be_passed_again(
    name: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    made = {
        "optimizer": lambda groups: torch.optim.SGD(groups, lr=0.1),
        "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer),
    }[name]
    module = make_module(tiny_folder(), **{name: made})
    make_trainer(tmp_path, RunCheckpoint()).fit(module, make_data(tmp_path))
    path = tmp_path / "checkpoints/last.ckpt"
    found = CLPModule.load_from_checkpoint(path, weights_only=True)
    same_answers(found, module)
    with pytest.raises(ValueError, match=f"`{name}` was a lambda.*Pass it again"):
        found.configure_optimizers()
    found = CLPModule.load_from_checkpoint(path, weights_only=True, **{name: made})
    assert getattr(found, name) is made


# -- refused -----------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused(
    run: tuple[Path, Any], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    path, _ = run
    base = tiny_folder()
    other = tiny_folder("llama", tie_word_embeddings=True)
    rewards = {"kind": kind, "short": Counted()}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"base": other}, "another base: .*Set `pretrained`"),
        ({"rewards": dict(reversed(rewards.items()))}, r"\['short', 'kind'\]. They must be the"),
        ({"rewards": {"kind": kind, "brief": Counted()}}, r"rewards \['kind', 'short'\]; this run"),
        ({"conditioner": LoRA(rank=3, shared_rank=2)}, "another rank"),
        ({"conditioner": LoRA(rank=2, shared_rank=2, scale=8.0)}, r"scale 2\.0; this run has 8\.0"),
        (
            {"conditioner": LoRA(rank=2, shared_rank=2, coefficients=Weights())},
            "coefficients .*Scaled.*this run has .*Weights",
        ),
        ({"temperature": 2.0}, r"temperature 1\.0; this run has 2\.0"),
        ({"conditioner": LoRA(rank=2, shared_rank=0)}, "holds .* does not train.*conditioner"),
        (
            {"conditioner": LoRA(rank=2, shared_rank=2, targets="all-linear")},
            "lacks .* trained tensors.*conditioner",
        ),
    ]
    for options, message in wrong:
        module = make_module(**({"base": base} | options))
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path).fit(module, make_data(tmp_path), ckpt_path=path)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text"])
def test_a_damaged_file_is_named(
    damage: str, run: tuple[Path, Any], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    whole, path = run[0].read_bytes(), tmp_path / "bad.ckpt"
    middle = whole.index(b"hyper_parameters")  # in the record that is unpickled
    path.write_bytes(
        {
            "truncated": whole[:-100],
            "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "empty": b"",
            "text": b"version https://git-lfs.github.com/spec/v1",
        }[damage]
    )
    with pytest.raises(ValueError, match=r"checkpoint .*bad\.ckpt cannot be read") as raised:
        CLPModule.load_from_checkpoint(path)
    assert raised.value.__cause__ is not None
    for stage in ("fit", "test"):
        with pytest.raises(Exception, match=r"checkpoint .*bad\.ckpt cannot be read"):
            getattr(make_trainer(tmp_path), stage)(
                make_module(tiny_folder()), datamodule=make_data(tmp_path), ckpt_path=path
            )


def test_checkpoints_of_others_are_refused(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0"}, tmp_path / "other.ckpt")
    module = make_module(tiny_folder())
    with pytest.raises(ValueError, match="not written by clp_lightning"):
        make_trainer(tmp_path).fit(
            module, make_data(tmp_path), ckpt_path=tmp_path / "other.ckpt", weights_only=True
        )


def test_the_same_base_elsewhere_is_the_same(
    run: tuple[Path, Any], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in tiny_folder().iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    trainer = make_trainer(tmp_path, max_steps=3)
    trainer.fit(make_module(moved), make_data(tmp_path), ckpt_path=run[0])
    assert trainer.global_step == 3
