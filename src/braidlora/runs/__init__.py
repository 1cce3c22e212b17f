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
from braidlora.runs._lines import read_jsonl, read_lines, split_lines

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
    "read_jsonl",
    "read_lines",
    "remove_tree",
    "split_lines",
    "staging_directory",
    "verify_manifest",
]
