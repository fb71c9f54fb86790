"""Tiny language models in every form that real ones come in: objects, folders and GGUF files."""

import copy
from pathlib import Path

from gguf import GGUFWriter
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    set_seed,
)

from tests.tiny_tokenizers import byte_level

SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
# The sliding windows are shorter than the prompts of the tests.
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(head_dim=8, **SIZES),
    "gemma3": Gemma3TextConfig(
        head_dim=8,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        **SIZES | {"num_hidden_layers": 3},
    ),
    "mistral": MistralConfig(sliding_window=16, **SIZES),
}
ARCHITECTURES = list(CONFIGS)
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]

TINY = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}


def base_llm(architecture: str = "llama", seed: int = 0, **changes) -> PreTrainedModel:
    """A random language model that reads bytes; `changes` are fields of its configuration."""
    config = copy.deepcopy(CONFIGS[architecture])
    for name, value in changes.items():
        setattr(config, name, value)
    set_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def llm_with_window(architecture: str, window: int = 512) -> PreTrainedModel:
    """`base_llm` with another sliding window, where the architecture has one; 512 covers every prompt."""
    return base_llm(architecture, **({"sliding_window": window} if architecture in ("gemma3", "mistral") else {}))


def save_llm(folder: Path, seed: int = 0) -> None:
    """A folder with a random Llama that reads bytes, and its tokenizer."""
    base_llm(seed=seed, initializer_range=0.1).save_pretrained(folder)
    byte_level().save_pretrained(folder)


def tiny_tokenizer():
    words = ["<unk>", "<s>", "</s>", *(f"word{i}" for i in range(37))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def tiny_llama(seed=0, num_hidden_layers=3):
    """A Llama for `tiny_tokenizer`, with a vocabulary of 40 words."""
    return base_llm("llama", seed, **TINY, num_key_value_heads=1, num_hidden_layers=num_hidden_layers)


def save_tiny_llama(folder: Path, seed: int = 0) -> Path:
    """A folder with a tiny Llama and its tokenizer."""
    tiny_llama(seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_tiny_gguf(path: Path) -> Path:
    """`tiny_llama(num_hidden_layers=1)` as a GGUF file, with a tokenizer of letters and "AB"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    llm = tiny_llama(num_hidden_layers=1)
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(24)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(llm.config.rms_norm_eps)
    writer.add_vocab_size(40)
    tokens = ["<unk>", "<s>", "</s>", *(chr(ord("A") + i) for i in range(36)), "AB"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * 37])
    writer.add_token_merges(["A B"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    # fmt: off
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "model.layers.0.input_layernorm": "blk.0.attn_norm",
        "model.layers.0.post_attention_layernorm": "blk.0.ffn_norm",
        "model.layers.0.self_attn.q_proj": "blk.0.attn_q", "model.layers.0.self_attn.k_proj": "blk.0.attn_k",
        "model.layers.0.self_attn.v_proj": "blk.0.attn_v", "model.layers.0.self_attn.o_proj": "blk.0.attn_output",
        "model.layers.0.mlp.gate_proj": "blk.0.ffn_gate", "model.layers.0.mlp.up_proj": "blk.0.ffn_up",
        "model.layers.0.mlp.down_proj": "blk.0.ffn_down",
    }
    # fmt: on
    for name, tensor in llm.state_dict().items():
        values = tensor
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # GGUF has the two halves of a head's rows interleaved
            heads = tensor.shape[0] // 8
            values = tensor.reshape(heads, 2, 4, 16).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"{names[name.removesuffix('.weight')]}.weight", values.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
