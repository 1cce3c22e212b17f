"""What publications claim, and what the tables under benchmarks/results say of it.

A claim says that one row scores higher than another. In a suite it is confirmed if the 95% CI of the difference
is above 0, contradicted if it is below 0, and otherwise not seen. Over all suites that have both rows the word is that
of more than half of them, or else `not seen`, and `depends on the suite` where some confirm and some contradict; the
counts are always given. Where a table has the difference, its interval counts the choice of test rows too; other
differences are paired by seed alone, which makes their intervals too narrow where test sets are small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from leaderboard_tables import Suite, interval, paired

CONFIRMED, NOT_SEEN, CONTRADICTED, NOT_RUN = "confirmed", "not seen", "contradicted", "not run yet"
DEPENDS = "depends on the suite"
WORDS = {
    "holds": CONFIRMED,
    "holds in part": f"{CONFIRMED} in part",
    "does not hold": CONTRADICTED,
    "unknown": NOT_SEEN,
}


@dataclass(frozen=True)
class Claim:
    """`higher` scores more than `lower`.

    Attributes:
        source: of the claim.
        text: what is claimed.
        higher, lower: rows.
        of: which suites: `multi-task`, `equal ranks` or `mixed ranks`.
        at_least: the claim is only that `higher` is no worse: contradicted if it is, confirmed if the interval's lower
            end is above −1 point.
        published: the published numbers.
    """

    source: str
    text: str
    higher: str
    lower: str
    of: str
    at_least: bool = False
    published: str = ""


PAPER = "[arXiv 2509.25414](https://arxiv.org/abs/2509.25414)"
MULTI, EQUAL, MIXED = "multi-task", "equal ranks", "mixed ranks"
CLAIMS = (
    Claim(PAPER, "ALoRA (shared B) scores higher than HydraLoRA (shared A)", "alora", "hydralora", MULTI,
          published="commonsense, Llama-3-8B: 84.81 and 84.57; FLAN mix, Llama-2-7B: 67.13 and 66.45"),
    Claim(PAPER, "ALoRA scores higher than a LoRA of the same rank", "alora", "lora", MULTI),
    Claim(PAPER, "Fed-ALoRA (B travels) scores higher than FedSA-LoRA (A travels)", "fed-alora", "fedsa-lora", EQUAL,
          published="FLAN, Llama-2-7B: 82.51 and 81.15"),
    Claim(PAPER, "Fed-ALoRA scores no less than FedIT, which sends twice as much", "fed-alora", "fedit", EQUAL,
          at_least=True, published="FLAN, Llama-2-7B: 82.51 and 82.47"),
    Claim(PAPER, "Fed-ALoRA for mixed ranks scores higher than zero-padding", "fed-alora-het", "zero-padding", MIXED,
          published="FLAN, Llama-2-7B: 82.50 and 82.29"),
    Claim("HydraLoRA ([arXiv 2404.19245](https://arxiv.org/abs/2404.19245))",
          "one A and several B's score higher than one LoRA of the same rank", "hydralora", "lora", MULTI),
    Claim("HydraLoRA", "and higher than one LoRA with as many parameters", "hydralora", "lora-matched", MULTI),
    Claim("MTL-LoRA ([arXiv 2410.09437](https://arxiv.org/abs/2410.09437))",
          "scores higher than one LoRA of the same rank", "mtl-lora", "lora", MULTI),
    Claim("Align-LoRA ([arXiv 2508.05078](https://arxiv.org/abs/2508.05078))",
          "one LoRA with the alignment loss scores higher than without", "align-lora", "lora", MULTI),
    Claim("Align-LoRA", "one LoRA of a higher rank scores no less than several LoRAs (here MoE-LoRA)", "lora-matched",
          "moelora", MULTI, at_least=True),
    Claim("FedSA-LoRA ([arXiv 2410.01463](https://arxiv.org/abs/2410.01463))",
          "sharing A alone scores higher than sharing A and B (FedIT)", "fedsa-lora", "fedit", EQUAL),
    Claim("FFA-LoRA ([arXiv 2403.12313](https://arxiv.org/abs/2403.12313))",
          "freezing A scores higher than averaging A and B (FedIT)", "ffa-lora", "fedit", EQUAL),
    Claim("FLoRA ([arXiv 2409.05976](https://arxiv.org/abs/2409.05976))",
          "stacking scores higher than averaging A and B (FedIT)", "flora", "fedit", EQUAL),
    Claim("FLoRA", "and, for mixed ranks, higher than zero-padding", "flora", "zero-padding", MIXED),
    Claim("FlexLoRA ([arXiv 2402.11505](https://arxiv.org/abs/2402.11505))",
          "averaging ΔW scores higher than zero-padding, for mixed ranks", "flexlora", "zero-padding", MIXED),
    Claim("RoLoRA ([arXiv 2409.02346](https://arxiv.org/abs/2409.02346))",
          "taking turns with A and B scores higher than FFA-LoRA", "rolora", "ffa-lora", EQUAL,
          published="GLUE, 50 clients, rank 4: 85.8 and 76.5"),
    Claim("Common to federated fine-tuning", "clients that share (here FedIT) score higher than clients alone", "fedit",
          "local", EQUAL),
)  # fmt: skip
DIFFERENCES = ("alora", "hydralora")


def claims(suites: Mapping[str, Sequence[Suite]], results: Mapping[str, Mapping[str, Any]]) -> str:
    """One line per claim: the word, what is claimed, and the numbers.

    Args:
        suites: by the `of` of the claims.
        results: for findings that are not about scores.
    """
    lines = [_line(claim, suites[claim.of]) for claim in CLAIMS]
    lines += [_balance(suites[MULTI]), _bytes(suites[EQUAL]), *_study(results)]
    order = {source: at for at, source in enumerate(dict.fromkeys(_first(source) for source, _ in lines))}
    parts = []
    for first in order:
        own = [(source, text) for source, text in lines if _first(source) == first]
        parts.append("\n".join([f"### {own[0][0]}", "", *(f"- {text}" for _, text in own)]))
    return "\n\n".join(parts)


def _first(source: str) -> str:
    """A source without its link, which only its first claim has."""
    return source.partition(" (")[0]


def _line(claim: Claim, suites: Sequence[Suite]) -> tuple[str, str]:
    found = {suite.title: gap for suite in suites if (gap := difference(suite, claim.higher, claim.lower))}
    words = {title: verdict(gap, claim.at_least) for title, gap in found.items()}
    published = f" Published: {claim.published}." if claim.published else ""
    numbers = "; ".join(f"{title} {interval(*gap)}" for title, gap in found.items())
    head = f"**{overall(list(words.values()))}**: {claim.text}.{published}"
    return claim.source, f"{head} Here, `{claim.higher}` − `{claim.lower}`: {numbers}." if numbers else head


def difference(suite: Suite, higher: str, lower: str) -> tuple[float, float, float] | None:
    """Mean and 95% CI of higher − lower: the table's own where it has it, otherwise paired by seed."""
    if higher not in suite.entries or lower not in suite.entries:
        return None
    one, other = suite.entries[higher], suite.entries[lower]
    if lower == suite.baseline and (own := one.row["difference"]):
        return own["mean"], own["low"], own["high"]
    if higher == suite.baseline and (own := other.row["difference"]):
        return -own["mean"], -own["high"], -own["low"]
    for pair in suite.pairs:
        own = pair["difference"]
        if (pair["row"], pair["to"]) == (higher, lower):
            return own["mean"], own["low"], own["high"]
        if (pair["row"], pair["to"]) == (lower, higher):
            return -own["mean"], -own["high"], -own["low"]
    return paired(one.values, other.values)


def verdict(gap: tuple[float, float, float], at_least: bool = False) -> str:
    """The word for one suite."""
    _, low, high = gap
    if high < 0:
        return CONTRADICTED
    return CONFIRMED if low > (-1.0 if at_least else 0.0) else NOT_SEEN


def overall(words: Sequence[str]) -> str:
    """The word of more than half of the suites, with counts."""
    if not words:
        return NOT_RUN
    counts = {word: words.count(word) for word in (CONFIRMED, NOT_SEEN, CONTRADICTED)}
    most = next((word for word, count in counts.items() if 2 * count > len(words)), NOT_SEEN)
    if counts[CONFIRMED] and counts[CONTRADICTED]:
        most = DEPENDS
    if len(words) == 1:
        return most
    return f"{most} ({', '.join(f'{count} {word}' for word, count in counts.items() if count)})"


def _balance(suites: Sequence[Suite]) -> tuple[str, str]:
    """Δm% of ALoRA against HydraLoRA's."""
    found = {}
    for suite in suites:
        rows = [suite.entries[name].row.get("delta_m") for name in DIFFERENCES if name in suite.entries]
        if len(rows) == 2 and all(rows):
            found[suite.title] = paired(rows[1]["values"], rows[0]["values"])
    known = {title: gap for title, gap in found.items() if gap}
    head = (
        f"**{overall([verdict(gap) for gap in known.values()])}**: ALoRA has a lower Δm% than HydraLoRA: it loses less "
        "relative to single-task LoRAs. Published: commonsense, Llama-3-8B: 0.04 and 0.32; FLAN mix, Llama-2-7B: −8.33 "
        "and −6.39."
    )
    numbers = "; ".join(f"{title} {interval(*gap)}" for title, gap in known.items())
    return PAPER, f"{head} Here, Δm% of HydraLoRA − Δm% of ALoRA: {numbers}." if numbers else head


def _bytes(suites: Sequence[Suite]) -> tuple[str, str]:
    """What Fed-ALoRA sends, of what FedIT sends."""
    ratios = {
        suite.title: suite.entries["fed-alora"].cost["bytes"] / suite.entries["fedit"].cost["bytes"]
        for suite in suites
        if {"fed-alora", "fedit"} <= set(suite.entries)
    }
    words = [CONFIRMED if ratio < 0.75 else CONTRADICTED for ratio in ratios.values()]
    numbers = "; ".join(f"{title} {ratio:.2f}" for title, ratio in ratios.items())
    head = (
        f"**{overall(words)}**: Fed-ALoRA sends half of what FedIT sends. Published, Llama-2-7B: 4.19 and 8.39 million "
        "parameters."
    )
    tail = " A classification head, which every rule sends, is counted." if numbers else ""
    return PAPER, f"{head} Here, bytes per client and round: {numbers}.{tail}" if numbers else head


def _study(results: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The findings on A and B, as a study's own thresholds judge them."""
    from braidlora.analysis.findings import findings

    studies = {name: findings(one["study"]) for name, one in results.items() if "study" in one}
    lines = []
    for key, text in (
        ("alike_by_seed", "A matrices are alike only if they start from one seed"),
        ("b_takes_the_direction", "training hardly changes the direction of A, but does change that of B"),
    ):
        words = [
            f"{name.removeprefix('study-')} {WORDS[found[key]['finding']]}" for name, found in studies.items()
        ]
        whole = [WORDS[found[key]["finding"]] for found in studies.values()]
        head = NOT_RUN if not whole else whole[0] if len(set(whole)) == 1 else f"{CONFIRMED} in part"
        numbers = f" Here: {'; '.join(words)} ([numbers](results.md))." if words else ""
        lines.append((PAPER, f"**{head}**: {text}.{numbers}"))
    return lines
