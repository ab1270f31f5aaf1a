"""How a preference reaches the network."""

from .base import Coefficients, Conditioner, Gate, Scaled, Weights
from .lora import LoRA
from .mixture import Mixture
from .plain import Unconditioned
from .prompt import PromptText, SoftPrompt

__all__ = [
    "Coefficients",
    "Conditioner",
    "Gate",
    "LoRA",
    "Mixture",
    "PromptText",
    "Scaled",
    "SoftPrompt",
    "Unconditioned",
    "Weights",
]
