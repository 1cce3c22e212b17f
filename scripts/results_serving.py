"""Tables of decoding and of serving for `document_results.py`."""

from __future__ import annotations

from typing import Any

from braidlora.tables import markdown_table

_LABELS = {"peft_lora": "LoRA (PEFT)", "alora": "ALoRA", "hydralora": "HydraLoRA", "moelora": "MoE-LoRA"}
_WHAT = {
    "decode": "a cached greedy step",
    "prefill": "a prompt of 64 tokens, first token",
    "score": "a row of 64 tokens, no cache",
}


def decode(result: dict[str, Any]) -> str:
    """Time per step of each method, as a share of PEFT LoRA's; one row per kind of pass, batch and dtype."""
    rows = []
    for one in result["rows"]:
        ratios = one["ratio_to_peft_lora"]
        methods = [name for name in ratios if name != "base"]
        rows.append(
            [
                f"{one['benchmark']}: {_WHAT[one['benchmark']]}",
                str(one["batch"]),
                one["base"],
                f"{one['ms']['peft_lora']:.1f}",
                *(f"{ratios[name]:.2f}" for name in ["base", *methods]),
            ]
        )
    header = [
        "pass",
        "batch",
        "base",
        "LoRA, ms",
        "base model",
        *(_LABELS.get(name, name) for name in methods),
    ]
    first = result["rows"][0]
    note = (
        f"SmolLM2's widths, {first['layers']} layers, all-linear, r = {result['rank']}, N = 3, {result['threads']} "
        "thread. Times relative to PEFT's LoRA, interleaved token by token; the goal is 1.0, and 1.10 is accepted."
    )
    return "\n\n".join([markdown_table(header, rows), note])


def vllm(result: dict[str, Any]) -> str:
    """Tokens per second of each adapter by batch size, as a share of a plain LoRA's in the same engine."""
    settings, batches = result["settings"], result["throughput"]
    rows = [
        [
            _LABELS.get(name, name.replace("lora", "LoRA", 1) if name.startswith("lora") else name),
            *(f"{one['tokens_per_second'][name]:.1f} ({one['of_lora'][name]:.2f})" for one in batches),
        ]
        for name in batches[0]["of_lora"]
    ]
    header = ["adapter", *(f"batch {one['batch']}, tokens per second" for one in batches)]
    agreed = ", ".join(
        f"{_LABELS.get(name, 'LoRA' if name == 'lora' else name)} {one['same']} of {one['tokens']}"
        for name, one in result["agreement"].items()
    )
    layers = f"the first {settings['layers']} layers" if settings["layers"] else "all layers"
    base = settings["base"].removeprefix("package:")
    note = (
        f"{layers} of {base}, {settings['dtype']}, all-linear, {settings['experts']} experts of rank "
        f"{settings['rank']}; the engine has rank {settings['max_lora_rank']} unless the row says otherwise; "
        f"{settings['prompt']} prompt and {settings['tokens']} new tokens. In parentheses: throughput relative to "
        f"plain LoRA in the first engine, each repetition in turn. Tokens that PEFT chooses too, in the same dtype: "
        f"{agreed}. "
        f"vLLM {result['vllm']}, {result['device']}."
    )
    return "\n\n".join([markdown_table(header, rows), note[0].upper() + note[1:]])
