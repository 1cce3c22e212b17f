"""Tiny random models of several architectures with a character tokenizer, and generated rows."""

import string

import torch

CHARACTERS = string.ascii_letters + string.digits + " .,:#?()\n"
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "[CLS]", "[SEP]"]


def make_tokenizer(encoder: bool = False):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    start, end = ("[CLS]", "[SEP]") if encoder else ("<s>", None)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}" if end else f"{start} $A",
        special_tokens=[(token, vocabulary[token]) for token in (start, end) if token],
    )
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    if encoder:
        tokens |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)


def make_model(architecture: str, **options):
    """A float32 model of a few thousand parameters whose outputs vary from token to token."""
    import transformers

    ids = {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "vocab_size": len(SPECIAL) + len(CHARACTERS),
    }
    torch.manual_seed(7)
    if architecture == "gpt2":  # learned absolute positions, a fused qkv Conv1D
        config = transformers.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, n_positions=96, initializer_range=0.3, **ids
        )
        return transformers.GPT2LMHeadModel(config).eval()
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 96, "initializer_range": 0.3,
        **({} if architecture == "llama" else {"num_labels": 5}), **ids, **options,
    }  # fmt: skip
    if architecture == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=2, **sizes)).eval()
    if architecture == "llama-classifier":
        return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**sizes)).eval()
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)).eval()


def rows(count: int, start: int = 0) -> list[dict[str, str]]:
    """Parity as a task: the answer of odd numbers is 1, of even ones 23, and the output is a sentence around it."""
    answers = ["23" if i % 2 == 0 else "1" for i in range(start, start + count)]
    return [
        {
            "instruction": "add" + " please" * (i % 4),
            "input": str(i),
            "output": f"so {answer}",
            "answer": answer,
        }
        for i, answer in enumerate(answers, start)
    ]
