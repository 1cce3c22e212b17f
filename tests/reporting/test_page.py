"""The page as a document: one file, valid references, every shape of comparison, nothing from names gets through."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from analyses import ANALYSIS
from comparisons import METHODS, TASKS, comparison, environment, write_logs
from document import Document

from braidlora.errors import ConfigError
from braidlora.reporting.page import write_report

SHAPES = {
    "one of all": comparison(["ALoRA"], ["sum"], [0], references=False, base=False),
    "one seed": comparison(METHODS[:3], TASKS[:2], [0], references=False),
    "long names": comparison(
        [f"A method with rank {8 * n}, matched to another" for n in range(12)],
        [f"a_task_of_a_suite_with_long_names.{n}" for n in range(2)],
        [0, 1],
    ),
    "sweep and tuning": comparison(
        ["LoRA", "ALoRA, num_experts = 2", "ALoRA, num_experts = 8"],
        ["a"],
        sweep={"key": "adapter.num_experts", "values": [2, 8], "matched": "none"},
        tuned=True,
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_page_is_one_sound_document(shape, tmp_path):
    given = SHAPES[shape]
    write_logs(tmp_path, given)
    check_document(write_report(tmp_path, given), given)


def test_a_usual_report_takes_seconds_and_stays_small(tmp_path):
    given = comparison(METHODS[:4])
    write_logs(tmp_path, given, steps=500, every=5)
    start = time.process_time()
    page = write_report(tmp_path, given)
    assert time.process_time() - start < 10, "about 3 seconds on an idle core"
    assert page.stat().st_size < 1_000_000
    check_document(page, given)


def check_document(path, given):
    """One heading, tables that can be read aloud, references that lead somewhere, no script, the verdict in full."""
    page = Document(path)
    ids = page.ids()
    assert len(set(ids)) == len(ids), "ids are given twice"
    for _, attributes in page.tags:
        for name in ("aria-labelledby", "aria-describedby"):
            assert set(attributes.get(name, "").split()) <= set(ids)
        for name in ("href", "xlink:href", "src"):
            target = attributes.get(name, "data:,")
            assert target.startswith("data:") or target[1:] in ids, target
        assert not any(name.startswith("on") for name in attributes)
    assert not page.all("script")
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == 1
    assert len(page.all("table")) == len(page.all("caption"))
    assert all("scope" in heading for heading in page.all("th"))
    assert all(svg["role"] == "img" for svg in page.all("svg"))
    verdict = [text for text in page.texts["p"] if text in given["verdict"]]
    assert verdict == given["verdict"]
    assert any(given["command"] in text for text in page.texts["code"])
    figures = {path.name for path in (path.parent / "figures").iterdir()}
    assert len(figures) == 2 * len(page.all("svg"))
    assert "scores.png" in figures


def test_names_are_text_and_nothing_else(tmp_path):
    evil = "<script>alert(1)</script>"
    given = comparison(["LoRA", f"{evil} & $x$"], ["<b>", "a$b$c"])
    given["verdict"] = [f"{evil} wins"]
    given["recipe"] |= {"name": "<img src=x onerror=alert(1)>", "yaml": "</code></pre><b>"}
    write_logs(tmp_path, given)
    page = Document(write_report(tmp_path, given))
    assert not page.all("script")
    assert not page.all("b")
    assert not page.all("img")
    assert f"{evil} wins" in page.texts["p"]
    assert "<b>" in page.texts["text"], "the figures name the task"
    assert "a$b$c" in page.texts["text"]


def test_an_analysis_is_a_section_beside_the_comparison_or_a_page_of_its_own(tmp_path):
    given = comparison(["LoRA", "ALoRA"], ["a"], [0])
    write_logs(tmp_path, given)
    both = Document(
        write_report(tmp_path, given, ANALYSIS)
    )  # its heat maps of A and of B are the same picture
    assert {"analysis", "figure-similarity", "figure-routers-runs-mine", "figure-scores"} <= set(both.ids())
    assert len(set(both.ids())) == len(both.ids())
    small = {
        "similarity": ANALYSIS["similarity"],
        "environment": environment(),
        "adapters": [{"label": "mine"}],
    }
    alone = Document(write_report(tmp_path, None, small))
    assert alone.texts["h1"] == ["mine"]
    assert "figure-similarity" in alone.ids()


def test_the_same_numbers_give_the_same_page(tmp_path):
    given = comparison(["LoRA", "ALoRA"], ["a"])
    pages = []
    for name in ("one", "two"):
        write_logs(tmp_path / name, given)
        pages.append(write_report(tmp_path / name, given).read_bytes())
    assert pages[0] == pages[1]


def test_runs_without_a_log_are_named(tmp_path):
    given = comparison(["LoRA", "ALoRA"], ["a"], [0])
    write_logs(tmp_path, given)
    (tmp_path / "cells/method1-seed0/log.jsonl").unlink()
    text = write_report(tmp_path, given).read_text(encoding="utf-8")
    assert "Missing from the curves because they have no log: cells/method1-seed0." in text


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_without_the_extra_the_error_says_how_to_get_it(missing, tmp_path, monkeypatch):
    given = comparison(["LoRA"], ["a"], [0])
    (tmp_path / "report.html").write_text("an earlier report")
    for module in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, missing, None)  # what an import of a missing package meets
    with pytest.raises(ConfigError, match=r"pip install 'braidlora\[report\]'"):
        write_report(tmp_path, given)
    assert (tmp_path / "report.html").read_text() == "an earlier report"


def test_a_report_needs_no_torch(tmp_path):
    (tmp_path / "comparison.json").write_text(json.dumps(comparison(["LoRA", "ALoRA"], ["a"])))
    code = (
        "import json, sys; from pathlib import Path; from braidlora.reporting.page import write_report\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "write_report(folder, json.loads((folder / 'comparison.json').read_text()))\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


def test_nothing_to_report_is_refused(tmp_path):
    with pytest.raises(ValueError, match="all are None"):
        write_report(tmp_path, None)


def test_text_and_marks_stand_out_in_light_and_dark():
    """Contrast of at least 4.5 to 1 (WCAG 2) for all colours of text on the backgrounds they are used on."""
    css = (Path(sys.modules["braidlora.reporting.page"].__file__).parent / "page.css").read_text()
    schemes = re.findall(r":root \{(.*?)\}", css, flags=re.S)
    assert len(schemes) == 3, "light, dark, print"
    for scheme in schemes:
        colors = {
            name: value if len(value) == 6 else "".join(digit * 2 for digit in value)
            for name, value in re.findall(r"--(\w+): #(\w+)", scheme)
        }
        for name in ("ink", "soft", "accent", "above", "below"):
            for ground in ("page", "panel"):
                assert contrast(colors[name], colors[ground]) >= 4.5, f"{name} on {ground}"


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(color):
    channels = [int(color[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_options_are_not_broken_after_their_hyphens():
    from braidlora.reporting.page import _prose

    assert _prose("Train (--training.epochs=6, now 3).") == (
        'Train (<code class="flag">--training.epochs=6</code>, now 3).'
    )
    assert _prose("`export RUN --best` <b>") == (
        '<code>export RUN <span class="flag">--best</span></code> &lt;b&gt;'
    )
    assert _prose("a -- b, x--y, -1") == "a -- b, x--y, −1"
