"""Conditioning through the input: the preference as text, or added to the embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..described import check_choice
from ..types import Preference, Prompt
from .base import Coefficients, Conditioner, Gate, Scope
from .mixture import Mixture
from .rowwise import embedding_scale
from .sharded import ADOPTED

__all__ = ["PromptText", "SoftPrompt"]

_WORDS = [(0.05, "not at all"), (0.3, "a little"), (0.6, "moderately"), (0.95, "strongly")]


class _Around(Conditioner):
    """A conditioner around another that trains what all preferences share."""

    def __init__(self, rest: Conditioner | None, coefficients: Coefficients | None) -> None:
        super().__init__(coefficients)
        self.rest = rest or Mixture()
        if self.rest.init_args.get("coefficients") is not None:
            raise ValueError(
                f"The coefficients of {type(self).__name__} rule what `rest` trains too; give them "
                f"to {type(self).__name__}, not to {type(self.rest).__name__}."
            )

    def attach(self, model: nn.Module, names: Sequence[str], seed: int) -> None:
        self._names = list(names)
        self.coefficients.build(len(names), seed)
        self.rest.attach_once(model, [], seed)  # no rewards: only what all preferences share

    def copies(self) -> list[list[nn.Parameter]]:
        return [[] for _ in self._names]

    def shared(self) -> list[nn.Parameter]:
        return self.rest.shared()

    def why_not_rows(self) -> str | None:
        return self.rest.why_not_rows()

    def needs_runs(self, preference: Preference) -> bool:
        # Its weights are the same in every row for what all preferences share.
        return self.rest.needs_runs(Preference(preference.weights[:, :0], preference.alpha))

    def session(self) -> AbstractContextManager[None]:
        return self.rest.session()

    def move_in(self) -> None:
        self.rest.move_in()

    def take_shards(self) -> None:
        self.rest.take_shards()

    @contextmanager
    def open(self, scope: Scope) -> Iterator[None]:
        with ExitStack() as scopes:
            scopes.enter_context(super().open(scope))
            shared = scope.coefficients
            inner = None if shared is None else shared[:, -1:]
            if inner is not None and bool((inner == inner[:1]).all()):
                inner = inner[:1]  # the shared part does not see w
            scopes.enter_context(self.rest.open(Scope(inner)))
            yield

    def checkpoint_context(
        self,
    ) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        scope = self.scope
        now, rest_again = self.rest.checkpoint_context()

        @contextmanager
        def again() -> Iterator[None]:
            with super(_Around, self).open(Scope(scope.coefficients)), rest_again:
                yield

        return now, again()

    def fold_at(self, coefficients: Tensor) -> dict[str, Tensor]:
        return self.rest.fold_at(coefficients[-1:])


class PromptText(_Around):
    """Prompt-CLP: the weights and alpha are written into the prompt.

    The text goes in front of a string, or in front of the last user message of a conversation, so
    that a system message survives, the model's own or the user's. At step 0 the policy is *not*
    the reference, whose log-probabilities are always those of the plain prompt; the KL of step 0
    is in the logs. The text comes on top of ``max_prompt_tokens``, so it is never cut off.

    Args:
        form: ``number`` writes the weights with two digits, ``word`` in words.
        rest: What is trained, the same for all preferences: ``Mixture()`` (every parameter) if
            None, or for example ``LoRA(shared_rank=16)``.
        coefficients: Its ``shared`` rule scales what is trained.
    """

    rewrites = True

    def __init__(
        self,
        form: Literal["number", "word"] = "number",
        rest: Conditioner | None = None,
        coefficients: Coefficients | None = None,
    ) -> None:
        if isinstance(coefficients, Gate):
            raise ValueError(
                "PromptText has no copies that a Gate could mix, so it would be trained for "
                "nothing; leave `coefficients` out."
            )
        super().__init__(rest, coefficients)
        self.form = check_choice("form", form, ["number", "word"])

    def rewrite(self, prompt: Prompt, preference: Preference) -> Prompt:
        text = self.text(preference.weights[0].tolist(), float(preference.alpha[0]))
        if isinstance(prompt, str):
            return f"{text}{prompt}"
        row = max((i for i, m in enumerate(prompt) if m["role"] == "user"), default=0)
        message = {**prompt[row], "content": _prepend(text, prompt[row]["content"])}
        return [*prompt[:row], message, *prompt[row + 1 :]]

    def text(self, weights: Sequence[float], alpha: float) -> str:
        """What is written for one preference; override to say it in other words."""
        say = _word if self.form == "word" else "{:.2f}".format
        parts = [f"{name}: {say(w)}" for name, w in zip(self._names, weights, strict=True)]
        return f"[{', '.join(parts)}; stay close: {say(alpha)}]\n"


def _prepend(text: str, content: Any) -> Any:
    """``text`` in front of a message's content, a string or a list of parts."""
    if isinstance(content, str):
        return f"{text}{content}"
    for i, part in enumerate(content):
        if part.get("type") == "text":
            return [*content[:i], {**part, "text": f"{text}{part['text']}"}, *content[i + 1 :]]
    return [{"type": "text", "text": text}, *content]


def _word(value: float) -> str:
    return next((word for bound, word in _WORDS if value < bound), "only")


class SoftPrompt(_Around):
    """Soft-prompt-CLP: a zero-initialised map of the coefficients, added to every embedding.

    ``e_bt + sum_i c_i(w, alpha) m_i`` with one vector m_i per reward; with all coefficients 0 it
    is the reference.

    Args:
        rest: What is trained, the same for all preferences: ``Mixture()`` (every parameter) if
            None, or for example ``LoRA(shared_rank=16)``.
        coefficients: How (w, alpha) mix the vectors; ``Scaled()`` if None.
    """

    def __init__(
        self, rest: Conditioner | None = None, coefficients: Coefficients | None = None
    ) -> None:
        super().__init__(rest, coefficients)

    def attach(self, model: nn.Module, names: Sequence[str], seed: int) -> None:
        super().attach(model, names, seed)
        table = model.get_input_embeddings().weight  # type: ignore[operator]
        # As exact as what else is trained: sharded weights that are trained are of one type.
        dtype = torch.promote_types(table.dtype, torch.float32)
        self.vectors = nn.ParameterList(
            nn.Parameter(torch.zeros(table.shape[-1], dtype=dtype)) for _ in names
        )
        # T5 has one table in several modules.
        self._tables = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Embedding) and module.weight is table
        }
        for module in self._tables.values():
            module.register_forward_hook(self._add)

    def _add(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        scope = self.scope
        if scope.coefficients is None:
            return out
        vectors = torch.stack(self._whole_vectors())
        added = scope.coefficients[:, :-1].to(vectors) @ vectors  # (rows, d)
        if len(added) not in (1, len(out)):
            raise ValueError(
                f"{len(added)} preferences meet embeddings of {len(out)} rows; rows and "
                "preferences cannot be matched."
            )
        return out + added.unsqueeze(1).to(out.dtype)

    def _whole_vectors(self) -> list[Any]:
        """The vectors as a forward finds them, gathered where the model is sharded."""
        home = next(iter(self._tables.values()))
        moved = [home._parameters.get(f"{ADOPTED}{i}") for i in range(len(self.vectors))]
        return list(self.vectors) if None in moved else moved

    def move_in(self) -> None:
        super().move_in()
        home = next(iter(self._tables.values()))
        for i, vector in enumerate(self.vectors):
            home.register_parameter(f"{ADOPTED}{i}", vector)

    def take_shards(self) -> None:
        super().take_shards()
        for i, shard in enumerate(self._whole_vectors()):
            self.vectors[i] = shard

    def copies(self) -> list[list[nn.Parameter]]:
        return [[vector] for vector in self.vectors]

    @torch.no_grad()
    def fold_at(self, coefficients: Tensor) -> dict[str, Tensor]:
        """Plain weights: the preference's vector is in the embedding of every token.

        The output layer does not carry it, so a tied table comes apart.
        """
        state = super().fold_at(coefficients)
        vectors = torch.stack(list(self.vectors))
        added = coefficients[:-1].to(vectors) @ vectors
        for name, module in self._tables.items():
            scale = embedding_scale(module)  # Gemma's comes after the table
            weight = state[f"{name}.weight"]
            state[f"{name}.weight"] = weight + (added / scale).to(weight.dtype)
        return state
