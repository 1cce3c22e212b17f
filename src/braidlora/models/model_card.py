"""README.md of an adapter or a merged model: what it is, and the code that gets an answer from it with PEFT alone.

The code reads labels, prompts and limits from the folder's `braidlora.json`, so that it is the same for every adapter
of a kind, and nothing that a file says becomes code.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent
from typing import Any

from braidlora.adapters import how_to_load
from braidlora.adapters import needs_import as needs_import  # the command line asks here
from braidlora.adapters.sharing import SCHEMES, formula_of
from braidlora.models.gguf import SUFFIX
from braidlora.models.hub_copies import COPIES, is_hub_name
from braidlora.models.package import PACKAGE
from braidlora.models.presence import EMBEDDED
from braidlora.paths import find_data
from braidlora.runs import ADAPTER_CARD, AdapterCard, TaskCard, quoted

_TITLES = {
    "LORA": "LoRA",
    "ADALORA": "AdaLoRA",
    "LOHA": "LoHa",
    "LOKR": "LoKr",
    "SHIRA": "SHiRA",
    "VERA": "VeRA",
}
_PLAIN = re.compile(r"[\w./~-]+")


def model_card(config: dict[str, Any], card: AdapterCard | None = None) -> str:
    """The README of an adapter.

    Args:
        config: its adapter_config.json.
        card: its `braidlora.json`; without prompts in it the code only loads the adapter.
    """
    base = str(_named_base(config, card) or "the base model")
    what, formula = _TITLES.get(config["peft_type"], config["peft_type"]), ""
    if config.get("use_dora"):
        what = "DoRA"
    if what == "BRAIDLORA":
        scheme = SCHEMES[config["share"]]
        formula = f"{formula_of(config)}\n\n"
        what = f"{scheme.title}, {config['num_experts']} experts"
    elif what == "FACTOREDLORA":
        what = f"Factored LoRA (heterogeneous Fed-ALoRA), intermediate rank {config['r_intermediate']}"
    rank = f", rank {config['r']}" if "r" in config else ""
    loading = _usage(config, card) or how_to_load(
        config | {"base_model_name_or_path": _named_base(config, card)}
    )
    return (
        f"{_metadata(base, 'peft', ('braidlora', 'lora'))}# {what}{rank}\n\n{formula}{_tasks(card)}{loading}"
    )


def merged_card(config: dict[str, Any], card: AdapterCard | None = None) -> str:
    """The README of a model into whose weights an adapter is merged.

    Args:
        config: the adapter_config.json of the merged adapter.
        card: the model's `braidlora.json`.
    """
    base = str(_named_base(config, card) or "the base model")
    kind = "CausalLM" if config.get("task_type") == "CAUSAL_LM" else "SequenceClassification"
    task = _first(card)
    usage = (
        f"from transformers import AutoModelFor{kind}\n\n"
        f'model = AutoModelFor{kind}.from_pretrained("PATH_OF_THIS_FOLDER")\n'
    )
    if card is not None and task is not None:
        usage = (
            _imports(f"from transformers import AutoModelFor{kind}, AutoTokenizer\n")
            + _start(card)
            + "tokenizer = AutoTokenizer.from_pretrained(FOLDER)\n"
            + f"model = AutoModelFor{kind}.from_pretrained(FOLDER).eval()\n\n"
            + _answer(task, card)
        )
    return (
        f"{_metadata(base, 'transformers', ('braidlora',))}"
        f"# {_shown(base)} with an adapter merged into its weights\n\n{_tasks(card)}```python\n{usage}```\n"
    )


def _metadata(base: str, library: str, tags: tuple[str, ...]) -> str:
    name = base if _PLAIN.fullmatch(base) else json.dumps(base)  # JSON is YAML
    lines = "".join(f"- {tag}\n" for tag in tags)
    return f"---\nbase_model: {name}\nlibrary_name: {library}\ntags:\n{lines}---\n\n"


def _shown(text: str) -> str:
    """A text in a line of Markdown: the characters that could be markup become blanks."""
    return "".join(letter if letter.isalnum() or letter in " ./_:-" else " " for letter in text)


def _tasks(card: AdapterCard | None) -> str:
    if card is None or not card.tasks:
        return ""
    names = ", ".join(_shown(task.name) for task in card.tasks)
    return f"Trained on {names}. `{ADAPTER_CARD}` has the prompts, and the labels in the order of the logits.\n\n"


def _first(card: AdapterCard | None) -> TaskCard | None:
    """The task that the code answers; None where the card has no prompts."""
    if card is None or card.prompt is None or not card.tasks:
        return None
    return card.tasks[0] if card.tasks[0].template is not None else None


def _usage(config: dict[str, Any], card: AdapterCard | None) -> str | None:
    """Code that answers a task's row, for a classifier or a language model."""
    task = _first(card)
    if card is None or task is None or config.get("task_type") not in ("CAUSAL_LM", "SEQ_CLS"):
        return None
    kind = "CausalLM" if task.kind == "generate" else "SequenceClassification"
    ours = needs_import(config)
    found = _base_in_code(config, card)
    labels = (
        ""
        if task.kind == "generate"
        else "    # The head has a logit for every label of all tasks; the default of two does not fit.\n"
        '    num_labels=len(card["labels"]),\n'
        '    id2label=dict(enumerate(card["labels"])),\n'
        '    label2id={label: index for index, label in enumerate(card["labels"])},\n'
    )
    return (
        "```python\n"
        + _imports(
            (
                "import braidlora  # pip install braidlora; registers this adapter's type with PEFT\n"
                if ours
                else ""
            )
            + found.libraries
            + "from peft import PeftModel\n"
            + f"from transformers import AutoModelFor{kind}, AutoTokenizer\n",
            found.standard,
        )
        + found.name
        + _start(card)
        + f"tokenizer = AutoTokenizer.from_pretrained(BASE{', gguf_file=GGUF' * found.gguf})\n"
        + (
            'tokenizer.chat_template = card["prompt"]["chat_template"]\n'
            if task.template and task.template.chat and card.prompt and card.prompt.chat_template
            else ""
        )
        + f"base = AutoModelFor{kind}.from_pretrained(\n    BASE,\n"
        + _dtype(card, found.gguf)
        + f"{labels})"
        + ('.to(getattr(torch, card["base"]["dtype"]))\n' if _has_dtype(card) and found.gguf else "\n")
        + ("base.config.pad_token_id = tokenizer.pad_token_id\n" if task.kind == "classify" else "")
        + (
            ""
            if task.kind == "generate"
            else "# transformers reports that the head is newly initialized. That is expected: the adapter provides "
            "it.\n"
        )
        + "model = PeftModel.from_pretrained(base, FOLDER).eval()\n\n"
        + _answer(task, card)
        + "```\n"
        + (
            f"\nWithout `import braidlora`, loading raises `KeyError: '{config['peft_type']}'`, because PEFT does "
            "not know this type.\n"
            if ours
            else ""
        )
    )


def _has_dtype(card: AdapterCard) -> bool:
    return card.base is not None and card.base.dtype is not None


def _dtype(card: AdapterCard, gguf: bool) -> str:
    """The argument of `from_pretrained`; weights of a GGUF file are rounded first, as in braidlora's cache."""
    if gguf:
        return '    gguf_file=GGUF,\n    dtype="bfloat16",  # as they were rounded for training\n'
    return '    dtype=card["base"]["dtype"],\n' if _has_dtype(card) else ""


def hub_name_of_base(card: AdapterCard | None) -> str | None:
    """The hub's name of the base, if the recipe named it so; a copy may have been read instead (`hub_copies`)."""
    path = card.base.path if card is not None and card.base is not None else ""
    return path if is_hub_name(path) and not find_data(path).is_dir() else None


def _named_base(config: dict[str, Any], card: AdapterCard | None) -> str | None:
    """The base by a name that means the same on other machines, where it has one; otherwise where it was loaded from.

    That is the recipe's hub name, or the package or the embedded base, instead of the copy that was read here.
    """
    loaded: str | None = config.get("base_model_name_or_path")
    if card is None or card.base is None:
        return loaded
    path = card.base.path
    if path.startswith(PACKAGE):
        same = (name for name, copy in COPIES.items() if copy.path == path and not copy.note)
        return next(same, path)
    if path == EMBEDDED or path.endswith(SUFFIX):
        return path
    return hub_name_of_base(card) or loaded


@dataclass(frozen=True)
class _BaseCode:
    """The code of a card that finds and loads the base.

    Attributes:
        name: the lines that set BASE, and GGUF for a GGUF file.
        standard, libraries: their imports.
        gguf: whether it is a GGUF file.
    """

    name: str
    standard: str = ""
    libraries: str = ""
    gguf: bool = False


def _base_in_code(config: dict[str, Any], card: AdapterCard) -> _BaseCode:
    """How a card's code finds its base. Only for the embedded base it needs braidlora."""
    name = _named_base(config, card)
    if card.base is not None and card.base.path == EMBEDDED:
        return _BaseCode(
            "BASE = str(embedded_base_path())\n",
            libraries="from braidlora.assets import embedded_base_path\n",
        )
    if name is None or not (name.startswith(PACKAGE) or name.endswith(SUFFIX)):
        copy = COPIES.get(name or "")
        known = ""
        if copy and not copy.note:
            known = (
                f"# Without the hub: {copy.install}, then\n# from importlib.util import find_spec\n"
                f"# BASE = {_in_package(copy.path)[0]}\n"
            )
        return _BaseCode(f"{known}BASE = {json.dumps(name or 'PATH_OF_THE_BASE')}\n")
    gguf = name.endswith(SUFFIX)
    install = next((f" ({copy.install})" for copy in COPIES.values() if copy.path == name), "")
    comment = (
        f"# A GGUF file{install}; loading dequantizes it, which takes a while.\n"
        if gguf
        else f"# A folder in an installed Python package{install}.\n"
    )
    file, standard = "", ""
    if name.startswith(PACKAGE):
        place, file = _in_package(name)
        standard = "from importlib.util import find_spec\n"
    else:
        path = find_data(name)
        path = path.absolute() if path.is_file() else Path(name)
        place, file = json.dumps(str(path.parent)), path.name
    lines = f"{comment}BASE = {place}\n" + (f"GGUF = {json.dumps(file)}\n" if gguf else "")
    return _BaseCode(lines, standard, gguf=gguf)


def _in_package(path: str) -> tuple[str, str]:
    """The expression for a folder of `package:NAME/folder`, without importing NAME, and the file of a GGUF path."""
    name, _, inside = path.removeprefix(PACKAGE).partition("/")
    file = ""
    if inside.endswith(SUFFIX):
        inside, _, file = inside.rpartition("/")
    folder = f" + {json.dumps('/' + inside)}" if inside else ""
    return f"find_spec({json.dumps(name)}).submodule_search_locations[0]{folder}", file


def _imports(libraries: str, standard: str = "") -> str:
    return f"import json\n{standard}from pathlib import Path\n\nimport torch\n{libraries}\n"


def _start(card: AdapterCard) -> str:
    several = len(card.tasks) > 1
    names = f"  # one of {quoted([task.name for task in card.tasks], 8)}" if several else ""
    return (
        'FOLDER = "PATH_OF_THIS_FOLDER"\n'
        f'card = json.loads(Path(FOLDER, "{ADAPTER_CARD}").read_text(encoding="utf-8"))\n'
        f'task = card["tasks"][0]{names}\n\n'
    )


def _answer(task: TaskCard, card: AdapterCard) -> str:
    assert task.template is not None
    if task.kind == "classify":
        return (
            'text = task["template"]["with_input"].format(text="YOUR TEXT")\n'
            'inputs = tokenizer(text, truncation=True, max_length=card["prompt"]["cutoff"], return_tensors="pt")\n'
            "with torch.inference_mode():\n"
            '    logits = model(**inputs).logits[0, task["indices"]]  # of this task\'s labels alone\n'
            'answer = task["labels"][int(logits.argmax())]\n'
            "print(answer, logits.softmax(-1).tolist())\n"
        )
    row = 'row = {"instruction": "YOUR INSTRUCTION", "input": ""}\n'
    if task.template.chat:
        variables, given = "", ""
        if task.template.chat_template_kwargs:
            variables = 'variables = task["template"]["chat_template_kwargs"]\n'
            given = ", **variables"
        prompt = (
            'content = row["instruction"] + ("\\n\\n" + row["input"] if row["input"] else "")\n'
            'messages = [{"role": "user", "content": content}]  # or all turns of a chat before its answer\n'
            f"{variables}"
            f"prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True{given})\n"
            'ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]\n'
        )
    else:
        prompt = (
            'prompt = task["template"]["with_input" if row["input"] else "without_input"].format(**row)\n'
            'ids = card["prompt"]["bos_token_ids"] + tokenizer(prompt, add_special_tokens=False)["input_ids"]\n'
        )
    modes = {_is_ranked(one, card) for one in card.tasks if one.kind == "generate"}
    if modes == {True}:
        return row + prompt + _rank(task, card)
    if modes == {True, False}:
        condition = '(task["mode"] or card["answers"]["mode"]) == "rank"'
        ranked, written = (indent(code, "    ") for code in (_rank(task, card), _WRITE))
        return row + prompt + f"if {condition}:\n{ranked}else:\n{written}"
    return row + prompt + _WRITE


_WRITE = """\
ids = torch.tensor([ids])
with torch.inference_mode():
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=task["max_new_tokens"] or card["answers"]["max_new_tokens"],
    )
answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
print(answer)
"""


def _is_ranked(task: TaskCard, card: AdapterCard) -> bool:
    mode = task.mode or (card.answers.mode if card.answers is not None else "generate")
    return mode == "rank" and task.options is not None


def _rank(task: TaskCard, card: AdapterCard) -> str:
    """Code that chooses among the options as `evaluation.predict.rank` does."""
    written = ""
    if task.template is not None and task.template.chat:
        given = ", **variables" if task.template.chat_template_kwargs else ""
        written = (
            '    turns = [*messages, {"role": "assistant", "content": text}]\n'
            f"    text = tokenizer.apply_chat_template(turns, tokenize=False{given})[len(prompt) :].rstrip()\n"
        )
    normalized = card.answers is None or card.answers.length_normalized
    return (
        "scores = []  # of the task's options\n"
        'for text in task["option_texts"]:\n'
        f"{written}"
        '    option = tokenizer(text, add_special_tokens=False)["input_ids"]\n'
        '    option += [card["prompt"]["eos_token_id"]] * (option[-1:] != [card["prompt"]["eos_token_id"]])\n'
        "    with torch.inference_mode():\n"
        "        logits = model(torch.tensor([ids + option])).logits[0, len(ids) - 1 : -1]\n"
        "    likelihoods = logits.float().log_softmax(-1).gather(-1, torch.tensor(option)[:, None])\n"
        f"    scores.append(likelihoods.{'mean' if normalized else 'sum'}())\n"
        "scores = torch.stack(scores)\n"
        'answer = task["options"][int(scores.argmax())]\n'
        "print(answer, scores.softmax(-1).tolist())\n"
    )
