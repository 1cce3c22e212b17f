"""docs/reference/federated-rules.md: its tables, and the claims of its prose that a number decides."""

import re
import runpy
from pathlib import Path

import torch

from braidlora.federated import RULE_NAMES, get_rule

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "reference" / "federated-rules.md").read_text(encoding="utf-8")


def test_tables_are_those_of_rules_results_and_byte_counts():
    script = runpy.run_path(str(ROOT / "scripts" / "document_rules.py"))
    assert script["page_with_tables"](PAGE) == PAGE, "run: python scripts/document_rules.py"


def test_the_first_table_says_what_each_rule_trains_and_sends():
    letters = {
        "lora_A": "A", "lora_B": "B", "factoredlora_A": "A", "factoredlora_M": "M", "factoredlora_B1": "B1",
        "factoredlora_B2": "B2", "factoredlora_base": "B_base", "rest_A": "Ā", "rest_B": "B̄", "mixer": "W_g",
    }  # fmt: skip
    rows = re.findall(
        r"^\| `([a-z-]+)` \| ([^|]*) \| ([^|]*) \| ([^|]*) \|", PAGE.split("## ")[0], flags=re.M
    )
    assert [name for name, *_ in rows] == list(RULE_NAMES)
    for name, trained, up, down in rows:
        rule = get_rule(name)
        for cell, factors in (
            (trained, rule.spec.trains),
            (up, rule.spec.uploads),
            (down, rule.spec.downloads),
        ):
            told = [word for word in cell.split(", ") if word in letters.values()]
            if cell not in ("the stack", "nothing"):
                assert told == [letters[factor] for factor in factors], (name, cell)


def test_the_papers_figures_on_the_page_follow_from_its_table():
    table = PAGE.split("<!-- communication: begin -->")[1].split("<!-- communication: end -->")[0]
    rows = re.findall(r"^\| `([a-z-]+)` \| ([^|]*) \| ([\d.]+) \| ([\d.]+) \|", table, flags=re.M)
    both = {(name, ranks): float(up) + float(down) for name, ranks, up, down in rows}
    for rule, ranks, printed in (
        ("fedit", "8", 8.39),
        ("fedsa-lora", "8", 4.19),
        ("zero-padding", "8 … 64", 49.28),
    ):
        assert f"{printed}" in PAGE
        assert abs(both[rule, ranks] - printed) <= 0.011


def test_the_python_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    name = "base_model.model.q_proj.lora_B.weight"
    replies = [("b", 30, {name: torch.ones(4, 8)}), ("a", 10, {name: torch.zeros(4, 8)})]
    namespace = {"shared": {}, "replies": replies}
    exec(example, namespace)
    assert torch.equal(namespace["payload"][name], torch.full((4, 8), 0.75))
