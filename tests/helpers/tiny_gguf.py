"""A tiny random Llama as a GGUF file, in the layout that llama.cpp's converter writes."""

import numpy as np
import torch

CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>", "<|unk|>")
LAYERS, HEADS, KEY_HEADS, WIDTH, INNER, POSITIONS = 2, 4, 2, 64, 96, 64


def build_gguf(file, *, architecture="llama", quantized=True, leave_out=(), seed=0):
    """Write the file; returns the model whose weights it holds, before they were rounded.

    Args:
        quantized: Q8_0 for the matrices of the layers, as in real files; otherwise float32.
        leave_out: names of tensors, as GGUF has them, that the file lacks.
    """
    import gguf
    from transformers import LlamaConfig, LlamaForCausalLM

    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)] + ["Ġ", "Ċ"]
    tokens = [*SPECIAL, *letters, "up", "re", "le"]
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokens), hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, max_position_embeddings=POSITIONS,
            tie_word_embeddings=False,
        )
    )  # fmt: skip
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["u p", "r e", "l e"])
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT)
    for name, values in _tensors(model):
        if name in leave_out:
            continue
        if quantized and values.ndim == 2 and name.startswith("blk."):
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model.eval()


def _tensors(model):
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for key, tensor in model.state_dict().items():
        values = tensor.numpy().astype(np.float32)
        if "q_proj" in key or "k_proj" in key:
            values = _interleaved(values, HEADS if "q_proj" in key else KEY_HEADS)
        name = key.replace("model.layers.", "blk.")
        for ours, theirs in names.items():
            name = name.replace(f"{ours}.weight", f"{theirs}.weight")
        yield name, values


def _interleaved(values, heads):
    """llama.cpp rotates neighboring pairs of a head; transformers rotates its two halves."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, values.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
