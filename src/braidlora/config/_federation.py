"""The section `federation` of a recipe: every key with its range and default."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from braidlora.config._schema import AdapterSection, TrainingSection
from braidlora.config._section import (
    MOST,
    Count,
    CountOrNone,
    Fraction,
    NonNegative,
    Positive,
    Rank,
    Section,
    Seed,
    TaskName,
    Threads,
    one_of,
)
from braidlora.federated.protocol.rules import RULE_NAMES, rule_specs

RuleName = Annotated[str, one_of(lambda: (spec.name for spec in rule_specs()))]
Share = Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)]


class ClientAdapterSection(AdapterSection):
    """The adapter of every client: PEFT's LoRA, or for fed-alora-het the factored LoRA of the same rank."""

    method: Literal["lora"] = "lora"


class ClientTrainingSection(TrainingSection):
    """Training of a client in a round. Schedule and warm-up span one round, or all with `optimizer_state: keep`."""

    warmup_steps: CountOrNone = 0


class ClientSection(Section):
    """One client: its name, tasks and rank."""

    name: TaskName
    tasks: Annotated[list[str], Field(min_length=1)] = Field(description="names of tasks of the recipe")
    rank: Rank | None = Field(None, description="default: adapter.r")
    alpha: Positive | None = Field(
        None, description="default: proportional to the rank, so that all clients have the same scaling"
    )
    seed: Seed | None = Field(
        None, description="default: derived from the recipe's seed and the client's name"
    )


class PartitionSection(Section):
    """Divides the rows of one task among clients."""

    task: str | None = Field(None, description="default: the only task with training rows")
    clients: Count | None = Field(
        None, description="number of clients; `column` and `file` create one per value and per file"
    )
    by: Literal["iid", "dirichlet", "column", "file"] = Field(
        "iid",
        description="at random, with label shares drawn from a Dirichlet distribution, by a column's values, or by "
        "file: `train` is a folder with a file per client",
    )
    alpha: Positive = Field(
        1.0,
        description="dirichlet: small values give uneven shares, large ones even shares; `by: iid` is the limit",
    )
    column: str | None = Field(
        None, description="column of the values; default for dirichlet: the label or answer"
    )
    seed: CountOrNone = 0
    min_rows: Count = Field(10, description="minimum training rows of a client")


class SampleSection(Section):
    """How many clients are sampled in a round; give one of the two."""

    fraction: Share | None = None
    number: Count | None = None


class LocalSection(Section):
    """How long a client trains in a round; give at most one of the two."""

    epochs: Positive | None = Field(None, description="default: 1")
    steps: Count | None = None


class EvaluateSampleSection(Section):
    """How many clients are scored in rounds before the last; give at most one of the two."""

    fraction: Share | None = Field(None, description="1.0: all clients")
    number: Count | None = Field(None, description="default: 20, or all if there are fewer")


class RateScheduleSection(Section):
    """How the learning rate decays over rounds. A round may still start with a new optimizer.

    Round t of T trains with `training.learning_rate` · m(t), which `training.scheduler` then shapes within the round:
    constant m = 1; linear m = f + (1 − f)(1 − (t−1)/T); cosine m = f + (1 − f)(1 + cos(π(t−1)/T))/2; exponential
    m = γ^(t−1); step m = γ^⌊(t−1)/every⌋, where f is `floor` and γ is `factor`.
    """

    decay: Literal["constant", "linear", "cosine", "exponential", "step"] = "constant"
    floor: Fraction | None = Field(
        None, description="linear, cosine: share of the learning rate at the end; default: 0"
    )
    factor: Share | None = Field(
        None,
        description="exponential: multiplies the rate in each round; step: multiplies it after `every` rounds",
    )
    every: Count | None = Field(None, description="step: number of rounds between decays")


# Alternatives within a section: an override of one replaces the other in the recipe.
ALTERNATIVES: dict[tuple[str | int, ...], tuple[str, ...]] = {
    ("federation", "local"): ("epochs", "steps"),
    ("federation", "sample"): ("fraction", "number"),
    ("federation", "evaluate_sample"): ("fraction", "number"),
    ("federation", "privacy"): ("epsilon", "noise_multiplier"),
}


class RobustSection(Section):
    """An aggregator that tolerates malicious updates from some clients."""

    aggregator: Literal["mean", "norm-clip", "median", "trimmed-mean", "krum", "multi-krum"] = "mean"
    max_norm: Positive | None = Field(
        None, description="norm-clip: maximum norm of the change of a client in a round"
    )
    trim: Annotated[float, Field(ge=0.0, lt=0.5, allow_inf_nan=False)] | None = Field(
        None, description="trimmed-mean: share of the values removed at each end"
    )
    f: CountOrNone | None = Field(
        None, description="krum, multi-krum: number of clients that may be malicious"
    )
    keep: Count | None = Field(None, description="multi-krum: number of updates to average")


class PrivacySection(Section):
    """Differential privacy for whole clients: changes are clipped, and noise is added to their average.

    Give a budget `epsilon` or a `noise_multiplier`.
    """

    clip: Positive = Field(
        description="C, the largest norm of a client's change in a round, over all that it sends together"
    )
    epsilon: Positive | None = Field(
        None,
        description="budget for all rounds, from which the noise follows; no round starts that exceeds it",
    )
    noise_multiplier: NonNegative | None = Field(
        None,
        description="z: the noise has the standard deviation z C per value; 0: clip only, without a guarantee",
    )
    delta: Annotated[float, Field(gt=0.0, lt=1.0, allow_inf_nan=False)] = Field(
        1e-5, description="δ of the guarantee; must be below 1 / number of clients"
    )
    noise: Literal["server", "clients"] = Field(
        "server",
        description="server: added once, to the sum; clients: added by every client to its own change, which protects "
        "it from the server too, with much more noise in all",
    )
    seed: Seed | None = Field(
        None, description="for tests: reproducible noise and sampling, which give no guarantee"
    )


class FederationSection(Section):
    """Rounds, clients and rule. Without `clients` or `partition` every task is a client."""

    rule: RuleName = Field("fed-alora", examples=list(RULE_NAMES))
    rounds: Count = 10
    clients: Annotated[list[ClientSection], Field(min_length=1)] | None = None
    partition: PartitionSection | None = None
    ranks: list[Rank] | None = Field(None, description="one per client, in order; default: adapter.r")
    r_intermediate: Rank = Field(16, description="fed-alora-het: the inner rank m")
    wire: Literal["factors", "smallest"] = Field(
        "factors", description="fed-alora-het: send B1 and B2, or their product if it is smaller"
    )
    upload_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    sample: SampleSection | None = None
    local: LocalSection = LocalSection()
    lr_schedule: RateScheduleSection = RateScheduleSection()
    optimizer_state: Literal["restart", "keep"] = Field(
        "restart", description="keep: moments and schedule continue across rounds"
    )
    state: Literal["persist", "reset-each-round"] = Field(
        "persist",
        description="reset-each-round (reproduction switch): factors that stay on a client return to their initial "
        "values in every round",
    )
    client_init: Literal["shared", "independent"] = Field(
        "shared", description="whether all clients start from the same factors, or each draws its own"
    )
    share_head: bool = Field(
        False, description="also average the classification head and other modules_to_save"
    )
    proximal_mu: NonNegative = Field(
        0.0,
        description="FedProx: adds μ/2 ‖θ − θ_t‖² to a client's loss, over the factors it was sent and trains; 0: off",
    )
    server_momentum: Fraction = Field(
        0.0, description="FedAvgM: β in v ← β v + (θ − θ̄), θ ← θ − η v, where θ̄ is the aggregate of a round"
    )
    server_learning_rate: Positive = Field(
        1.0, description="FedAvgM: η; 1 with momentum 0 takes the aggregate"
    )
    robust: RobustSection = RobustSection()
    privacy: PrivacySection | None = None
    weights: Literal["rows", "steps", "uniform"] = Field(
        "rows",
        description="weight of a client: proportional to its training rows or to its steps in the round, or uniform",
    )
    padding: Literal["zeros", "by-rank"] = Field(
        "zeros",
        description="zero-padding: a client counts as zero in ranks above its own (as published); by-rank: each rank "
        "is averaged over the clients that have it, and is unchanged if none of them participates",
    )
    share_cap: Share | None = Field(None, description="maximum weight of one client in a round")
    change_cap: Annotated[float, Field(ge=1.0, allow_inf_nan=False)] | None = Field(
        100.0,
        description="reject an update whose change exceeds this multiple of the median of the others; null: no limit",
    )
    min_clients: Count = Field(1, description="minimum number of updates for a round to be valid")
    quorum: Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)] = Field(
        0.0, description="minimum share of the sampled clients for a round to be valid"
    )
    retries: Annotated[int, Field(ge=0, le=10)] = Field(
        1,
        description="retries of a client whose worker process was lost, or that ran out of memory or disk space",
    )
    evaluate_every: CountOrNone = Field(1, description="in rounds; 0: only after the last")
    evaluate_sample: EvaluateSampleSection = EvaluateSampleSection()
    common_test: list[str] = Field(
        [], description="tasks whose test rows are used to score the model of every client"
    )
    keep_rounds: Annotated[int, Field(ge=2, le=MOST)] = Field(
        2, description="number of latest rounds kept on disk, to which `--rollback` can return"
    )
    workers: Threads = Field(1, description="number of processes, each with its own base model")
