"""The run directory: atomic files, manifests, what stands where. Imports no torch."""

from braidlora.runs._directory import RunDirectory
from braidlora.runs._environment import environment
from braidlora.runs._federated import FederatedDirectory
from braidlora.runs._files import (
    MANIFEST,
    IncompleteError,
    atomic_write_json,
    atomic_write_text,
    commit_directory,
    finish_directory,
    read_json,
    remove_tree,
    staging_directory,
    verify_manifest,
)

__all__ = [
    "MANIFEST",
    "FederatedDirectory",
    "IncompleteError",
    "RunDirectory",
    "atomic_write_json",
    "atomic_write_text",
    "commit_directory",
    "environment",
    "finish_directory",
    "read_json",
    "remove_tree",
    "staging_directory",
    "verify_manifest",
]
