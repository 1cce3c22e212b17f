"""Counts the integration tests, prints the counts at the end, and records them."""

import collections

from acceptance_record import record

INTEGRATIONS = "test_integrations.py"


def pytest_terminal_summary(terminalreporter):
    counts, skipped = collections.Counter(), {}
    for outcome in ("passed", "skipped", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            if INTEGRATIONS in report.nodeid:
                counts[outcome] += 1
                if outcome == "skipped":
                    skipped[report.nodeid.partition("::")[2]] = str(report.longrepr)
    if counts and not terminalreporter.config.option.keyword:  # a part of them is no result
        summary = {outcome: counts[outcome] for outcome in ("passed", "skipped", "failed", "error")}
        terminalreporter.write_line(
            "integrations: " + ", ".join(f"{n} {what}" for what, n in summary.items())
        )
        record("integrations", {**summary, "skip_reasons": skipped})
