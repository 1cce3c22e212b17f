"""The recipe: what `train`, `evaluate` and `preview` read. Every key of every section, with its range and default."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from braidlora.adapters.sharing import DEFAULT, by_method
from braidlora.config._names import name_problem, same_file


def _checked_name(name: str) -> str:
    if problem := name_problem(name):
        raise ValueError(problem)
    return name


TaskName = Annotated[str, AfterValidator(_checked_name)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
# Every whole number has an upper bound: far beyond what is of use, and below what crashes a native library.
MOST = 2**31 - 1
Count = Annotated[int, Field(ge=1, le=MOST)]
CountOrNone = Annotated[int, Field(ge=0, le=MOST)]  # 0 is a setting of its own
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Rank = Annotated[int, Field(ge=1, le=65_536)]
Experts = Annotated[int, Field(ge=1, le=1024)]
Threads = Annotated[int, Field(ge=1, le=1024)]  # also processes
Rows = Annotated[int, Field(ge=1, le=65_536)]  # of a batch
Tokens = Annotated[int, Field(ge=1, le=2**24)]
Beams = Annotated[int, Field(ge=1, le=1024)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_is_true(cls, value: Any, info: ValidationInfo) -> Any:
        """To Python true is 1, so `r: true` would make an adapter of rank 1."""
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        if kinds & {int, float} and not kinds & {bool, Any} and _holds_boolean(value):
            raise ValueError(f"got {value!r}; expected a number, which true and false are not")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The plain types that an annotation such as `dict[str, int | None]` is made of."""
    inner = get_args(annotation)
    return {annotation}.union(*map(_kinds, inner)) if inner else {annotation}


def _holds_boolean(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_boolean, value.values()))
    return isinstance(value, bool) or (isinstance(value, list) and any(map(_holds_boolean, value)))


class ModelSection(Section):
    """The frozen base model."""

    path: str = Field(
        "embedded",
        description="a folder, a GGUF file, a hub name, `package:NAME/folder`, or `embedded` (the tiny base in the "
        "package)",
    )
    gguf_file: str | None = Field(
        None, description="the GGUF file in that folder; it is dequantized once and kept in a cache"
    )
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: as stored, but float32 for bf16 weights on a CPU without bf16 instructions"
    )
    quantization: Literal["none", "8bit", "4bit"] = "none"
    attention: str | None = Field(None, description="transformers' attn_implementation")


def _known_method(method: str) -> str:
    known = by_method()
    if method not in known:
        *names, last = map(repr, known)
        raise PydanticCustomError("method", f"Input should be {', '.join(names)} or {last}")
    return method


class AdapterSection(Section):
    """The adapter: one of the LoRA family, or any PEFT configuration as `method: {peft_type: …}`."""

    method: Annotated[str, AfterValidator(_known_method)] | dict[str, Any] = DEFAULT.method
    num_experts: Experts = DEFAULT.defaults["num_experts"]
    r: Rank = DEFAULT.defaults["r"]
    lora_alpha: Positive = DEFAULT.defaults["lora_alpha"]
    lora_dropout: Fraction = DEFAULT.defaults["lora_dropout"]
    dropout_mask: Literal["shared", "per_expert"] = "shared"
    use_rslora: bool = False
    router_temperature: Positive = 1.0
    balance_loss: NonNegative = Field(
        0.0, description="weight of the load-balancing loss; 0 is off, as in the paper"
    )
    target_modules: str | list[str] | None = Field(
        None, description="names, a regular expression, or `all-linear`"
    )
    target_parameters: list[str] | None = Field(
        None,
        description="experts of a mixture-of-experts base, e.g. `[experts.gate_up_proj, experts.down_proj]`",
    )
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, Rank] = {}
    alpha_pattern: dict[str, Positive] = {}


class DataSource(Section):
    """Rows from one place. A plain string in a recipe is the same as `{source: STRING}`."""

    source: str = Field(
        description="a json/jsonl/csv/parquet file, a folder saved by `datasets`, a hub data set, or `generated:NAME`"
    )
    format: Literal["json", "jsonl", "csv", "parquet", "folder", "hub"] | None = None
    subset: str | None = Field(None, description="configuration name of a hub data set")
    split: str | None = Field(None, description="split of a hub data set or saved folder")
    where: dict[str, Any] = Field(
        {}, description="keep rows whose column equals the value, or is one of a list"
    )
    limit: Count | None = Field(
        None, description="keep this many rows, drawn with `seed` (train) or `split.seed` (validation, test)"
    )


def _source(value: Any) -> Any:
    return {"source": value} if isinstance(value, str) else value


Source = Annotated[DataSource, BeforeValidator(_source)]
Metric = Literal[
    "rouge1", "rouge2", "rougeL", "exact_match", "accuracy", "rouge1_ascii", "rouge2_ascii", "rougeL_ascii"
]  # fmt: skip
Extractor = Literal[
    "none", "boolq", "piqa", "social_i_qa", "ARC-Easy", "ARC-Challenge", "openbookqa", "hellaswag", "winogrande",
    "AQuA", "mathqa", "number",
]  # fmt: skip


class TaskSection(Section):
    """A task: name, rows, how to prompt, how to score."""

    name: TaskName
    kind: Literal["generate", "classify"] = "generate"
    train: Source | None = Field(None, description="training rows; a task without any is only tested")
    validation: Source | None = None
    test: Source | None = None
    columns: dict[Literal["instruction", "input", "output", "answer", "text", "label"], str] = Field(
        {}, description="which column of the data holds each field"
    )
    template: str | None = Field(None, description="this task's own prompt template; the recipe's otherwise")
    options: list[str] | None = Field(
        None, description="the answers to choose from (`rank`), or the labels (`classify`)"
    )
    metric: Metric | None = Field(
        None,
        description="default: accuracy for `classify` and with an extractor, exact_match otherwise; `_ascii` is "
        "rouge-score's own tokenizer, which sees a to z and digits only",
    )
    extract: Extractor = "none"
    max_new_tokens: Tokens | None = None

    @model_validator(mode="after")
    def _has_rows(self) -> TaskSection:
        if self.train is None and self.test is None:
            raise ValueError("a task needs `train` rows, `test` rows, or both")
        return self


class SplitSection(Section):
    """Rows cut from `train` for tasks that give no validation or test rows of their own."""

    validation: Fraction = 0.0
    test: Fraction = 0.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0

    @model_validator(mode="after")
    def _leaves_rows(self) -> SplitSection:
        if self.validation + self.test >= 1.0:
            raise ValueError(
                f"validation + test = {self.validation + self.test:g} leaves no training rows; the sum must be below 1"
            )
        return self


class PromptSection(Section):
    """From rows to tokens."""

    template: str = Field(
        "alpaca",
        description="alpaca, alpaca_short, llm-adapters, llm-adapters-legacy, chat, or a format string",
    )
    cutoff: Annotated[int, Field(ge=8, le=2**24)] = Field(256, description="longest sequence in tokens")
    train_on_prompt: bool = Field(False, description="loss on the prompt as well (the paper's setting)")
    packing: bool = Field(False, description="several rows in one sequence")
    bad_rows: Literal["stop", "skip"] = Field("stop", description="skip counts what it skipped")


class MixingSection(Section):
    """How often each task is drawn."""

    strategy: Literal["proportional", "uniform", "temperature", "weights"] = "proportional"
    temperature: Positive = Field(
        2.0, description="task t is drawn with probability ∝ rows_t^(1/temperature)"
    )
    weights: dict[str, NonNegative] = {}


class RateMultipliers(Section):
    """Learning rates as multiples of `learning_rate` (LoRA+ raises B's)."""

    A: Positive = 1.0
    B: Positive = 1.0
    router: Positive = 1.0


class TrainingSection(Section):
    """One run on the transformers Trainer."""

    epochs: Positive = 3.0
    max_steps: Count | None = Field(None, description="overrides epochs")
    batch_size: Rows = Field(16, description="rows per device and forward pass")
    gradient_accumulation: Count = 1
    learning_rate: Positive = 3e-4
    rate_multipliers: RateMultipliers = RateMultipliers()
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_steps: CountOrNone = 100
    weight_decay: NonNegative = 0.0
    max_grad_norm: NonNegative = Field(1.0, description="0 is off")
    optimizer: str = Field("adamw_torch", description="a name of transformers' OptimizerNames")
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="autocast; the base's own dtype is model.dtype"
    )
    gradient_checkpointing: bool = False
    save_steps: CountOrNone = Field(0, description="0: once an epoch")
    keep_checkpoints: Count = 2
    eval_steps: CountOrNone = Field(0, description="validation loss every so many steps; 0: once an epoch")
    load_best: bool = Field(False, description="end with the checkpoint of the lowest validation loss")
    logging_steps: Count = 10
    report_to: list[str] = []
    threads: Threads | None = Field(None, description="CPU threads; recorded, since sums depend on them")


class EvaluationSection(Section):
    """How the test rows are answered and scored."""

    mode: Literal["generate", "rank"] = "generate"
    batch_size: Rows = 32
    num_beams: Beams = 1
    max_new_tokens: Tokens = 32
    length_normalized: bool = Field(True, description="rank: mean instead of summed log-likelihood")
    references: dict[str, float] = Field({}, description="score of a single-task LoRA per task, for Δm%")


class RunConfig(Section):
    """A whole recipe."""

    model: ModelSection = ModelSection()
    adapter: AdapterSection = AdapterSection()
    tasks: Annotated[list[TaskSection], Field(min_length=1)]
    split: SplitSection = SplitSection()
    prompt: PromptSection = PromptSection()
    mixing: MixingSection = MixingSection()
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()
    seed: Seed = 0
    output: str = Field("runs/run", description="the run directory")

    @field_validator("tasks")
    @classmethod
    def _names_differ(cls, tasks: list[TaskSection]) -> list[TaskSection]:
        names = [task.name for task in tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"task names must differ, given twice: {', '.join(twice)}")
        if same := same_file(names):
            raise ValueError(
                f"task names become file names and must differ in more than case: {', '.join(same)}"
            )
        return tasks

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        known = [task.name for task in self.tasks]
        for section, given in (
            ("mixing.weights", self.mixing.weights),
            ("evaluation.references", self.evaluation.references),
        ):
            unknown = sorted(set(given) - set(known))
            if unknown:
                raise ValueError(
                    f"{section}: unknown task {', '.join(unknown)}; the recipe's tasks are {', '.join(known)}"
                )
        if self.mixing.strategy == "weights":
            missing = sorted(set(known) - set(self.mixing.weights))
            if missing:
                raise ValueError(
                    f"mixing.weights: no weight for {', '.join(missing)}; `strategy: weights` needs one for every task"
                )
            if not any(self.mixing.weights.values()):
                raise ValueError("mixing.weights: all are 0; at least one must be above 0")
        elif self.mixing.weights:
            raise ValueError(
                f"mixing.weights would be ignored, since mixing.strategy is {self.mixing.strategy}; set "
                "mixing.strategy: weights, or remove them"
            )
        if len({task.kind for task in self.tasks}) > 1:
            raise ValueError(
                "tasks: `generate` and `classify` tasks cannot share one model; use one kind in a recipe"
            )
        if (
            self.training.load_best
            and self.split.validation == 0
            and not any(task.validation for task in self.tasks)
        ):
            raise ValueError(
                "training.load_best needs validation rows: set split.validation (e.g. 0.1) or a task's `validation`"
            )
        return self

    @property
    def kind(self) -> Literal["generate", "classify"]:
        """The kind that all tasks share: `generate` (causal LM) or `classify` (sequence classification)."""
        return self.tasks[0].kind
