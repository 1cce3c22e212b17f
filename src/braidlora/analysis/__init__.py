"""What happened inside adapters: subspace similarity, drift, router use, gradient conflict, and the paper's study."""

from braidlora.analysis.run import analyze, analyze_run
from braidlora.analysis.study import run_study

__all__ = ["analyze", "analyze_run", "run_study"]
