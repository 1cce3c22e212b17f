"""What happened inside adapters: subspace similarity, drift, router use and gradient conflict.

The paper's controlled experiment is in `braidlora.analysis.study`; it trains, and so imports far more. Called by the
command line and by comparison.
"""

from braidlora.analysis.run import analyze, analyze_run

__all__ = ["analyze", "analyze_run"]
