"""What training made of a base: all that a checkpoint or a saved folder has to hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..conditioning import Conditioner, LoRA
from ..described import rebuild
from ..policy import Encoding, Policy
from ..pretrained import Pretrained, fingerprint

__all__ = ["Trained", "lora_of"]


@dataclass
class Trained:
    """A trained policy but for its base.

    Attributes:
        pretrained: The base.
        fingerprint: Of the base's weights.
        conditioner: ``{class_path, init_args}``.
        encoding: ``init_args`` of the encoding.
        temperature: Of policy and reference alike.
        max_new_tokens: Limit of a response in training, in tokens.
        rewards: Names, in the order of a preference's columns.
        statistics: Mean and deviation that normalise each reward, by name; None where the
            checkpoint has none.
        alpha_range: Least and largest alpha that was trained; None where it is not known.
        front: The contents of front.json; None where none was measured.
        state: Trained tensors by their names in the policy; empty once it is built.
    """

    pretrained: Pretrained
    fingerprint: str
    conditioner: dict[str, Any]
    encoding: dict[str, Any]
    temperature: float
    max_new_tokens: int
    rewards: list[str]
    statistics: dict[str, list[float]] | None
    alpha_range: list[float] | None
    front: dict[str, Any] | None
    state: Mapping[str, Tensor]

    def on_base(self, base: str | Pretrained | None) -> Trained:
        """The same on a base that lies elsewhere; a name alone leaves the adapter where it is."""
        if base is None:
            return self
        if isinstance(base, str):
            base = replace(self.pretrained, name=base, revision=None)
        return replace(self, pretrained=base)

    def build(self) -> Policy:
        """The policy with its weights, in eval mode.

        Raises:
            FileNotFoundError: the base is nowhere.
            ValueError: the base is another one, or tensors are missing or left over.
        """
        try:
            mark = fingerprint(self.pretrained)
        except FileNotFoundError as error:
            where = "base=FOLDER_OR_NAME"
            if self.pretrained.adapter is not None:
                where += ", or in Python base=Pretrained(FOLDER_OR_NAME, adapter=FOLDER_OR_NAME)"
            raise FileNotFoundError(
                f"{error} If the base lies elsewhere, say where: {where}."
            ) from error
        if mark != self.fingerprint:
            raise ValueError(
                f"The policy was trained on another base than '{self.pretrained.name}': its "
                f"fingerprint is {self.fingerprint[:12]}, that of the base found is {mark[:12]}."
            )
        conditioner = rebuild(self.conditioner, Conditioner)
        policy = Policy(self.pretrained, conditioner, Encoding(**self.encoding), self.temperature)
        policy.build(self.rewards)
        _load(policy, self.state)
        return policy.eval()


@torch.no_grad()
def _load(policy: Policy, state: Mapping[str, Tensor]) -> None:
    own = policy.trained_parameters()
    for what, names in (("lacks", own.keys() - state.keys()), ("has", state.keys() - own.keys())):
        if names:
            raise ValueError(
                f"The file {what} {len(names)} tensors that its conditioner "
                f"{'has' if what == 'lacks' else 'lacks'}, first {min(names)}."
            )
    for name, parameter in own.items():
        if parameter.shape != state[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(state[name].shape)} in the file and "
                f"{tuple(parameter.shape)} in the model."
            )
        parameter.copy_(state[name])


def lora_of(conditioner: Conditioner) -> LoRA | None:
    """The LoRA that a conditioner is, or has inside; None where there is none."""
    found = getattr(conditioner, "rest", conditioner)
    return found if isinstance(found, LoRA) else None
