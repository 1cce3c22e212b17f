"""A complete federation on one machine, in one process or several: one transport among others.

Imported by the command line, `analysis`, `comparison` and `demo`.
"""
