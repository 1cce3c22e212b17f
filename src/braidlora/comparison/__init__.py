"""Methods × seeds on one recipe: fair runs, honest intervals, a verdict in words."""

from braidlora.comparison._rows import LABELS, Sweep
from braidlora.comparison._tables import as_markdown, as_text
from braidlora.comparison.run import compare

__all__ = ["LABELS", "Sweep", "as_markdown", "as_text", "compare"]
