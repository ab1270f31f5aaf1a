"""Low-rank conditioning: one PEFT adapter per reward, stacked, mixed per row."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn

from ..functional import linear
from ..types import Preference
from .adapter import Factors
from .base import Coefficients, Conditioner
from .targets import PRESETS, check_preset, select_layers

__all__ = ["LoRA"]

SHARED = "shared"
Layer = Any
"""A PEFT ``LoraLayer``: a module whose parts, by adapter name, exist at run time only."""


class LoRA(Conditioner):
    """One LoRA per reward and, by default, one that all preferences share.

    The adapters are PEFT's own (configuration, initialisation, saving); only the forward is
    ours: all adapters of a layer are stacked in the rank dimension, so their mixture costs one
    pair of products, ``y_b = base(x_b) + B diag(c_b) A x_b``. It calls the base layer and never
    reads its weight, so quantised bases work. ``B = 0`` at the start: step 0 is the reference.

    Args:
        rank: Rank of each reward's adapter.
        scale: Factor on every adapter's product (PEFT's lora_alpha / r).
        targets: Layers of the rewards' adapters: ``attention``, ``all-linear``,
            ``all-linear+output``, or a list of regular expressions.
        last_blocks: Adapt only the last so many transformer blocks.
        shared_rank: Rank of the shared adapter; 0 for none. What all preferences want alike
            must be learnable once.
        shared_targets: Layers of the shared adapter.
        coefficients: How (w, alpha) mix the adapters; ``Scaled()`` if None.
        start_from: Existing PEFT adapters to start from, reward name (or ``shared``) to folder.
    """

    def __init__(
        self,
        rank: int = 8,
        scale: float = 2.0,
        targets: str | list[str] = "attention",
        last_blocks: int | None = None,
        shared_rank: int = 8,
        shared_targets: str | list[str] = "all-linear+output",
        coefficients: Coefficients | None = None,
        start_from: dict[str, str] | None = None,
    ) -> None:
        super().__init__(coefficients)
        if rank < 1 or shared_rank < 0:
            raise ValueError(f"rank must be >= 1 and shared_rank >= 0; got {rank}, {shared_rank}.")
        if not (scale > 0 and math.isfinite(scale)):
            raise ValueError(f"scale must be above 0 and finite; got {scale}.")
        if last_blocks is not None and last_blocks < 1:
            raise ValueError(f"last_blocks must be at least 1; got {last_blocks}.")
        check_preset(targets, PRESETS)
        check_preset(shared_targets, PRESETS)
        self.rank = rank
        self.scale = scale
        self.targets = targets
        self.last_blocks = last_blocks
        self.shared_rank = shared_rank
        self.shared_targets = shared_targets
        self.start_from = dict(start_from or {})
        self._model: nn.Module
        self._layers: dict[str, Layer] = {}
        self._adapters: dict[str, int] = {}

    def attach(self, model: nn.Module, names: Sequence[str], seed: int) -> None:
        unknown = sorted(set(self.start_from) - {*names, SHARED})
        if unknown:
            raise ValueError(
                f"start_from names {unknown}, which are not among the rewards {list(names)}."
            )
        if SHARED in names and (self.shared_rank or SHARED in self.start_from):
            raise ValueError(
                f"A reward cannot be called '{SHARED}' beside the adapter of that name: rename it, "
                "or set shared_rank=0."
            )
        model.requires_grad_(False)
        self.coefficients.build(len(names), seed)
        # A prefix, because PEFT mistakes some plain names ("a", "default") for its own.
        self._adapters = {f"reward_{name}": column for column, name in enumerate(names)}
        start_from = {f"reward_{name}": path for name, path in self.start_from.items()}
        configs = {
            adapter: self._config(model, self.rank, self.targets) for adapter in self._adapters
        }
        if self.shared_rank or SHARED in self.start_from:
            self._adapters[SHARED] = len(names)
            configs[SHARED] = self._config(model, max(self.shared_rank, 1), self.shared_targets)
            start_from[SHARED] = self.start_from.get(SHARED, "")
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # Several adapters, one on a tied output layer, and fan_in_fan_out: all meant.
            warnings.filterwarnings("ignore", module="peft")
            torch.manual_seed(seed)
            for adapter, config in configs.items():
                _inject(model, adapter, config, start_from.get(adapter))
        # The model owns its layers: past nn.Module's registration, so that they are stored once.
        object.__setattr__(self, "_model", model)
        self._layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
        for name, layer in self._layers.items():
            _refuse_nonlinear(name, layer)
            columns = self._columns(layer)
            layer.forward = partial(self._stacked_forward, layer, columns)
        for parameters in [*self.copies(), self.shared()]:
            for parameter in parameters:
                # Small updates vanish in half precision, whatever the base is kept in.
                if parameter.dtype in (torch.float16, torch.bfloat16):
                    parameter.data = parameter.data.float()
                parameter.requires_grad_(True)

    def _config(self, model: nn.Module, rank: int, targets: str | list[str]) -> LoraConfig:
        return LoraConfig(
            r=rank,
            lora_alpha=self.scale * rank,  # type: ignore[arg-type]  # PEFT divides it by r
            target_modules=select_layers(model, targets, self.last_blocks),
            lora_dropout=0.0,
        )

    def _columns(self, layer: Layer) -> Tensor:
        """Coefficient column of every stacked rank of ``layer``, shape (R,)."""
        return torch.cat(
            [
                torch.full((layer.r[adapter],), column)
                for adapter, column in self._adapters.items()
                if adapter in layer.lora_A
            ]
        )

    def _stacked_forward(self, layer: Layer, columns: Tensor, x: Tensor) -> Tensor:
        """``base(x) + B diag(c) A x``, the adapters stacked; x has shape (rows, ..., in)."""
        scope = self.scope
        out: Tensor = layer.base_layer(x)
        if scope.coefficients is None:
            return out
        # Decoding calls a layer once a token; with gradients the stack is part of the graph.
        reuse = not torch.is_grad_enabled()
        factors = scope.cache.get(layer) if reuse else None
        if factors is None:
            down, up = self._stack(layer)
            columns = columns.to(scope.coefficients.device)
            factors = (down, up, scope.coefficients[:, columns].to(down))  # the mix: (rows, R)
            if reuse:
                scope.cache[layer] = factors
        down, up, mix = factors
        if len(mix) > 1:
            if len(mix) != len(x):
                raise ValueError(
                    f"{len(mix)} preferences meet a layer input with {len(x)} rows, so rows and "
                    "preferences cannot be matched (a mixture-of-experts or flattened layer?). "
                    "Use one preference per batch, or leave this layer out of `targets`."
                )
            mix = mix.view(len(mix), *[1] * (x.ndim - 2), -1)
        hidden = linear(layer._cast_input_dtype(x, down.dtype), down) * mix
        return out + linear(hidden, up).to(out.dtype)

    def _stack(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """A, shape (R, in), and B with the adapters' scales in it, shape (out, R)."""
        adapters = [adapter for adapter in self._adapters if adapter in layer.lora_A]
        down = torch.cat([layer.lora_A[adapter].weight for adapter in adapters])
        up = torch.cat(
            [layer.lora_B[adapter].weight * layer.scaling[adapter] for adapter in adapters], dim=1
        )
        return down, up

    def changed_layers(self) -> list[nn.Module]:
        return list(self._layers.values())

    def copies(self) -> list[list[nn.Parameter]]:
        return [self._parameters_of(adapter) for adapter in self._adapters if adapter != SHARED]

    def shared(self) -> list[nn.Parameter]:
        return self._parameters_of(SHARED)

    def _parameters_of(self, adapter: str) -> list[nn.Parameter]:
        return [
            factors[adapter].weight
            for layer in self._layers.values()
            for factors in (layer.lora_A, layer.lora_B)
            if adapter in factors
        ]

    @torch.no_grad()
    def adapters(self) -> dict[str, dict[str, Factors]]:
        """Every adapter by its reward's name (or ``shared``): its factors by layer."""
        return {
            adapter.removeprefix("reward_"): {
                name: Factors(
                    layer.lora_A[adapter].weight,
                    layer.lora_B[adapter].weight,
                    layer.scaling[adapter],
                )
                for name, layer in self._layers.items()
                if adapter in layer.lora_A
            }
            for adapter in self._adapters
        }

    @torch.no_grad()
    def concatenated(self, preference: Preference) -> dict[str, Factors]:
        """One adapter that does what all do together at one preference, exactly.

        The factors are stacked in the rank dimension, coefficients and scales in the upward ones;
        layers with fewer adapters are filled up with zeros, because servers want one rank.
        """
        if len(preference) != 1:
            raise ValueError(f"An adapter is for one preference; got {len(preference)} rows.")
        coefficients = self.coefficients(preference)[0]
        found: dict[str, Factors] = {}
        for name, layer in self._layers.items():
            down, up = self._stack(layer)
            up = up * coefficients[self._columns(layer).to(up.device)].to(up)
            found[name] = Factors(down, up, 1.0)
        rank = max(len(factors.down) for factors in found.values())
        return {name: factors.padded(rank) for name, factors in found.items()}

    @torch.no_grad()
    def delta(self, layer: Layer, coefficients: Tensor) -> Tensor:
        """What coefficients, shape (K + 1,), add to a layer's weight, in the weight's layout."""
        down, up = self._stack(layer)
        mix = coefficients[self._columns(layer).to(coefficients.device)]
        added = (up * mix.to(up)) @ down
        return added.T if getattr(layer, "fan_in_fan_out", False) else added

    @torch.no_grad()
    def fold_at(self, coefficients: Tensor) -> dict[str, Tensor]:
        state = {
            key.replace(".base_layer.", "."): value
            for key, value in self._model.state_dict().items()
            if ".lora_" not in key
        }
        for name, layer in self._layers.items():
            weight = layer.base_layer.weight
            if not weight.is_floating_point():
                raise ValueError(
                    f"{name} is quantised; its adapters cannot be folded in. Export an adapter."
                )
            # Added in the adapters' precision and rounded once, where the base is in half.
            folded = weight + self.delta(layer, coefficients)
            state[f"{name}.weight"] = folded.to(weight.dtype)
        return state


def _inject(model: nn.Module, adapter: str, config: LoraConfig, folder: str | None) -> None:
    """Adds one adapter, with the weights of an existing one where ``folder`` is given."""
    if not folder:
        inject_adapter_in_model(config, model, adapter_name=adapter)
        return
    found: Mapping[str, Tensor] = load_peft_weights(folder, device="cpu")
    stored = PeftConfig.from_pretrained(folder)
    if not isinstance(stored, LoraConfig):
        raise ValueError(f"{folder} holds a {stored.peft_type} adapter; LoRA needs a LoRA one.")
    stored.inference_mode = False
    inject_adapter_in_model(stored, model, adapter_name=adapter)
    # PEFT saves names below its own wrapper.
    plain = {key.removeprefix("base_model.model."): value for key, value in found.items()}
    result: Any = set_peft_model_state_dict(model, plain, adapter_name=adapter)
    if result.unexpected_keys:
        raise ValueError(
            f"{folder} holds layers that this model lacks: {result.unexpected_keys[:3]}. "
            "Was it trained on another base?"
        )


def _refuse_nonlinear(name: str, layer: Layer) -> None:
    """Mixing outputs equals mixing parameters only for plain LoRA on linear layers."""
    why = ""
    if isinstance(layer, ParamWrapper):
        why = "its experts are one parameter; name other layers in targets and shared_targets"
    elif not hasattr(layer, "lora_A") or not len(layer.lora_A):
        why = "it is not a linear layer"
    elif layer.lora_variant:
        why = "DoRA and other variants are not linear in their parameters"
    elif any(not isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values()):
        why = "LoRA dropout makes the KL to the reference noisy"
    elif any(layer.lora_bias.values()):
        why = "LoRA biases are not mixed"
    if why:
        raise ValueError(f"The adapter on {name} is refused: {why}.")
