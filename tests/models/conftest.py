"""A tiny base, tiny tasks, and recipes over them."""

from helpers.fixtures import make_config, rows, tiny_base  # noqa: F401
