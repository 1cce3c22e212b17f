"""The page in headless Chromium, opened from disk: a clean console, nothing fetched, something to be seen."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from comparisons import comparison, write_logs
from PIL import Image

from braidlora.reporting.page import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --window-size=1200,2400 --enable-logging=stderr"
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    given = comparison(["LoRA", "ALoRA"], ["rising", "<b>", "sum"], [0, 1])
    write_logs(folder, given)
    return write_report(folder, given)


def open_page(path: Path, profile: Path, *more: str) -> tuple[str, list[str]]:
    """The document as the browser has it, and what stands in its console."""
    command = [CHROMIUM, *OPTIONS.split(), f"--user-data-dir={profile}", *more, "--dump-dom", path.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return result.stdout, re.findall(r"CONSOLE.*", result.stderr)


def test_the_page_opens_with_a_clean_console_and_can_be_seen(page, tmp_path):
    screenshot = tmp_path / "page.png"
    document, console = open_page(page, tmp_path / "profile", f"--screenshot={screenshot}")
    assert console == []
    assert document.count("<figure") == page.read_text(encoding="utf-8").count("<figure") > 2
    assert document.rstrip().endswith("</html>")
    with Image.open(screenshot) as image:
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50, "a page without its figures has few colours"


def test_what_would_be_fetched_or_run_is_stopped_and_told(page, tmp_path):
    """The page's own policy forbids both, so the clean console above means that nothing was tried."""
    poisoned = tmp_path / "poisoned.html"
    more = '<h1><img src="http://127.0.0.1:9/x.png"><script>document.title = "run"</script>'
    poisoned.write_text(page.read_text(encoding="utf-8").replace("<h1>", more, 1), encoding="utf-8")
    document, console = open_page(poisoned, tmp_path / "profile")
    assert "<title>run" not in document
    assert any("127.0.0.1:9/x.png" in line and "Content Security Policy" in line for line in console)
    assert any("inline script" in line for line in console)
