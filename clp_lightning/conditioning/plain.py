"""No conditioning: one set of weights for every preference, trained whole."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .base import Conditioner, Scope

__all__ = ["Unconditioned"]


class Unconditioned(Conditioner):
    """Trains every parameter of the model that is not frozen afterwards; ignores the preference.

    For supervised training and as a baseline. The trained weights replace the base's, so there is
    no reference to go back to.
    """

    def __init__(self) -> None:
        super().__init__()
        self._model: nn.Module

    def attach(self, model: nn.Module, names: Sequence[str], seed: int) -> None:
        object.__setattr__(self, "_model", model)  # registered once, by the policy
        self._names = list(names)
        model.requires_grad_(True)

    def copies(self) -> list[list[nn.Parameter]]:
        return [[] for _ in self._names]

    def shared(self) -> list[nn.Parameter]:
        return [p for p in self._model.parameters() if p.requires_grad]

    def open(self, scope: Scope):  # type: ignore[no-untyped-def]
        if scope.coefficients is None:
            raise RuntimeError("An unconditioned policy has no reference; use a conditioner.")
        return super().open(scope)

    def fold_at(self, coefficients: Tensor) -> dict[str, Tensor]:
        return dict(self._model.state_dict())
