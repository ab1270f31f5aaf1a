"""SteerablePolicy: one object that answers for any preference."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..functional import check_alpha, check_weights
from ..policy import Engine, Policy, Sampling, TransformersEngine
from ..pretrained import Pretrained
from ..types import Preference, Prompt, PromptBatch, Rollout
from .card import PICTURE, model_card
from .checkpoint import read_checkpoint
from .folder import DESCRIPTION, read_folder, write_folder
from .stream import OnText, streaming
from .trained import Trained, lora_of

__all__ = ["SteerablePolicy"]


class SteerablePolicy:
    """A trained policy, to ask under any preference, another one for every prompt of a batch.

    Args:
        policy: A built policy.
        trained: What it is.
        engine: What samples: Transformers' forward if None; ``MOD()`` and ``DeRa()`` also answer
            for a preference.

    Example::

        policy = SteerablePolicy.from_pretrained("runs/quickstart")
        rollout = policy.generate(
            ["Summarise: ...", "Summarise: ..."],
            weights=[{"support": 1, "brevity": 0}, {"support": 0.5, "brevity": 0.5}],
            alpha=0.05,
        )
        rollout.completions
    """

    def __init__(self, policy: Policy, trained: Trained, engine: Engine | None = None) -> None:
        self.policy = policy
        self.trained = trained
        self.engine = engine or TransformersEngine()

    @property
    def names(self) -> list[str]:
        """The rewards that a preference weighs."""
        return self.trained.rewards

    # -- loading and saving -----------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        base: str | Pretrained | None = None,
        revision: str | None = None,
        engine: Engine | None = None,
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
    ) -> SteerablePolicy:
        """Loads a saved policy, or what a run trained.

        Args:
            path: A saved policy's folder, a run's folder, a .ckpt file, or a name on the hub.
            base: Where the base lies, if not where the policy says; a ``Pretrained`` says where the
                adapter lies too that it was tuned with.
            revision: Branch, tag or commit on the hub.
            engine: What samples responses.
            device: Where to compute; the first GPU if there is one, else the CPU.
            trust_remote_code: Run Python code that comes with the base of a saved policy.

        Raises:
            FileNotFoundError: the policy or its base is nowhere.
            ValueError: the base is another one than in training, the files do not fit it, or there
                is no such device.
        """
        trained = _read(path, revision, trust_remote_code).on_base(base)
        place = _checked_device(device)
        policy = trained.build().to(place)
        return cls(policy, replace(trained, state={}), engine)  # the policy has it now

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a folder that ``from_pretrained`` reads and that can go to the hub.

        ``clp.json``, the weights as safetensors (one sub-folder for each LoRA, which plain PEFT
        loads alone), a model card and the picture of the front. Nothing in it is pickled.

        Raises:
            ValueError: the folder holds something else, or two adapters would share a folder.
        """
        self._save(Path(folder), place=Path(folder).name)

    def _save(self, folder: Path, place: str) -> None:
        write_folder(folder, self.policy, self.trained, __version__)
        lora = lora_of(self.policy.conditioner)
        adapters = [] if lora is None else list(lora.adapters())
        card = model_card(self.trained, adapters, __version__, place)
        (folder / PICTURE).unlink(missing_ok=True)  # of another policy that was saved here
        if self.trained.front is None or not _draw(self.trained.front, folder / PICTURE):
            card = card.replace(f"![Front]({PICTURE})\n\n", "")
        (folder / "README.md").write_text(card)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        commit_message: str = "Upload a steerable policy",
        api: Any = None,
    ) -> str:
        """Saves the policy into a repository on the hub, made if need be.

        The token is the one that ``huggingface_hub`` knows (``HF_TOKEN`` or a login).

        Args:
            repo_id: ``owner/name``.
            private: Whether a new repository is; the owner's default if None.
            commit_message: What the commit says.
            api: A ``huggingface_hub.HfApi``; one with the default settings if None.

        Returns:
            The address of the commit.
        """
        from tempfile import TemporaryDirectory

        from huggingface_hub import HfApi

        api = api or HfApi()
        with TemporaryDirectory() as folder:
            self._save(Path(folder), place=repo_id)
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                delete_patterns=["*/adapter_*", PICTURE],  # what an earlier policy left there
            )
        return str(commit)

    # -- asking -----------------------------------------------------------------------------

    def preference(
        self,
        weights: Mapping[str, float] | Sequence[Mapping[str, float]],
        alpha: float | Sequence[float],
        rows: int = 1,
    ) -> Preference:
        """Named weights and alpha as ``rows`` rows, on the policy's device.

        Args:
            weights: The weight of every reward by name, for all rows or one mapping for each.
            alpha: KL strength in [0, 1], for all rows or one for each.
            rows: Number of prompts.

        Raises:
            ValueError: a name is missing or unknown, weights do not sum to 1, alpha is outside
                [0, 1], or their numbers do not fit.
        """
        each = [weights] * rows if isinstance(weights, Mapping) else list(weights)
        several = isinstance(alpha, Sequence) and not isinstance(alpha, str)
        alphas: list[Any] = [*alpha] if several else [alpha] * rows  # type: ignore[misc]
        for what, given in (("weights", each), ("alpha", alphas)):
            if len(given) != rows:
                raise ValueError(f"{what} has {len(given)} entries for {rows} prompts.")
        table = torch.stack([check_weights(row, self.names) for row in each])
        checked = torch.tensor([check_alpha(value) for value in alphas], dtype=table.dtype)
        return Preference(table, checked).to(self.policy.model.device)

    def usual_alpha(self) -> float:
        """The smallest alpha that the front was measured at, or else that was trained.

        Raises:
            ValueError: neither is known.
        """
        if self.trained.front is not None:
            return float(min(point["alpha"] for point in self.trained.front["points"]))
        if self.trained.alpha_range is not None:
            return self.trained.alpha_range[0]
        raise ValueError("It is not known which alpha this policy was trained at: give alpha.")

    def generate(
        self,
        prompts: Sequence[Prompt],
        weights: Mapping[str, float] | Sequence[Mapping[str, float]],
        alpha: float | Sequence[float],
        *,
        n: int = 1,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        on_text: OnText | None = None,
    ) -> Rollout:
        """Samples ``n`` responses to every prompt, each prompt under its preference.

        What is drawn for a prompt depends on the seed and on its text, not on the other prompts.

        Args:
            prompts: P strings or conversations.
            weights: By reward name, for all prompts or one mapping for each.
            alpha: KL strength, for all prompts or one for each.
            n: Responses per prompt.
            max_new_tokens: Limit of a response; that of training if None.
            temperature: 0 is greedy; that of training if None.
            top_p: Keep the smallest set of tokens with at least this probability.
            top_k: Keep the k likeliest tokens; 0 keeps all.
            seed: Key of all draws.
            on_text: Called while responses grow.

        Returns:
            P * n responses, those of a prompt side by side; the texts are its ``completions``.

        Raises:
            ValueError: a preference that is none, no prompt, ``n`` below 1, or settings of sampling
                that are none.
        """
        if n < 1:
            raise ValueError(f"n, the responses per prompt, must be at least 1; got {n}.")
        batch = self.batch(prompts, self.preference(weights, alpha, len(_checked(prompts))))
        sampling = Sampling(
            self.trained.max_new_tokens if max_new_tokens is None else max_new_tokens,
            self.trained.temperature if temperature is None else temperature,
            top_p,
            top_k,
            seed,
        )
        with streaming(self.engine, self.policy, on_text):
            return self.engine.generate(self.policy, batch, n, sampling)

    def batch(
        self,
        prompts: Sequence[Prompt],
        preference: Preference,
        columns: Mapping[str, list[Any]] | None = None,
    ) -> PromptBatch:
        """The prompts with their preferences, as an engine takes them."""
        ids = torch.tensor([_prompt_id(prompt) for prompt in prompts])
        return PromptBatch(list(prompts), ids, dict(columns or {}), preference=preference)

    @torch.no_grad()
    def logprobs(self, rollout: Rollout) -> Tensor:
        """Log-probabilities of the responses under their preferences, shape (B, T).

        They are those of what ``engine`` samples from: with ``MOD()`` the mixture's. Behind the
        end (where ``response_mask`` is False) they mean nothing.
        """
        return self.engine.logprobs(self.policy, rollout)

    def reference_logprobs(self, rollout: Rollout) -> Tensor:
        """Log-probabilities of the responses under the reference, shape (B, T)."""
        with self.policy.reference():
            return self.policy.logprobs(rollout)


def _checked_device(device: str | torch.device | None) -> torch.device:
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=place).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"There is no device '{place}' here: {str(error)[:200]}") from error


def _read(path: str | Path, revision: str | None, trust_remote_code: bool) -> Trained:
    place = Path(path).expanduser()
    if not place.exists():
        if place.suffix == ".ckpt" or place.is_absolute() or len(place.parts) > 2:
            raise FileNotFoundError(f"There is no policy at {place.absolute()}.")
        place = _fetch(str(path), revision)
    elif revision is not None:
        raise ValueError(f"{place} is here, and has no revision '{revision}': drop the revision.")
    if (place / DESCRIPTION).is_file():
        return read_folder(place, trust_remote_code)
    return read_checkpoint(place)


def _fetch(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [DESCRIPTION, "*.safetensors", "adapter_config.json", "*/adapter_config.json"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"'{name}' is no folder here ({Path(name).absolute()}), and was not found on the hub: "
            f"{' '.join(str(error).split())}"
        ) from error


def _checked(prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    if isinstance(prompts, str) or not prompts or isinstance(prompts[0], Mapping):
        raise ValueError("prompts is a list of prompts, at least one: put a single one into [ ].")
    return prompts


def _prompt_id(prompt: Prompt) -> int:
    digest = hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _draw(front: dict[str, Any], path: Path) -> bool:
    """Draws the front; False where matplotlib is not installed."""
    from ..callbacks.plots import plot_front

    try:
        plot_front(front).savefig(path, format="png", dpi=120)
    except ModuleNotFoundError:
        return False
    return True
