"""The run directory: atomic files, manifests, what stands where. Imports no torch."""

from braidlora.runs._directory import RunDirectory
from braidlora.runs._environment import environment
from braidlora.runs._files import (
    MANIFEST,
    atomic_write_json,
    atomic_write_text,
    commit_directory,
    read_json,
    verify_manifest,
)

__all__ = [
    "MANIFEST",
    "RunDirectory",
    "atomic_write_json",
    "atomic_write_text",
    "commit_directory",
    "environment",
    "read_json",
    "verify_manifest",
]
