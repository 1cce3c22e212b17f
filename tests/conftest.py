"""What holds for every test: one thread, no network, no waiting for the disk, and where the datasets are."""

import gc
import os
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: sums depend on the number of threads
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
_DATA = Path(__file__).parents[2] / "shared"
if "BRAIDLORA_DATA" not in os.environ and _DATA.is_dir():
    os.environ["BRAIDLORA_DATA"] = str(_DATA)


@pytest.fixture(scope="session", autouse=True)
def _quick_disk():
    """No test cuts the power, so nothing waits for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _small_heap():
    """Runs collect garbage; the objects that the imports left on the heap need not be walked each time."""
    with pytest.MonkeyPatch.context() as patch:
        gc.freeze()
        patch.setattr(gc, "unfreeze", lambda: None)
        yield
    gc.unfreeze()
