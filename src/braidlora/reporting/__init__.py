"""Figures and one static page, drawn from metrics files only. Needs matplotlib and jinja2 (`braidlora[report]`)."""
