"""Answers from a trained adapter for rows and prompts of the user: `predict` and `generate`.

Called by the command line and by `braidlora.load`; calls `evaluation` (how answers are taken), `models` and `tasks`.
"""

from braidlora.inference.loading import load
from braidlora.inference.model import Model

__all__ = ["Model", "load"]
