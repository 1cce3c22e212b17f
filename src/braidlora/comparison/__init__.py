"""Methods × seeds on one recipe: runs under equal conditions, confidence intervals, a verdict in words.

Imports training, evaluation, analysis and reporting; called by the command line and the demo.
"""

from braidlora.comparison._ray import RaySettings
from braidlora.comparison._rows import Sweep, built_in_labels
from braidlora.comparison._tables import as_markdown, as_text
from braidlora.comparison.run import compare

__all__ = ["RaySettings", "Sweep", "as_markdown", "as_text", "built_in_labels", "compare"]
