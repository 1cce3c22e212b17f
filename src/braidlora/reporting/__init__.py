"""Figures and one static page, drawn from metrics files only; needs matplotlib and jinja2 (`braidlora[report]`).

No torch. Called by comparison, analysis and the command line.
"""
