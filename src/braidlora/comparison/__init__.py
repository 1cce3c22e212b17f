"""Methods × seeds on one recipe: runs under equal conditions, confidence intervals, a verdict in words.

Imports training, evaluation, analysis and reporting; called by the command line and the demo.
"""

from braidlora.comparison._rows import LABELS, Sweep
from braidlora.comparison._tables import as_markdown, as_text
from braidlora.comparison.run import compare

__all__ = ["LABELS", "Sweep", "as_markdown", "as_text", "compare"]
