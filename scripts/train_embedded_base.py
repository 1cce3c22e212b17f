"""Train the tiny base model in the package and its tokenizer.

    python scripts/train_embedded_base.py --minutes 30 --output src/braidlora/assets/base

All data is generated from the seed (`embedded_corpus.py`). With --steps the result does not depend on the machine's
speed; --minutes stops after a fixed time and records the number of steps. Writes the model, the tokenizer and
`training.json`: command, seed, steps, lines seen, machine, versions, and the accuracy on held-out lines per operation.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import string
import sys
import time
from datetime import date
from pathlib import Path
from random import Random

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from embedded_corpus import OPERATIONS, line, operation_line, vocabulary

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer with all words of the vocabulary as single tokens, and characters and bytes for the rest."""
    words = [f"▁{word}" for word in vocabulary()]
    characters = ["▁", *(c for c in string.printable if c.isprintable() and not c.isspace())]
    tokens = [PAD, BOS, EOS, UNK, *(f"<0x{byte:02X}>" for byte in range(256))]
    scores = dict.fromkeys(tokens, 0.0) | dict.fromkeys(characters, -10.0)
    # A word always scores above its letters, and a longer word above a shorter one followed by letters.
    scores |= {word: -1.0 for word in words if word not in scores}
    tokenizer = Tokenizer(models.Unigram(list(scores.items()), unk_id=3, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token=UNK,
        padding_side="left", model_max_length=256, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def build_model(vocabulary_size: int, width: int, layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary_size, hidden_size=width, intermediate_size=5 * width // 2, num_hidden_layers=layers,
        num_attention_heads=width // 32, num_key_value_heads=width // 32, max_position_embeddings=256,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


class Batches:
    """Batches of lines of similar length: bos, prompt, answer, eos.

    Prompt tokens get a small weight, because a prompt is mostly random.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, rows: int) -> None:
        self.random, self.rows = Random(f"embedded base/{seed}"), rows
        self.ids = {word[1:]: id for word, id in tokenizer.get_vocab().items() if word.startswith("▁")}
        self.ready: list[list[tuple[list[int], int]]] = []

    def draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(input_ids (rows, L), weights (rows, L)): 1 on the answer and EOS, 0.1 on the prompt, 0 on padding."""
        if not self.ready:
            # Sort sixteen batches at a time by length, then shuffle the batches: halves the padding.
            pool = sorted((self._encode() for _ in range(16 * self.rows)), key=lambda line: len(line[0]))
            self.ready = [pool[at : at + self.rows] for at in range(0, len(pool), self.rows)]
            self.random.shuffle(self.ready)
        batch = self.ready.pop()
        longest = max(len(tokens) for tokens, _ in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        weights = torch.zeros(len(batch), longest)
        for row, (tokens, prompt) in enumerate(batch):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            weights[row, 1:prompt] = 0.1
            weights[row, prompt : len(tokens)] = 1.0
        return ids, weights

    def _encode(self) -> tuple[list[int], int]:
        """The tokens of one line, and the length of bos plus prompt."""
        prompt, answer = line(self.random)
        before = [1, *(self.ids[word] for word in prompt.split())]
        return [*before, *(self.ids[word] for word in answer.split()), 2], len(before)


@torch.no_grad()
def accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, rows: int = 200
) -> dict[str, float]:
    """Share of held-out lines per operation whose full answer is predicted, token by token (teacher forcing)."""
    model.eval()
    ids = {word[1:]: id for word, id in tokenizer.get_vocab().items() if word.startswith("▁")}
    device = model.device
    result = {}
    for name in OPERATIONS:
        random = Random(f"embedded base/held out/{seed}/{name}")
        right = 0
        for _ in range(rows):
            prompt, answer = operation_line(random, name)
            start = [1, *(ids[word] for word in prompt.split())]
            end = [*(ids[word] for word in answer.split()), 2]
            logits = model(torch.tensor([start + end], device=device)).logits[0]
            right += logits[len(start) - 1 : -1].argmax(-1).tolist() == end
        result[name] = right / rows
    model.train()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="optimizer steps; exclusive with --minutes")
    parser.add_argument("--minutes", type=float, help="stop after this time; the schedule follows the clock")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if (args.steps is None) == (args.minutes is None):
        parser.error("give either --steps or --minutes")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), args.width, args.layers).to(args.device)
    batches = Batches(tokenizer, args.seed, args.batch)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, weight_decay=0.05, betas=(0.9, 0.98)
    )
    started, step, recent = time.monotonic(), 0, 0.0
    while True:
        elapsed = time.monotonic() - started
        done = step / args.steps if args.steps else elapsed / (60.0 * args.minutes)
        if done >= 1.0:
            break
        rate = (
            args.learning_rate
            * min(1.0, (step + 1) / 200)
            * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids, weights = (tensor.to(args.device) for tensor in batches.draw())
        logits = model(ids, attention_mask=(ids != 0).long()).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        loss = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent = loss.item() if step == 0 else 0.99 * recent + 0.01 * loss.item()
        step += 1
        if step % 1000 == 0:
            scores = accuracy(model, tokenizer, args.seed, 50)
            said = " ".join(f"{name} {score:.2f}" for name, score in scores.items())
            print(f"{elapsed:6.0f} s  step {step:6d}  loss {recent:.4f}  {said}", flush=True)
            save(model, tokenizer, args, step, elapsed, recent, scores)
    save(
        model,
        tokenizer,
        args,
        step,
        time.monotonic() - started,
        recent,
        accuracy(model, tokenizer, args.seed),
    )


def save(model, tokenizer, args, step, seconds, loss, scores) -> None:  # type: ignore[no-untyped-def]
    args.output.mkdir(parents=True, exist_ok=True)
    model.generation_config.do_sample = False
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    record = {
        "command": " ".join(["python", *sys.argv]), "seed": args.seed, "steps": step, "lines": step * args.batch,
        "seconds": round(seconds), "loss": round(loss, 4), "accuracy": scores,
        "parameters": sum(p.numel() for p in model.parameters()),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {args.device}",
        "torch": torch.__version__, "transformers": transformers.__version__, "date": date.today().isoformat(),
    }  # fmt: skip
    (args.output / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
