"""What a short probe of a recipe's tasks shows before anything is compared, and what it may and may not predict.

`probe` trains and measures, `measures` has the arithmetic, `calibration` what the measurements predicted on suites with
known outcomes. Called by the command line and by `api`.
"""

from braidlora.advisor.run import advise

__all__ = ["advise"]
