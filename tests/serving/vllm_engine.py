"""Runs one engine of vLLM on requests from a JSON file, mixed in one batch, and prints tokens and log-probabilities.

    python vllm_engine.py REQUESTS.json

The file has `engine` (arguments of `vllm.LLM`), `adapters` (folders by name), and `rounds`: lists of requests
`[adapter or null, token ids]`, each list one call of `generate`. Engines end with their process, so tests start one
for each configuration.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def main():
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    given = json.loads(Path(sys.argv[1]).read_text())
    llm = LLM(enforce_eager=True, enable_lora=True, **given["engine"])
    loras = {
        name: LoRARequest(name, number, path)
        for number, (name, path) in enumerate(given["adapters"].items(), 1)
    }
    params = SamplingParams(temperature=0, max_tokens=given["max_tokens"], logprobs=1, ignore_eos=True)
    rounds = []
    for requests in given["rounds"]:
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for _, ids in requests],
            params,
            lora_request=[loras.get(name) for name, _ in requests],
            use_tqdm=False,
        )
        rounds.append(
            [
                {
                    "tokens": list(output.outputs[0].token_ids),
                    "logprobs": [
                        step[token].logprob
                        for step, token in zip(
                            output.outputs[0].logprobs, output.outputs[0].token_ids, strict=True
                        )
                    ],
                    "cached": output.num_cached_tokens,
                }
                for output in outputs
            ]
        )
    print("RESULT " + json.dumps(rounds), flush=True)


if __name__ == "__main__":
    main()
