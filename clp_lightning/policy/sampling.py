"""How a token is drawn: softmax(logits / temperature), by the inverse of its distribution."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Sampling", "sample_tokens", "truncate_logits"]


@dataclass
class Sampling:
    """Decoding settings. A model's own generation_config is never inherited, save its stop ids.

    Attributes:
        max_new_tokens: Limit of a response, in tokens.
        temperature: Divides the logits; 0 is greedy.
        top_p: Keep the smallest set of tokens with at least this probability; 1 keeps all.
        top_k: Keep the k likeliest tokens; 0 keeps all.
        seed: Key of all draws.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        # Python's numbers, because front.json and checkpoints hold them.
        self.max_new_tokens, self.temperature = int(self.max_new_tokens), float(self.temperature)
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1; got {self.max_new_tokens}.")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more; got {self.seed}.")
        if not self.temperature >= 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(
                "Sampling needs temperature >= 0, 0 < top_p <= 1 and top_k >= 0; got "
                f"{self.temperature}, {self.top_p}, {self.top_k}."
            )

    def check_on_policy(self) -> None:
        """Refuses settings under which the sampler is not the policy that is trained.

        Raises:
            ValueError: for truncated or greedy sampling. The nucleus moves with the weights, and
                the KL is infinite where policy and reference keep different tokens.
        """
        if self.top_p != 1.0 or self.top_k != 0 or self.temperature == 0:
            raise ValueError(
                f"Training samples from the policy itself; got temperature={self.temperature}, "
                f"top_p={self.top_p}, top_k={self.top_k}. Use temperature > 0, top_p=1, top_k=0; "
                "truncation is for steering a trained policy."
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain data, for front.json."""
        return asdict(self)


def truncate_logits(logits: Tensor, *, top_p: float, top_k: int) -> Tensor:
    """Sets the logits outside the top-k and the nucleus to -inf; shape (B, V)."""
    if top_k:
        worst_kept = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < worst_kept, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.double().softmax(-1)
        outside = probabilities.cumsum(-1) - probabilities >= top_p
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    return logits


def sample_tokens(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token a row, by inverting the cumulative distribution.

    Args:
        logits: Shape (B, V).
        uniform: One number in [0, 1) a row, shape (B,).
        sampling: Temperature and truncation.

    Returns:
        Tokens, shape (B,), and their log-probabilities under the distribution that they were
        drawn from, shape (B,).

    Example:
        >>> logits = torch.tensor([[0.25, 0.75]]).log()
        >>> [sample_tokens(logits, torch.tensor([u]), Sampling())[0].item() for u in (0.2, 0.3)]
        [0, 1]
    """
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    if sampling.temperature == 0:
        logp, tokens = logits.log_softmax(-1).max(-1)
        return tokens, logp
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    if sampling.top_p < 1 or sampling.top_k:
        logits = truncate_logits(logits, top_p=sampling.top_p, top_k=sampling.top_k)
    probabilities = logits.softmax(-1)
    # In float32 unlikely tokens of a large vocabulary would vanish in the sum, and never be drawn.
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # Strictly below the total, or rounding could choose a last token of probability 0.
    below = torch.nextafter(total, torch.zeros_like(total))
    target = (uniform.to(total.dtype).unsqueeze(-1) * total).minimum(below)
    tokens = torch.searchsorted(cumulative, target, right=True)
    # Logits that are not finite give no place; their log-probability tells, not an index error.
    tokens = tokens.clamp(max=logits.shape[-1] - 1)
    if tokens.device.type != "cpu":
        tokens = _possible(tokens, probabilities)
    logp = probabilities.gather(-1, tokens).log()
    return tokens.squeeze(-1), logp.squeeze(-1)


def _possible(tokens: Tensor, probabilities: Tensor) -> Tensor:
    """``tokens``, shape (B, 1), the likeliest in the place of those of probability 0.

    A GPU adds in blocks, so its cumulative sum may rise by a rounding where nothing was added.
    """
    chosen = probabilities.gather(-1, tokens)
    return torch.where(chosen > 0, tokens, probabilities.argmax(-1, keepdim=True))
