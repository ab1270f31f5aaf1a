"""How a preference reaches the network."""

from .base import Coefficients, Conditioner, Gate, Scaled, Weights
from .lora import LoRA
from .plain import Unconditioned

__all__ = ["Coefficients", "Conditioner", "Gate", "LoRA", "Scaled", "Unconditioned", "Weights"]
