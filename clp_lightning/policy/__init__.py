"""Torch modules that know no Trainer: the policy, its sampler, its scorer."""

from .decoding import MOD, DeRa
from .encoding import Encoding
from .policy import Policy
from .rollout import Engine, TransformersEngine
from .sampling import Sampling

__all__ = ["MOD", "DeRa", "Encoding", "Engine", "Policy", "Sampling", "TransformersEngine"]
