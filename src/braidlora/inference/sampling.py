"""How the next token is chosen. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from braidlora.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """Greedy with temperature 0, which is the default; otherwise drawn.

    Args:
        max_new_tokens: the longest answer; by default as in the recipe.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: draw from the likeliest tokens whose probabilities add up to this.
        top_k: draw from this many likeliest tokens.
        seed: of the draws.
        stop: texts that end an answer, and are not part of it.

    Raises:
        ConfigError: a value is out of range.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        checks = {
            "max-new-tokens": (self.max_new_tokens, 1, 2**24),
            "temperature": (self.temperature, 0, 100),
            "top-p": (self.top_p, 1e-6, 1),
            "top-k": (self.top_k, 1, 2**31 - 1),
            "seed": (self.seed, 0, 2**32 - 1),
        }
        for name, (value, least, most) in checks.items():
            if value is not None and not (math.isfinite(value) and least <= value <= most):
                raise ConfigError(f"--{name}: got {value}; expected {least:g} to {most:g}.")
        if not all(self.stop):
            raise ConfigError("--stop: got an empty text, which would end every answer at once.")
        if self.temperature == 0 and not self.top_p is self.top_k is None:
            raise ConfigError("--top-p, --top-k: have no effect at temperature 0; give --temperature too.")

    def settings(self) -> dict[str, Any]:
        """As settings of transformers' GenerationConfig."""
        if self.temperature == 0:
            return {"do_sample": False}
        given = {"top_p": self.top_p, "top_k": self.top_k if self.top_k is not None else 0}
        drawn = {name: value for name, value in given.items() if value is not None}
        return {"do_sample": True, "temperature": float(self.temperature), **drawn}
