"""The data catalog: datasets by key, with the places, public addresses and sha256 of their files. Imports no torch.

Called by `config`, `tasks` and `cli`; imports common modules only.
"""

from braidlora.catalog._facts import PREFIX, DataFile, DataSet, Part, data_file, data_set, data_sets, parts
from braidlora.catalog._find import Found, cached_place, fetch, find, find_part

__all__ = [
    "PREFIX",
    "DataFile",
    "DataSet",
    "Found",
    "Part",
    "cached_place",
    "data_file",
    "data_set",
    "data_sets",
    "fetch",
    "find",
    "find_part",
    "parts",
]
