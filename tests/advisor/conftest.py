from helpers.fixtures import make_config, rows, tiny_base  # noqa: F401
