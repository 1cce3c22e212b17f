"""A whole federation in one process or on one machine: one transport among others.

Called by the command line.
"""
