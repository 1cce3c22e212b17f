"""The section `federation` of a recipe: rounds, clients, and what they share. Every key with its range and default."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from braidlora.config._schema import (
    MOST,
    AdapterSection,
    Count,
    CountOrNone,
    Positive,
    Rank,
    Section,
    Seed,
    TaskName,
    Threads,
    TrainingSection,
)
from braidlora.federated.protocol.rules import RULE_NAMES, rule_specs


def _known_rule(name: str) -> str:
    names = [spec.name for spec in rule_specs()]
    if name not in names:
        listed = f"{', '.join(map(repr, names[:-1]))} or {names[-1]!r}"
        raise PydanticCustomError("unknown_rule", "Input should be {listed}", {"listed": listed})
    return name


RuleName = Annotated[str, AfterValidator(_known_rule)]
Share = Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)]


class ClientAdapterSection(AdapterSection):
    """Every client's adapter: PEFT's LoRA, or under fed-alora-het the factored LoRA of the same rank."""

    method: Literal["lora"] = "lora"


class ClientTrainingSection(TrainingSection):
    """A client's training in a round. Schedule and warm-up span one round, or all with `optimizer_state: keep`."""

    warmup_steps: CountOrNone = 0


class ClientSection(Section):
    """One client: its name, its tasks, its rank."""

    name: TaskName
    tasks: Annotated[list[str], Field(min_length=1)] = Field(description="names of the recipe's tasks")
    rank: Rank | None = Field(None, description="default: adapter.r")
    alpha: Positive | None = Field(
        None, description="default: in proportion to the rank, so that all have one scaling"
    )
    seed: Seed | None = Field(
        None, description="default: follows from the recipe's seed and the client's name"
    )


class PartitionSection(Section):
    """One task's rows divided among clients."""

    task: str | None = Field(None, description="default: the only task with training rows")
    clients: Count | None = Field(
        None, description="how many; `column` and `file` make one per value and per file"
    )
    by: Literal["iid", "dirichlet", "column", "file"] = Field(
        "iid",
        description="at random, with label shares drawn from a Dirichlet, by a column's values, or by file: "
        "`train` names a folder with a file per client",
    )
    alpha: Positive = Field(
        1.0, description="dirichlet: small is uneven, large even; `by: iid` is its infinity"
    )
    column: str | None = Field(
        None, description="whose values are divided; default for dirichlet: the label, or the answer"
    )
    seed: CountOrNone = 0
    min_rows: Count = Field(10, description="training rows that every client gets at least")


class SampleSection(Section):
    """Which part of the clients is asked in a round; give one of the two."""

    fraction: Share | None = None
    number: Count | None = None


class LocalSection(Section):
    """How long a client trains in a round; give one of the two."""

    epochs: Positive | None = Field(None, description="default: 1")
    steps: Count | None = None


class EvaluateSampleSection(Section):
    """Which clients are scored in the rounds before the last one; at most one of the two."""

    fraction: Share | None = Field(None, description="1.0: all of them")
    number: Count | None = Field(None, description="default: 20, or all where there are fewer")


class RateScheduleSection(Section):
    """How the learning rate falls from round to round. Each round may still begin with a new optimizer.

    Round t of T trains with `training.learning_rate` · m(t), which `training.scheduler` then shapes within the round:
    constant m = 1; linear m = f + (1 − f)(1 − (t−1)/T); cosine m = f + (1 − f)(1 + cos(π(t−1)/T))/2; exponential
    m = γ^(t−1); step m = γ^⌊(t−1)/every⌋, where f is `floor` and γ is `factor`.
    """

    decay: Literal["constant", "linear", "cosine", "exponential", "step"] = "constant"
    floor: Annotated[float, Field(ge=0.0, lt=1.0, allow_inf_nan=False)] | None = Field(
        None, description="linear, cosine: share of the rate that they fall towards; default 0"
    )
    factor: Share | None = Field(
        None,
        description="exponential: what a round multiplies the rate by; step: what every so many rounds do",
    )
    every: Count | None = Field(None, description="step: after how many rounds the rate falls")


# Keys of one section that exclude each other: an override of one takes the place of the recipe's other.
ALTERNATIVES = {
    ("federation", "local"): ("epochs", "steps"),
    ("federation", "sample"): ("fraction", "number"),
    ("federation", "evaluate_sample"): ("fraction", "number"),
}


class RobustSection(Section):
    """An aggregator that withstands some clients whose updates lie."""

    aggregator: Literal["mean", "norm-clip", "median", "trimmed-mean", "krum", "multi-krum"] = "mean"
    max_norm: Positive | None = Field(
        None, description="norm-clip: largest norm of a client's change in a round"
    )
    trim: Annotated[float, Field(ge=0.0, lt=0.5, allow_inf_nan=False)] | None = Field(
        None, description="trimmed-mean: share of the values cut off at either end"
    )
    f: CountOrNone | None = Field(None, description="krum, multi-krum: how many clients may lie")
    keep: Count | None = Field(None, description="multi-krum: how many updates are averaged")


class FederationSection(Section):
    """Rounds, clients and what they share. Without clients or partition every task is a client."""

    rule: RuleName = Field("fed-alora", examples=list(RULE_NAMES))
    rounds: Count = 10
    clients: Annotated[list[ClientSection], Field(min_length=1)] | None = None
    partition: PartitionSection | None = None
    ranks: list[Rank] | None = Field(None, description="one per client, in their order; default: adapter.r")
    r_intermediate: Rank = Field(16, description="m of fed-alora-het")
    wire: Literal["factors", "smallest"] = Field(
        "factors", description="fed-alora-het: B1 and B2, or their product where it is smaller"
    )
    upload_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    sample: SampleSection | None = None
    local: LocalSection = LocalSection()
    lr_schedule: RateScheduleSection = RateScheduleSection()
    optimizer_state: Literal["restart", "keep"] = Field(
        "restart", description="keep: moments and schedule run on through the rounds"
    )
    state: Literal["persist", "reset-each-round"] = Field(
        "persist",
        description="whether the factors that stay with a client live on, or go back to their start",
    )
    client_init: Literal["shared", "independent"] = Field(
        "shared", description="all clients' factors from one draw, or each from its own"
    )
    share_head: bool = Field(
        False, description="average the classification head and other modules_to_save, too"
    )
    robust: RobustSection = RobustSection()
    weights: Literal["rows", "steps", "uniform"] = Field(
        "rows",
        description="p_i in proportion to a client's training rows, to its steps in the round, or equal for all",
    )
    padding: Literal["zeros", "by-rank"] = Field(
        "zeros",
        description="zero-padding: a client counts as zeros in the ranks above its own (as published), or every rank "
        "is averaged over the clients that have it, and stays where none took part",
    )
    share_cap: Share | None = Field(None, description="largest weight of one client in a round")
    change_cap: Annotated[float, Field(ge=1.0, allow_inf_nan=False)] | None = Field(
        100.0,
        description="leave out a client whose change is more than so many times the median of the others'; null: "
        "no bound",
    )
    min_clients: Count = Field(1, description="updates that a round needs to count")
    quorum: Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)] = Field(
        0.0, description="share of the asked clients that a round needs to count"
    )
    retries: Annotated[int, Field(ge=0, le=10)] = Field(
        1, description="how often a failed client is asked again"
    )
    evaluate_every: CountOrNone = Field(1, description="rounds; 0: after the last one only")
    evaluate_sample: EvaluateSampleSection = EvaluateSampleSection()
    common_test: list[str] = Field([], description="tasks on whose test rows every client's model is scored")
    keep_rounds: Annotated[int, Field(ge=2, le=MOST)] = Field(
        2, description="newest rounds on disk, which `--rollback` can go back to"
    )
    workers: Threads = Field(1, description="processes, each with a base model of its own")
