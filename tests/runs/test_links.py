"""A link in place of anything that would be written, or inside it, is refused; nothing is written where it leads."""

import os

import pytest

from braidlora.analysis.output import AnalysisDirectory
from braidlora.comparison._checks import check_directory
from braidlora.errors import ConfigError
from braidlora.runs import FederatedDirectory, RunDirectory

COMPARISON = [
    "figures", "figures/training-loss.png", "cells", "cells/lora-seed0", "cells/lora-seed0/log.jsonl", "base",
    "base/predictions", "recipe.yaml", "comparison.json", "report.html",
]  # fmt: skip
RUN = [
    "predictions/up.jsonl", "evaluations", "evaluations/0f0f0f0f", "adapter/evaluation", "adapter_init",
    "checkpoints/step-2/log.jsonl", "manifest.json",
]  # fmt: skip
FEDERATION = [
    "figures", "figures/rounds.svg", "clients", "clients/a", "clients/a/adapter", "clients/a/predictions/up.jsonl",
    "rounds/round-1/clients", "rounds.jsonl",
]  # fmt: skip


@pytest.mark.parametrize(
    ("opened", "name"),
    [
        *((lambda path: check_directory(str(path), "recipe.yaml"), name) for name in COMPARISON),
        *((RunDirectory.at, name) for name in RUN),
        *((FederatedDirectory.at, name) for name in FEDERATION),
        *((AnalysisDirectory, name) for name in ("analysis.json", "lone.png")),
        (lambda path: AnalysisDirectory(path, ("runs",)), "runs/up-seed0"),
    ],
)
def test_links_are_refused(tmp_path, opened, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    link = tmp_path / "out" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    with pytest.raises(ConfigError, match=r"is a link to .*outside|are not from an analysis"):
        opened(tmp_path / "out")
    assert os.listdir(outside) == []


def test_a_folder_of_ones_own_may_hold_links(tmp_path):
    (tmp_path / "out" / "notes").mkdir(parents=True)
    (tmp_path / "out" / "notes" / "data").symlink_to(tmp_path)
    RunDirectory.at(tmp_path / "out")
