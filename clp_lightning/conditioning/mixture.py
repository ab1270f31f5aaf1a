"""Full-rank conditioning: K deltas on any parameters, merged, or mixed per row."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..described import check_choice
from ..types import Preference
from .base import Coefficients, Conditioner, Scope, all_equal
from .forwards import forwards_replaced
from .rowwise import Change, Place, RowForwards, why_not_rows
from .sharded import delta_name, mix_at_home
from .targets import check_preset, in_attention

__all__ = ["Mixture"]

PRESETS = ("full", "attention", "logits")


class Mixture(Conditioner):
    """One full-rank delta per reward on chosen parameters, and one shared delta on the rest.

    ``theta(w, alpha) = theta_ref + sum_i c_i Delta_i``, all deltas zero at the start
    (docs/method.md, section 2). Merging computes plain weights once per preference; row mode mixes
    outputs and answers for another preference in every row.

    Args:
        targets: ``full`` (every parameter), ``attention`` (the projections inside attention
            blocks), ``logits`` (the output layer), or a list of regular expressions, each
            searched for in the parameters' full names.
        rest: ``train`` the other parameters as one delta that all preferences share, or
            ``freeze`` them.
        tied: What happens to an output layer that is the embedding table: ``keep`` moves both
            ends by one delta, ``split`` gives the output layer a delta of its own. By default
            ``logits`` splits and everything else keeps.
        mixing: ``auto`` merges in training, which then needs one preference per Lightning batch,
            and mixes rows for several preferences elsewhere. ``row`` takes several preferences in
            training too, and merges for each of them, layer by layer, where many positions stand
            under it. ``merge`` never mixes rows. With a base in half precision merging rounds the
            deltas to it, which mixing does not.
        coefficients: How (w, alpha) mix the deltas; ``Scaled()`` if None.
    """

    deltas: nn.ModuleList
    shared_delta: nn.ParameterDict

    def __init__(
        self,
        targets: str | list[str] = "full",
        rest: Literal["train", "freeze"] = "train",
        tied: Literal["keep", "split"] | None = None,
        mixing: Literal["auto", "merge", "row"] = "auto",
        coefficients: Coefficients | None = None,
    ) -> None:
        super().__init__(coefficients)
        check_preset(targets, PRESETS)
        self.targets = targets
        self.rest = check_choice("rest", rest, ["train", "freeze"])
        check_choice("tied", tied, [None, "keep", "split"])
        self.tied = tied or ("split" if targets == "logits" else "keep")
        self.mixing = check_choice("mixing", mixing, ["auto", "merge", "row"])
        self.one_preference_per_batch = mixing != "row"
        self._places: list[list[tuple[nn.Module, str]]] = []
        self._merged: dict[Any, list[Tensor]] | None = None
        self._model: Any = None
        self._moved_in = False
        self._row_forwards = RowForwards(self)

    def attach(self, model: nn.Module, names: Sequence[str], seed: int) -> None:
        model.requires_grad_(False)
        self.coefficients.build(len(names), seed)
        object.__setattr__(self, "_model", model)  # registered once, by the policy
        self.deltas = nn.ModuleList(nn.ParameterDict() for _ in names)
        self.shared_delta = nn.ParameterDict()
        conditioned: list[tuple[str, list[tuple[nn.Module, str]]]] = []
        others: list[tuple[str, list[tuple[nn.Module, str]]]] = []
        for name, places in self._owners(model):
            chosen = self._is_chosen(name, places) and bool(names)
            (conditioned if chosen else others).append((name, places))
        self._check_targets([name for name, _ in [*conditioned, *others]], names, conditioned)
        self._labels = [name for name, _ in [*conditioned, *others]]
        self._places = [places for _, places in conditioned]
        for name, places in conditioned:
            for delta in self.deltas:
                delta[_key(name)] = nn.Parameter(_zeros(places))  # type: ignore[operator]
        if self.rest == "train":
            self._places += [places for _, places in others]
            for name, places in others:
                self.shared_delta[_key(name)] = nn.Parameter(_zeros(places))
        self._num_conditioned = len(conditioned)

    def _check_targets(
        self, labels: Sequence[str], names: Sequence[str], conditioned: Sequence[Any]
    ) -> None:
        patterns = self.targets if isinstance(self.targets, list) else []
        unmatched = [p for p in patterns if not any(re.search(p, label) for label in labels)]
        if names and (unmatched or not conditioned):
            kinds = sorted({re.sub(r"\.\d+\.", ".N.", label) for label in labels})
            raise ValueError(
                f"{unmatched or self.targets} matches no parameter of {', '.join(kinds)}. A tied "
                "output layer goes by the input table's name, unless tied='split'."
            )

    def _owners(self, model: nn.Module) -> Iterator[tuple[str, list[tuple[nn.Module, str]]]]:
        """Every parameter with all modules that hold it; a split output layer stands alone."""
        output = self._model.get_output_embeddings()
        found: dict[Any, tuple[str, list[tuple[nn.Module, str]]]] = {}
        for prefix, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                alone = self.tied == "split" and module is output and name == "weight"
                key = (id(parameter), alone)
                label = f"{prefix}.{name}" if prefix else name
                found.setdefault(key, (label, []))[1].append((module, name))
        yield from found.values()

    def _is_chosen(self, name: str, places: list[tuple[nn.Module, str]]) -> bool:
        if self.targets == "full":
            return True
        if self.targets == "attention":
            linear = isinstance(places[0][0], (nn.Linear, Conv1D))
            return linear and in_attention(name.rsplit(".", 1)[0])
        if self.targets == "logits":
            output = self._model.get_output_embeddings()
            return any(module is output for module, _ in places)
        return any(re.search(pattern, name) for pattern in self.targets)

    def changed_layers(self) -> list[nn.Module]:
        return [module for places in self._places for module, _ in places]

    # -- merging ------------------------------------------------------------------------------

    @contextmanager
    def session(self) -> Iterator[None]:
        """Merges a preference once for all forward passes of the block."""
        outer, self._merged = self._merged, {}
        try:
            yield
        finally:
            self._merged = outer

    @contextmanager
    def open(self, scope: Scope) -> Iterator[None]:
        with super().open(scope):
            if scope.coefficients is None:
                yield
            elif self._moved_in:
                with mix_at_home(self._homes(), scope, partial(_sum, scope.coefficients[0])):
                    yield
            elif len(scope.coefficients) == 1:
                with _swapped(self._changes(), self._merge(scope.coefficients[0])):
                    yield
            else:
                with self._rows_mixed(scope.coefficients):
                    yield

    @contextmanager
    def _rows_mixed(self, coefficients: Tensor) -> Iterator[None]:
        changes = self._changes()
        if _shared_alike(coefficients):  # what all preferences share is merged
            k = self._num_conditioned
            merged = self._merge(coefficients[0], start=k)
            mixed = self._row_forwards.of(changes[:k])
            with _swapped(changes[k:], merged), forwards_replaced(mixed):
                yield
        else:
            with forwards_replaced(self._row_forwards.of(changes)):
                yield

    def checkpoint_context(
        self,
    ) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        if self._moved_in:
            return super().checkpoint_context()
        inner = self.scope
        kept: dict[Any, list[Tensor]] = {}
        if inner.coefficients is not None:
            start = 0 if len(inner.coefficients) == 1 else self._num_conditioned
            if _shared_alike(inner.coefficients):
                key = _merge_key(inner.coefficients[0], start)
                kept[key] = self._merge(inner.coefficients[0], start)

        @contextmanager
        def again() -> Iterator[None]:
            # The very tensors of the forward: merging anew in every block would be slow.
            outer, self._merged = self._merged, kept
            try:
                with self.open(inner):
                    yield
            finally:
                self._merged = outer

        return nullcontext(), again()

    def _changes(self) -> list[Change]:
        """Every parameter's; the conditioned ones first."""
        k = len(self.deltas)
        copies = self.copies()
        changes: list[Change] = [
            (places, [copy[i] for copy in copies], list(range(k)))
            for i, places in enumerate(self._places[: self._num_conditioned])
        ]
        shared = zip(self._places[self._num_conditioned :], self.shared(), strict=True)
        for places, delta in shared:
            changes.append((places, [delta], [k]))
        return changes

    def _merge(self, coefficients: Tensor, start: int = 0) -> list[Tensor]:
        """``theta_ref + sum_i c_i Delta_i`` of the parameters from ``start`` on, c of (K + 1,)."""
        key = _merge_key(coefficients, start)
        if self._merged is not None and key in self._merged:
            return self._merged[key]
        merged = _sums(self._changes()[start:], coefficients)
        if self._merged is not None:
            self._merged[key] = merged
        return merged

    # -- sharding -----------------------------------------------------------------------------

    def _homes(self) -> list[tuple[list[Place], list[int]]]:
        """Every parameter's places, and the columns of its deltas."""
        k = len(self.deltas)
        copies = [(places, list(range(k))) for places in self._places[: self._num_conditioned]]
        return [*copies, *((places, [k]) for places in self._places[self._num_conditioned :])]

    def move_in(self) -> None:
        self._moved_in = True
        for (places, deltas, _), (_, columns) in zip(self._changes(), self._homes(), strict=True):
            module, name = places[0]
            for delta, column in zip(deltas, columns, strict=True):
                module.register_parameter(delta_name(name, column), delta)  # type: ignore[arg-type]

    def take_shards(self) -> None:
        owners: list[Any] = [*self.deltas, self.shared_delta]
        for label, (places, columns) in zip(self._labels, self._homes(), strict=False):
            module, name = places[0]
            for column in columns:
                owners[column][_key(label)] = module._parameters[delta_name(name, column)]

    # -- what others ask ----------------------------------------------------------------------

    def why_not_rows(self) -> str | None:
        if self.mixing == "merge":
            return "mixing is 'merge'"
        return why_not_rows(dict(zip(self._labels, self._places, strict=False)))

    def needs_runs(self, preference: Preference) -> bool:
        return not all_equal(preference)

    def copies(self) -> list[list[nn.Parameter]]:
        return [list(delta.parameters()) for delta in self.deltas]

    def shared(self) -> list[nn.Parameter]:
        return list(self.shared_delta.values())

    @torch.no_grad()
    def fold_at(self, coefficients: Tensor) -> dict[str, Tensor]:
        with _swapped(self._changes(), self._merge(coefficients)):
            # Copies, because the base's own tensors come back when the block is left.
            return {
                name: value.detach().clone() for name, value in self._model.state_dict().items()
            }


def _sums(changes: list[Change], coefficients: Tensor) -> list[Tensor]:
    """The parameters with their deltas added, at coefficients of shape (K + 1,)."""
    sums: list[Tensor] = []
    for places, deltas, columns in changes:
        module, name = places[0]
        base = module._parameters[name]
        assert base is not None
        sums.append(_sum(coefficients, base, deltas, columns))
    return sums


def _sum(coefficients: Tensor, base: Tensor, deltas: list[Tensor], columns: list[int]) -> Tensor:
    # In the deltas' precision, and rounded to the base's once.
    total = base.to(deltas[0].dtype)
    for delta, column in zip(deltas, columns, strict=True):
        total = torch.addcmul(total, delta, coefficients[column].to(total))
    return total.to(base.dtype)


@contextmanager
def _swapped(changes: list[Change], tensors: list[Tensor]) -> Iterator[None]:
    """``tensors`` in the place of the base's parameters, inside the block."""
    places = [
        (module, name, tensor)
        for (homes, _, _), tensor in zip(changes, tensors, strict=True)
        for module, name in homes
    ]
    kept = [(module, name, module._parameters[name]) for module, name, _ in places]
    for module, name, tensor in places:
        module._parameters[name] = tensor  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, name, parameter in kept:
            module._parameters[name] = parameter


def _key(name: str) -> str:
    return name.replace(".", "/")


def _zeros(places: list[tuple[nn.Module, str]]) -> Tensor:
    module, name = places[0]
    base = module._parameters[name]
    assert base is not None
    if not base.is_floating_point():
        raise ValueError(f"{name} is quantised; full-rank deltas need a floating-point base.")
    # Small updates vanish in half precision, whatever the base is kept in.
    return torch.zeros_like(base, dtype=torch.promote_types(base.dtype, torch.float32))


def _merge_key(coefficients: Tensor, start: int) -> tuple[Any, ...]:
    return (*coefficients.detach().tolist(), start, torch.is_grad_enabled())


def _shared_alike(coefficients: Tensor) -> bool:
    """Whether the shared part's coefficient is the same in every row."""
    return bool((coefficients[:, -1] == coefficients[0, -1]).all())
