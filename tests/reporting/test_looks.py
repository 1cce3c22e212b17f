"""Colors: one per method in every report, and figures that follow the page's dark mode; tables stack on a phone."""

import re

from comparisons import comparison, write_logs
from document import Document

from braidlora.reporting.dark_mode import themed
from braidlora.reporting.method_colors import method_styles
from braidlora.reporting.page import write_report
from braidlora.reporting.panels import COLORS


def styles(*names):
    return dict(zip(names, method_styles([{"name": name} for name in names]), strict=True))


def test_a_method_has_the_same_color_whatever_else_is_in_the_report():
    everything = styles("lora", "lora-matched", "hydralora", "moelora", "alora")
    assert len({index % len(COLORS) for index in everything.values()}) == 5
    for some in (
        ("lora", "alora"),
        ("alora", "lora"),
        ("hydralora",),
        ("lora", "hydralora", "alora", "wide"),
    ):
        found = styles(*some)
        assert all(found[name] == everything[name] for name in some if name in everything)


def test_a_variant_never_has_the_color_of_a_built_in_method():
    built_in = {
        index % len(COLORS)
        for index in styles("lora", "lora-matched", "hydralora", "moelora", "alora").values()
    }
    for name in ("wide", "loha", "dora", "a", "b"):
        assert styles("lora", name)[name] % len(COLORS) not in built_in
        assert styles("lora", name) == styles("lora", name)
    many = [f"variant{number}" for number in range(40)]
    assert len(set(styles("lora", *many).values())) == 41


def test_the_first_value_of_a_sweep_has_its_methods_look():
    found = styles("lora", "alora+num_experts=2", "alora+num_experts=3")
    assert found["alora+num_experts=2"] == styles("alora")["alora"]
    assert len(set(found.values())) == 3


def test_colors_of_figures_become_variables():
    svg = '<path style="fill: #0072B2; stroke: #000000"/><image href="data:#0072b2"/><text style="fill: #fefefe">'
    assert themed(svg) == (
        '<path style="fill: var(--fig-blue, #0072b2); stroke: var(--fig-ink, #000000)"/>'
        '<image href="data:#0072b2"/><text style="fill: #fefefe">'
    )


def test_every_color_of_a_page_is_set_for_both_modes(tmp_path):
    given = comparison(["LoRA", "ALoRA"], ["rising", "sum"], [0, 1])
    write_logs(tmp_path, given)
    text = write_report(tmp_path, given).read_text(encoding="utf-8")
    style, body = text.split("</style>", 1)
    used = set(re.findall(r"var\(--(fig-\w+)", body))
    assert {"fig-ink", "fig-page"} <= used
    light, dark = style.split("@media (prefers-color-scheme: dark)", 1)
    for name in used:
        assert f"--{name}:" in light
        assert f"--{name}:" in dark.split("* { box-sizing")[0]
    # what is left of fixed colors is inside heat maps, whose cells keep their colors
    assert not re.findall(r"(?:fill|stroke): #(?!010101|fefefe)[0-9a-f]{6}", body)


def test_cells_carry_their_columns_name_for_narrow_screens(tmp_path):
    given = comparison(["LoRA", "ALoRA"], ["rising", "sum"], [0, 1])
    write_logs(tmp_path, given)
    page = write_report(tmp_path, given)
    cells = Document(page).all("td")
    assert cells
    assert all(cell.get("data-label") for cell in cells)
    assert "content: attr(data-label)" in page.read_text(encoding="utf-8")


def test_what_stands_between_backticks_is_code_and_escaped(tmp_path):
    given = comparison(["LoRA"], ["sum"], [0])
    given["advice"] = {
        "what": "Run `a <b>`.",
        "sure": "-1.0 to +2.0",
        "next": "a ` alone",
        "findings": ["`x` < 3"],
    }
    write_logs(tmp_path, given)
    text = write_report(tmp_path, given).read_text(encoding="utf-8")
    assert "<p>Run <code>a &lt;b&gt;</code>.</p>" in text
    assert "Confidence: −1.0 to +2.0" in text
    assert "<p>Next: a ` alone</p>" in text
    assert "<li><code>x</code> &lt; 3</li>" in text
