#!/usr/bin/env python3
"""Makes tiny models that a real vLLM serves on a CPU, from nothing and without a download.

    VLLM_PYTHON scripts/tiny_models.py FOLDER [NAME...]

Runs in vLLM's environment (scripts/vllm_env.py). Each NAME becomes FOLDER/NAME: configuration, random weights (seeded,
strong enough that the output depends on what is in the KV cache) and a byte-level tokenizer with a chat template. A
folder that is already complete is left alone.

`llama` has full attention only; `gemma3` has three sliding-window layers (64 tokens) to one of full attention.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]

CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

_SHARED: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 8192,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "float32",
}

MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        **_SHARED,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 2,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    },
    "gemma3": {
        **_SHARED,
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "sliding_window": 64,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 32,
        "rope_local_base_freq": 10000.0,
        "tie_word_embeddings": True,
    },
}


def write_tokenizer(folder: Path) -> None:
    """One token per byte: any text works, and a length in tokens can be read off the text."""
    vocabulary = {token: number for number, token in enumerate(SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "model_max_length": 8192,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def write_weights(folder: Path) -> None:
    """Normal weights of deviation 2 / sqrt(fan in); the usual ones are so small that logits ignore the cache."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 1.0 if "embed" in name else 2.0 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder, safe_serialization=True)


def make(folder: Path, name: str) -> None:
    target = folder / name
    if target.exists():
        return
    work = folder / f".{name}.{os.getpid()}"
    work.mkdir(parents=True)
    try:
        configuration = json.dumps(MODELS[name], indent=1)
        (work / "config.json").write_text(configuration)
        write_weights(work)
        (work / "config.json").write_text(configuration)  # what we wrote, not what this transformers made of it
        write_tokenizer(work)
        work.rename(target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", default=list(MODELS), metavar="NAME", help=", ".join(MODELS))
    options = parser.parse_args()
    if unknown := set(options.names) - set(MODELS):
        raise SystemExit(f"no such model: {', '.join(sorted(unknown))}; known: {', '.join(MODELS)}")
    for name in options.names:
        make(options.folder, name)
        print(options.folder / name, file=sys.stderr)


if __name__ == "__main__":
    main()
