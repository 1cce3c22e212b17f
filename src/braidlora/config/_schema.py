"""The recipe of `train`, `evaluate` and `preview`: every key of every section, with its range and default."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from braidlora.adapters.sharing import DEFAULT, by_method
from braidlora.config._data_source import Source
from braidlora.config._names import same_file
from braidlora.config._other_methods import not_another_name
from braidlora.config._section import (
    Beams,
    Count,
    CountOrNone,
    Experts,
    Fraction,
    NonNegative,
    Positive,
    Rank,
    Rows,
    Section,
    Seed,
    TaskName,
    Threads,
    Tokens,
    one_of,
)  # fmt: skip
from braidlora.config._task_problems import recipe_problems, task_problems, with_catalog_sources


class ModelSection(Section):
    """The frozen base model."""

    path: str = Field(
        "embedded",
        description="a folder, a GGUF file, a hub name, `package:NAME/folder`, or `embedded` (the tiny base in the "
        "package)",
    )
    gguf_file: str | None = Field(
        None, description="the GGUF file in that folder; it is dequantized once and cached"
    )
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: as stored, but float32 for bf16 weights on a CPU without bf16 instructions"
    )
    quantization: Literal["none", "8bit", "4bit"] = "none"
    attention: str | None = Field(None, description="transformers' attn_implementation")
    chat_template: str | None = Field(
        None, description="a file with a Jinja chat template, for a base without one, or instead of its own"
    )


class AdapterSection(Section):
    """The adapter: a method of the LoRA family, or any PEFT configuration as `method: {peft_type: …}`."""

    method: Annotated[str, not_another_name, one_of(by_method)] | dict[str, Any] = Field(
        DEFAULT.method, examples=list(by_method())
    )
    num_experts: Experts = DEFAULT.defaults["num_experts"]
    r: Rank = DEFAULT.defaults["r"]
    lora_alpha: Positive = DEFAULT.defaults["lora_alpha"]
    lora_dropout: Fraction = DEFAULT.defaults["lora_dropout"]
    dropout_mask: Literal["shared", "per_expert"] = Field(
        "shared",
        description="per_expert (reproduction switch): a dropout mask for each expert, as in the research code",
    )
    expert_init: Literal["independent", "identical"] = Field(
        "independent",
        description="identical (reproduction switch): all experts start from the same A, as LoRAs of one seed do",
    )
    use_rslora: bool = False
    gate: Literal["token", "task", "uniform"] | None = Field(
        None,
        description="what sets the expert weights: a router that reads the token, the row's task, or uniform (1 / N); "
        "default: token, and task for mtl-lora",
    )
    task_map: bool | None = Field(
        None, description="multiply A x by a matrix of the row's task; default: false, and true for mtl-lora"
    )
    alignment_loss: NonNegative | None = Field(
        None,
        description="weight of the distance between the tasks' A x; default: 0 (off), and 0.2 for align-lora",
    )
    alignment: Literal["mmd", "kl"] | None = Field(
        None, description="measure of that distance; default: mmd, and kl for align-lora"
    )
    router_temperature: Positive = 1.0
    balance_loss: NonNegative = Field(
        0.0, description="weight of the load-balancing loss; 0: off, as in the paper"
    )
    target_modules: str | list[str] | None = Field(
        None, description="names, a regular expression, or `all-linear`"
    )
    target_parameters: list[str] | None = Field(
        None,
        description="experts of a mixture-of-experts base, e.g. `[experts.gate_up_proj, experts.down_proj]`",
    )
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, Rank] = Field({})
    alpha_pattern: dict[str, Positive] = Field({})


Metric = Literal[
    "rouge1", "rouge2", "rougeL", "exact_match", "accuracy", "macro_f1", "f1", "rouge1_ascii", "rouge2_ascii",
    "rougeL_ascii",
]  # fmt: skip
Column = Literal["instruction", "input", "output", "answer", "text", "label", "messages", "tools"]
Extractor = Literal[
    "none", "boolq", "piqa", "social_i_qa", "ARC-Easy", "ARC-Challenge", "openbookqa", "hellaswag", "winogrande",
    "AQuA", "mathqa", "number",
]  # fmt: skip


class TaskSection(Section):
    """A task: its name, rows, prompt template and metric."""

    name: TaskName
    kind: Literal["generate", "classify"] = "generate"
    mode: Literal["generate", "rank"] | None = Field(
        None,
        description="how a language model answers test rows: generate text, or rank the `options`; default: "
        "evaluation.mode. A `classify` task is answered by its head",
    )
    data: str | None = Field(
        None,
        description="key of a dataset in the catalog (`braidlora data list`), used as the source of every part "
        "without its own",
    )
    train: Source | None = Field(None, description="training rows; a task without them is only tested")
    validation: Source | None = None
    test: Source | None = None
    columns: dict[Column, str] = Field({}, description="the column of each field")
    template: str | None = Field(None, description="prompt template of this task; default: prompt.template")
    options: list[str] | None = Field(
        None, description="the answers to choose from (`rank`), or the labels (`classify`)"
    )
    metric: Metric | None = Field(
        None,
        description="default: accuracy for `classify` and with an extractor, otherwise exact_match; macro_f1: the "
        "mean F1 of all labels; f1: that of the label `positive`; `_ascii`: with rouge-score's tokenizer, which keeps "
        "only a to z and digits",
    )
    positive: str | None = Field(None, description="the label for `metric: f1`")
    class_weights: Literal["balanced"] | dict[str, Positive] | None = Field(
        None,
        description="classify: multiplies the loss of a row by the weight of its label; `balanced`: all labels of the "
        "training rows have the same total weight; a label that is not listed has weight 1",
    )
    extract: Extractor = "none"
    max_new_tokens: Tokens | None = None

    @model_validator(mode="before")
    @classmethod
    def _sources_of_data(cls, value: Any) -> Any:
        """`data: KEY` as the source of the parts that have none."""
        if isinstance(value, dict) and isinstance(value.get("data"), str):
            return with_catalog_sources(value)
        return value

    @model_validator(mode="after")
    def _checked(self) -> TaskSection:
        if problems := task_problems(self):
            raise ValueError("; ".join(problems))
        return self


class SplitSection(Section):
    """Shares of `train` rows to hold out for tasks without `validation` or `test` sources."""

    validation: Fraction = 0.0
    test: Fraction = 0.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0

    @model_validator(mode="after")
    def _leaves_rows(self) -> SplitSection:
        if self.validation + self.test >= 1.0:
            raise ValueError(
                f"validation + test is {self.validation + self.test:g}; the sum must be below 1 to leave training rows"
            )
        return self


class PromptSection(Section):
    """How rows are converted to tokens."""

    template: str = Field(
        "alpaca",
        description="alpaca, alpaca_short, llm-adapters, chat, a format string, or llm-adapters-legacy (reproduction "
        "switch)",
    )
    cutoff: Annotated[int, Field(ge=8, le=2**24)] = Field(
        256, description="maximum sequence length in tokens"
    )
    train_on_prompt: bool = Field(False, description="also compute the loss on the prompt (as in the paper)")
    train_on_turns: Literal["all", "last"] = Field(
        "all", description="chats: compute the loss on all assistant turns, or on the last one only"
    )
    chat_template_kwargs: dict[str, bool | Annotated[int, Field(ge=-(2**31), le=2**31)] | float | str] = (
        Field({}, description="variables for the chat template, e.g. `{enable_thinking: false}`")
    )
    packing: bool = Field(False, description="put several rows into one sequence")
    bad_rows: Literal["stop", "skip"] = Field("stop", description="skip: skip and count bad rows")


class MixingSection(Section):
    """How often training draws rows of each task."""

    strategy: Literal["proportional", "uniform", "temperature", "weights"] = "proportional"
    temperature: Positive = Field(2.0, description="the probability of task t is ∝ rows_t^(1/temperature)")
    weights: dict[str, NonNegative] = Field({})


class RateMultipliers(Section):
    """Learning rates as multiples of `learning_rate` (LoRA+ increases that of B)."""

    A: Positive = 1.0
    B: Positive = 1.0
    router: Positive = 1.0


class TrainingSection(Section):
    """Training with the transformers Trainer."""

    epochs: Positive = 3.0
    max_steps: Count | None = Field(None, description="overrides epochs")
    batch_size: Rows = Field(16, description="rows per device in a forward pass")
    gradient_accumulation: Count = 1
    learning_rate: Positive = 3e-4
    rate_multipliers: RateMultipliers = RateMultipliers()
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_steps: CountOrNone = 100
    weight_decay: NonNegative = 0.0
    max_grad_norm: NonNegative = Field(1.0, description="0: off")
    optimizer: str = Field("adamw_torch", description="a name in transformers' OptimizerNames")
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="dtype of autocast; model.dtype is that of the base model"
    )
    gradient_checkpointing: bool = False
    save_steps: CountOrNone = Field(0, description="0: once per epoch")
    keep_checkpoints: Count = 2
    eval_steps: CountOrNone = Field(0, description="steps between validation losses; 0: once per epoch")
    load_best: bool = Field(False, description="use the checkpoint with the lowest validation loss")
    logging_steps: Count = 10
    report_to: list[str] = Field([])
    threads: Threads | None = Field(
        None, description="CPU threads; recorded, because they affect the last bits of sums"
    )


class EvaluationSection(Section):
    """How test rows are answered and scored."""

    mode: Literal["generate", "rank"] = "generate"
    batch_size: Rows = 32
    num_beams: Beams = 1
    max_new_tokens: Tokens = 32
    length_normalized: bool = Field(True, description="rank: use mean instead of total log-likelihood")
    references: dict[str, float] = Field(
        {}, description="for Δm%: the score of a single-task LoRA on each task"
    )


class RunConfig(Section):
    """A recipe."""

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
            raise ValueError(f"duplicate task names: {', '.join(twice)}")
        if same := same_file(names):
            raise ValueError(
                f"task names become file names, so they must differ in more than case: {', '.join(same)}"
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
                    f"{section}: unknown task {', '.join(unknown)}; the tasks are {', '.join(known)}"
                )
        if self.mixing.strategy == "weights":
            missing = sorted(set(known) - set(self.mixing.weights))
            if missing:
                raise ValueError(
                    f"mixing.weights: no weight for {', '.join(missing)}; `strategy: weights` needs one for each task"
                )
            if not any(self.mixing.weights.values()):
                raise ValueError("mixing.weights: all weights are 0; at least one must be above 0")
        elif self.mixing.weights:
            raise ValueError(
                f"mixing.weights has no effect with mixing.strategy: {self.mixing.strategy}; set it to weights, or "
                "remove mixing.weights"
            )
        if self.adapter.alignment_loss and self.prompt.packing:
            raise ValueError(
                "adapter.alignment_loss compares rows position by position, and packing puts several rows into one "
                "sequence. Set prompt.packing=false"
            )
        if len({task.kind for task in self.tasks}) > 1:
            raise ValueError(
                "tasks: `generate` and `classify` tasks need different models; use one kind per recipe. A language "
                "model answers label tasks with `mode: rank` and `options`"
            )
        if problems := recipe_problems(self):
            raise ValueError("; ".join(problems))
        if (
            self.training.load_best
            and self.split.validation == 0
            and not any(task.validation for task in self.tasks)
        ):
            raise ValueError(
                "training.load_best needs validation rows: set split.validation (such as 0.1) or `validation` of a task"
            )
        return self

    @property
    def kind(self) -> Literal["generate", "classify"]:
        """The kind of all tasks: `generate` (causal LM) or `classify` (sequence classification)."""
        return self.tasks[0].kind
