"""The tables of benchmarks/rules_side_by_side.py: which federations, on which recipe."""

from __future__ import annotations

from dataclasses import dataclass, field

INDEPENDENT = "--federation.client_init=independent"


@dataclass(frozen=True)
class Group:
    """Rows that are compared with each other, with the same clients and test rows.

    Args:
        rows: recipe overrides by row name; `local` is the reference for Δm%.
        baseline: the row that the others are compared with.
        options: overrides for all rows.
        pairs: (row, other row) to compare as well, overall and by client.
    """

    rows: dict[str, list[str]]
    baseline: str
    options: list[str] = field(default_factory=list)
    pairs: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Table:
    """One table.

    Args:
        recipe: name of a built-in recipe.
        groups: by title.
        seeds: the default seeds.
        options: overrides for all rows.
        scored: whether scores are meaningful; if not, only loss, bytes and time are shown.
        rates: learning rates that each row tries on the first seed; by default, the recipe's is used for all.
        more_rates: further ones, by row.
        held_out: overrides for these trials: rows held out of the training rows take the place of the test rows, and
            there may be fewer rounds.
        minutes: expected per federation on one core; finished ones replace the guess.
    """

    recipe: str
    groups: dict[str, Group]
    seeds: tuple[int, ...]
    options: list[str] = field(default_factory=list)
    scored: bool = True
    rates: tuple[float, ...] = ()
    more_rates: dict[str, tuple[float, ...]] = field(default_factory=dict)
    held_out: list[str] = field(default_factory=list)
    minutes: float = 5.0


def rule(name: str, *more: str) -> list[str]:
    return [f"--federation.rule={name}", *more]


MIXED = "--federation.ranks=[16, 16, 8, 8, 4, 4]"
TABLES = {
    "fed-sentences": Table(
        "fed_sentences",
        {
            "": Group(
                {
                    "local": rule("local"),
                    "fedit": rule("fedit"),
                    "ffa-lora": rule("ffa-lora"),
                    "fedsa-lora": rule("fedsa-lora"),
                    "fed-alora": rule("fed-alora"),
                    "flora": rule("flora"),
                    "flexlora": rule("flexlora"),
                    "fedsa-lora, A independent": rule("fedsa-lora", INDEPENDENT),
                    "fed-alora, A independent": rule("fed-alora", INDEPENDENT),
                    "zero-padding, mixed ranks": rule("zero-padding", MIXED),
                    "flora, mixed ranks": rule("flora", MIXED),
                    "flexlora, mixed ranks": rule("flexlora", MIXED),
                    "fed-alora-het, mixed ranks": rule(
                        "fed-alora-het", MIXED, "--federation.r_intermediate=8"
                    ),
                },
                baseline="fedit",
                pairs=[
                    ("fed-alora", "fedsa-lora"),
                    ("fed-alora, A independent", "fedsa-lora, A independent"),
                    ("fed-alora, A independent", "fed-alora"),
                    ("fed-alora", "local"),
                    ("fedsa-lora", "local"),
                    ("flora", "local"),
                    ("fed-alora", "flora"),
                    ("fed-alora", "flexlora"),
                    ("fedsa-lora, A independent", "fedsa-lora"),
                    ("fed-alora-het, mixed ranks", "zero-padding, mixed ranks"),
                    ("fed-alora-het, mixed ranks", "flora, mixed ranks"),
                    ("fed-alora-het, mixed ranks", "local"),
                ],
            )
        },
        (0, 1, 2),
        [
            "--federation.rounds=3", "--training.batch_size=8", "--federation.evaluate_every=0",
            "--tasks.*.test.limit=300", "--prompt.cutoff=32",
        ],
    ),
    "fed-dirichlet": Table(
        "fed_sentences_dirichlet",
        {
            title: Group(
                {
                    "local": rule("local", "--federation.share_head=false"),
                    **{name: rule(name) for name in ("fedit", "ffa-lora", "fedsa-lora", "fed-alora")},
                },
                baseline="fedit",
                options=options,
                pairs=[
                    ("fed-alora", "fedsa-lora"),
                    ("fed-alora", "fedit"),
                    ("fed-alora", "local"),
                    ("fedsa-lora", "local"),
                ],
            )
            for title, options in {
                "α = 0.1": ["--federation.partition.alpha=0.1"],
                "α = 1": ["--federation.partition.alpha=1"],
                "α = ∞": ["--federation.partition.by=iid", "--federation.partition.alpha=1"],
            }.items()
        },
        (0, 1, 2),
        [
            "--tasks.*.train.limit=500", "--tasks.*.test.limit=120", "--training.batch_size=4",
            "--training.learning_rate=4e-3", "--federation.evaluate_every=0", "--prompt.cutoff=32",
        ],
    ),
    "fed-flan8": Table(
        "benchmarks/fed_flan8_small.yaml",
        {
            "equal ranks": Group(
                {
                    name: rule(name)
                    for name in (
                        "local", "fedit", "ffa-lora", "fedsa-lora", "fed-alora", "flora", "flexlora",
                    )
                },
                baseline="fedit",
            ),
            "ranks 64, 64, 32, 32, 16, 16, 8, 8": Group(
                {name: rule(name) for name in ("local", "zero-padding", "flora", "flexlora", "fed-alora-het")},
                baseline="zero-padding",
                options=["--federation.ranks=[64, 64, 32, 32, 16, 16, 8, 8]"],
            ),
        },
        (0,),
        ["--tasks.*.train.limit=32", "--tasks.*.test.limit=5", "--training.batch_size=4"],
        scored=False,
    ),
    "fed-induction": Table(
        "benchmarks/fed_induction.yaml",
        {
            "equal ranks": Group(
                {
                    **{
                        name: rule(name)
                        for name in (
                            "local", "fedit", "ffa-lora", "fedsa-lora", "fed-alora", "rolora", "flora", "flexlora",
                            "fedalt",
                        )
                    },
                    "fedit, FedProx": rule("fedit", "--federation.proximal_mu=0.01"),
                    "fedit, FedAvgM": rule("fedit", "--federation.server_momentum=0.5"),
                },
                baseline="fedit",
                pairs=[
                    ("fed-alora", "local"),
                    ("fedsa-lora", "local"),
                    ("fedit", "local"),
                    ("fedalt", "local"),
                    ("fed-alora", "fedsa-lora"),
                ],
            ),
            "ranks 64, 64, 32, 32, 16, 16, 8, 8": Group(
                {
                    **{name: rule(name) for name in ("local", "zero-padding", "flora", "flexlora", "raflora")},
                    "fed-alora-het": rule("fed-alora-het", "--federation.r_intermediate=16"),
                },
                baseline="zero-padding",
                options=["--federation.ranks=[64, 64, 32, 32, 16, 16, 8, 8]"],
                pairs=[("fed-alora-het", "local"), ("fed-alora-het", "flexlora"), ("zero-padding", "local")],
            ),
        },
        (0, 1, 2),
        ["--tasks.*.test.limit=50", "--tasks.*.train.limit=48"],
        rates=(1e-3, 3e-3),
        more_rates={"ffa-lora": (1e-2,)},  # with A frozen, B has to move further
        held_out=[
            "--tasks.*.test=null", "--split.test=0.3", "--tasks.*.train.limit=68", "--federation.rounds=3",
        ],
        minutes=5.0,
    ),
    # The paper's clients with all their rows.
    "fed-flan8-smollm2": Table(
        "benchmarks/fed_flan8_smollm2.yaml",
        {
            "equal ranks": Group(
                {name: rule(name) for name in ("local", "fedit", "fedsa-lora", "fed-alora")},
                baseline="fedit",
                pairs=[
                    ("fed-alora", "local"),
                    ("fedsa-lora", "local"),
                    ("fedit", "local"),
                    ("fed-alora", "fedsa-lora"),
                ],
            ),
            "ranks 64, 64, 32, 32, 16, 16, 8, 8": Group(
                {
                    "local": rule("local"),
                    "fed-alora-het": rule("fed-alora-het", "--federation.r_intermediate=16"),
                },
                baseline="local",
                options=["--federation.ranks=[64, 64, 32, 32, 16, 16, 8, 8]"],
            ),
        },
        (0, 1, 2),
        ["--tasks.*.test.limit=100"],
        rates=(3e-4, 1e-3),
        held_out=[
            "--tasks.*.test=null", "--split.test=0.3", "--tasks.*.train.limit=130", "--federation.rounds=2",
        ],
        minutes=45.0,
    ),
}  # fmt: skip
