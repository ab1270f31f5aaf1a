"""A critic: what to expect of a prompt under a preference, as a baseline."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..described import Described
from ..types import Preference

__all__ = ["Critic"]


class Critic(Described, nn.Module):
    """K + 1 heads on the prompt's state and the preference: expected rewards, and expected KL.

    An alternative to leave-one-out where a prompt has few responses. The state is the reference's
    at the prompt's last token, which does not move while the policy is trained; the preference
    stands beside it. Its loss is in the policy's, so ``gradient_clip_val`` sees both gradients.

    Args:
        hidden: Width of the hidden layer.
        lr: Learning rate of the critic.
    """

    body: nn.Sequential

    def __init__(self, hidden: int = 64, lr: float = 3e-3) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"hidden must be at least 1; got {hidden}.")
        if not lr >= 0:
            raise ValueError(f"The critic's lr must be 0 or more; got {lr}.")
        self.hidden = hidden
        self.lr = lr

    @property
    def is_built(self) -> bool:
        """Whether the weights are there."""
        return "body" in self._modules

    def build(self, width: int, num_rewards: int, seed: int) -> None:
        """Creates the weights; a second call does nothing.

        Args:
            width: Of the state.
            num_rewards: K.
            seed: Key of the initial weights; the heads start at 0.
        """
        if self.is_built:
            return
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            first = nn.Linear(width + num_rewards + 1, self.hidden)
            heads = nn.Linear(self.hidden, num_rewards + 1)
        nn.init.zeros_(heads.weight)
        nn.init.zeros_(heads.bias)
        self.body = nn.Sequential(first, nn.Tanh(), heads)

    def forward(self, states: Tensor, preference: Preference) -> Tensor:
        """Expected signals, shape (B, K + 1).

        Args:
            states: Shape (B, width); no gradient goes into them.
            preference: B rows.
        """
        states = self.norm(states.detach().to(self.body[-1].bias))  # type: ignore[arg-type]
        seen = [states, preference.weights.to(states), preference.alpha.to(states).unsqueeze(-1)]
        predicted: Tensor = self.body(torch.cat(seen, dim=-1))
        return predicted

    @staticmethod
    def loss(predicted: Tensor, signals: Tensor, *, num_responses: float) -> Tensor:
        """Half the squared error of every head, summed over the heads.

        Args:
            predicted: Shape (B, K + 1).
            signals: What came, shape (B, K + 1); NaN = not scored, which no head learns from.
            num_responses: What the sum over responses is divided by.
        """
        scored = ~signals.isnan()
        error = (predicted - signals.masked_fill(~scored, 0)) * scored
        return error.square().sum() / (2 * num_responses)
