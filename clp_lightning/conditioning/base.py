"""The Conditioner interface: how a preference (w, alpha) reaches the network.

Every parameter-space conditioning of the library is one equation (docs/method.md, section 2),
``theta(w, alpha) = theta_ref + sum_i c_i(w, alpha) * Delta_i``, with another choice of the
parameters, the rank of Delta and the coefficients c.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..described import Described, check_choice
from ..types import Preference, Prompt

__all__ = ["Coefficients", "Conditioner", "Gate", "Scaled", "Scope", "Weights", "all_equal"]


class Coefficients(Described, nn.Module, ABC):
    """The coefficients c_i(w, alpha) that the copies are mixed with.

    Args:
        shared: Coefficient of the shared part: ``scaled`` is (1 - alpha), so that alpha = 1 is the
            reference; ``constant`` is 1.
    """

    def __init__(self, shared: Literal["scaled", "constant"] = "scaled") -> None:
        super().__init__()
        self.shared = check_choice("shared", shared, ["scaled", "constant"])

    def build(self, num_rewards: int, seed: int) -> None:
        """Creates weights, where there are any; called once by ``Conditioner.attach``."""

    @abstractmethod
    def copies(self, preference: Preference) -> Tensor:
        """One coefficient per row and reward, shape (B, K)."""

    def forward(self, preference: Preference) -> Tensor:
        """Coefficients of the K copies, then of the shared part, shape (B, K + 1)."""
        alpha = preference.alpha.unsqueeze(-1)
        shared = 1 - alpha if self.shared == "scaled" else torch.ones_like(alpha)
        copies = self.copies(preference)
        if copies.shape != preference.weights.shape:
            raise ValueError(
                f"{type(self).__name__}.copies returned shape {tuple(copies.shape)}; it must be "
                f"one coefficient per row and reward: {tuple(preference.weights.shape)}."
            )
        return torch.cat([copies, shared], dim=-1)


class Scaled(Coefficients):
    """``c_i = (1 - alpha) w_i``, the paper's equation: alpha = 1 is the reference."""

    def copies(self, preference: Preference) -> Tensor:
        return (1 - preference.alpha.unsqueeze(-1)) * preference.weights


class Weights(Coefficients):
    """``c_i = w_i``: the network does not see alpha, save in the shared part."""

    def copies(self, preference: Preference) -> Tensor:
        return preference.weights


class Gate(Coefficients):
    """A small learned gate, ``c_i = (1 - alpha) (w_i + g_i(w, alpha))`` with g = 0 at the start.

    Args:
        hidden: Width of the gate's hidden layer.
        shared: As in ``Coefficients``.
    """

    def __init__(self, hidden: int = 16, shared: Literal["scaled", "constant"] = "scaled") -> None:
        super().__init__(shared)
        if hidden < 1:
            raise ValueError(f"hidden must be at least 1; got {hidden}.")
        self.hidden = hidden
        self.gate: nn.Sequential | None = None

    def build(self, num_rewards: int, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            first, last = (
                nn.Linear(num_rewards + 1, self.hidden),
                nn.Linear(self.hidden, num_rewards),
            )
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.gate = nn.Sequential(first, nn.Tanh(), last)

    def copies(self, preference: Preference) -> Tensor:
        assert self.gate is not None, "Conditioner.attach builds the gate"
        alpha = preference.alpha.unsqueeze(-1)
        seen = torch.cat([preference.weights, alpha], dim=-1)
        return (1 - alpha) * (preference.weights + self.gate(seen))


@dataclass
class Scope:
    """What the network answers for, inside one block.

    Attributes:
        coefficients: Shape (rows, K + 1); one row when merged; None for the reference.
        cache: Tensors derived from the weights, reused while no gradient is recorded.
    """

    coefficients: Tensor | None
    cache: dict[Any, Any] = field(default_factory=dict)


class Conditioner(Described, nn.Module, ABC):
    """Attaches to a model and makes it answer for a preference, inside a scope and only there.

    The constructor takes a description; ``attach`` creates the weights. Subclasses read
    ``self.scope`` in the layers that they change; outside a scope it raises, so a forgotten
    preference cannot give silently wrong gradients.

    Args:
        coefficients: How (w, alpha) become the coefficients of the copies; ``Scaled()`` if None.
    """

    #: True where training needs one preference for the whole Lightning batch.
    one_preference_per_batch: bool = False
    #: True where ``rewrite`` changes prompts, so that the reference sees others.
    rewrites: bool = False
    _attached: bool = False

    def __init__(self, coefficients: Coefficients | None = None) -> None:
        super().__init__()
        self.coefficients = coefficients or Scaled()
        self._scope: Scope | None = None

    def attach_once(self, model: nn.Module, names: Sequence[str], seed: int) -> None:
        """``attach``, for the one model that this conditioner can belong to.

        Raises:
            ValueError: it belongs to another already, whose training it would undo.
        """
        if self._attached:
            raise ValueError(
                f"This {type(self).__name__} belongs to another policy; make a new one for each "
                "module."
            )
        self.attach(model, names, seed)
        self._attached = True

    @abstractmethod
    def attach(self, model: nn.Module, names: Sequence[str], seed: int) -> None:
        """Adds the K copies to ``model`` in place, all zero in effect, the base frozen.

        Args:
            model: A Transformers model.
            names: The K reward names, in the order of the preference's columns.
            seed: Key of the initial weights.
        """

    @abstractmethod
    def copies(self) -> list[list[nn.Parameter]]:
        """Parameters of each copy, K lists, in the order of the rewards."""

    @abstractmethod
    def shared(self) -> list[nn.Parameter]:
        """Parameters that all preferences share, possibly none."""

    def changed_layers(self) -> list[nn.Module] | None:
        """The layers that are trained, or compute otherwise under a preference; None if any may."""
        return None

    def move_in(self) -> None:
        """Puts parameters that lie outside the model into the modules that compute with them.

        Called before a strategy shards the model, which shards them along.
        """

    def take_shards(self) -> None:
        """Called when the model is sharded: what ``move_in`` moved is now its shard."""

    @torch.no_grad()
    def fold(self, preference: Preference) -> dict[str, Tensor]:
        """The model's plain state dict at one preference, as if it had never been conditioned.

        Raises:
            ValueError: if ``preference`` has more than one row.
        """
        if len(preference) != 1:
            raise ValueError(f"fold() takes one preference; got {len(preference)} rows.")
        return self.fold_at(self.coefficients(preference)[0])

    @abstractmethod
    def fold_at(self, coefficients: Tensor) -> dict[str, Tensor]:
        """The plain state dict at given coefficients, shape (K + 1,), the shared part's last."""

    def rewrite(self, prompt: Prompt, preference: Preference) -> Prompt:
        """The prompt that the policy sees; parameter-space conditionings leave it as it is."""
        return prompt

    @property
    def scope(self) -> Scope:
        """The open scope.

        Raises:
            RuntimeError: outside any scope.
        """
        if self._scope is None:
            raise RuntimeError(
                "The conditioned model was called outside a preference. Wrap the call in "
                "`with policy.conditioned(preference):` or `with policy.reference():`."
            )
        return self._scope

    def rows(
        self, preference: Preference, index: Tensor | None = None
    ) -> AbstractContextManager[None]:
        """Answers for another preference in every row of the batch.

        Args:
            preference: Any number of rows.
            index: Row of ``preference`` for each row of the batch, shape (rows,); without it the
                batch has exactly the preference's rows.
        """
        if len(preference) == 1:
            return self.merged(preference)
        if index is not None:
            preference = preference[index]
        reason = self.why_not_rows()
        if (reason or self.one_preference_per_batch) and all_equal(preference):
            return self.merged(preference[:1])
        if reason:
            raise ValueError(
                f"Another preference in every row is not possible here: {reason}. Use one "
                'preference per batch: CLPCallback(per="batch").'
            )
        return self.open(Scope(self.coefficients(preference)))

    def why_not_rows(self) -> str | None:
        """Why this model cannot answer for another preference in every row; None where it can."""
        return None

    def needs_runs(self, preference: Preference) -> bool:
        """Whether rows of one preference are fast only side by side, in equal numbers."""
        return False

    def session(self) -> AbstractContextManager[None]:
        """Opened around all scopes of one preference, where work can be shared among them."""
        return nullcontext()

    def merged(self, preference: Preference) -> AbstractContextManager[None]:
        """Answers for one preference, whatever the number of rows in the batch.

        Raises:
            ValueError: if ``preference`` has more than one row.
        """
        if len(preference) != 1:
            raise ValueError(f"merged() takes one preference; got {len(preference)} rows.")
        return self.open(Scope(self.coefficients(preference)))

    def reference(self) -> AbstractContextManager[None]:
        """Answers as the reference: every coefficient 0, the shared part's too."""
        return self.open(Scope(None))

    @contextmanager
    def open(self, scope: Scope) -> Iterator[None]:
        """Opens ``scope`` for the block."""
        outer, self._scope = self._scope, scope
        try:
            yield
        finally:
            self._scope = outer

    def checkpoint_context(
        self,
    ) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """``context_fn`` of torch.utils.checkpoint.

        The recomputation in the backward pass, when the block has long been left, runs under the
        preference of its forward.
        """
        scope = self.scope
        # A cache made without gradients must not leak into the recomputation.
        return nullcontext(), self.open(Scope(scope.coefficients))

    def drop_idle_gradients(self, used: Tensor) -> None:
        """Sets the gradient of copies that no preference of this step used to None.

        A zero gradient would still move them, on stale Adam moments.

        Args:
            used: True where some coefficient was not 0, shape (K + 1,), the shared part last.
        """
        for active, parameters in zip(used.tolist(), [*self.copies(), self.shared()], strict=True):
            if not active:
                for parameter in parameters:
                    parameter.grad = None


def all_equal(preference: Preference) -> bool:
    """Whether every row asks for the same."""
    weights, alpha = preference.weights, preference.alpha
    return bool((weights == weights[:1]).all() and (alpha == alpha[:1]).all())
