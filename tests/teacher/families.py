"""Tiny random models of the families that users bring, each with the essential lines of its own chat template."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

_CHATML = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
_ALTERNATES = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """`ends` are the end tokens: the tokenizer's own first, the others are named by the generation config alone."""

    model_type: str
    template: str | None
    special: tuple[str, ...]
    ends: tuple[str, ...]
    bos: str | None = None
    adds_bos: bool = False
    sizes: dict[str, Any] = field(default_factory=dict)


FAMILIES = {
    "gemma-2": Family(
        "gemma2",
        "{{ bos_token }}" + _ALTERNATES + "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
        "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ("<start_of_turn>",),
        ("<eos>", "<end_of_turn>"),
        bos="<bos>",
        adds_bos=True,
        sizes={"hidden_size": 32, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64},
    ),
    "mistral": Family(
        "mistral",
        "{{ bos_token }}" + _ALTERNATES + "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}",
        (),
        ("</s>",),
        bos="<s>",
        adds_bos=True,
    ),
    "phi-3": Family(
        "phi3",
        # The first release drops a system message without a word.
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
        "<|user|>\n{{ m['content'] }}<|end|>\n<|assistant|>\n"
        "{% elif m['role'] == 'assistant' %}{{ m['content'] }}<|end|>\n{% endif %}{% endfor %}",
        ("<|user|>", "<|assistant|>"),
        ("<|endoftext|>", "<|end|>"),
        bos="<s>",
        adds_bos=True,
        sizes={"original_max_position_embeddings": 1024},
    ),
    "llama-3": Family(
        "llama",
        "{{ bos_token }}{% if not date_string is defined %}{% if strftime_now is defined %}"
        "{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = '26 Jul 2024' %}"
        "{% endif %}{% endif %}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
        "<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ date_string }}\n\n{{ system }}<|eot_id|>"
        "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>"),
        ("<|eot_id|>", "<|end_of_text|>"),
        bos="<|begin_of_text|>",
        adds_bos=True,
    ),
    "qwen3": Family(
        "qwen3",
        "{% for m in messages %}" + _CHATML + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
        ("<|im_start|>",),
        ("<|im_end|>", "<|endoftext|>"),
        sizes={"head_dim": 32},
    ),
    "smollm3": Family(
        "smollm3",
        "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
        "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
        "<|im_start|>system\nToday Date: {{ strftime_now('%d %B %Y') }}\n"
        "Reasoning Mode: {{ '/think' if enable_thinking else '/no_think' }}\n{{ system }}<|im_end|>\n"
        "{% for m in messages %}{% if m['role'] != 'system' %}" + _CHATML + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if not enable_thinking %}<think>\n\n</think>\n{% endif %}{% endif %}",
        ("<|im_start|>",),
        ("<|im_end|>",),
        sizes={"no_rope_layers": [1, 0]},
    ),
    "gpt-2": Family("gpt2", None, (), ("<|endoftext|>",), bos="<|endoftext|>"),
    "opt": Family(
        "opt", None, (), ("</s>",), bos="</s>", adds_bos=True, sizes={"word_embed_proj_dim": 32, "ffn_dim": 64}
    ),
}


def make_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """A tokenizer over single bytes with the family's special tokens."""
    special = list(dict.fromkeys(["<pad>", *family.ends, *([family.bos] if family.bos else []), *family.special]))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate([*special, *letters])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    if family.adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, core.token_to_id(family.bos))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token=family.ends[0], bos_token=family.bos, padding_side="left"
    )
    tokenizer.chat_template = family.template
    return tokenizer


def make_family(family: str | Family, folder: Path, **changed: Any) -> Path:
    """A folder with a random model of the family, of sizes that may be changed, and its tokenizer."""
    family = FAMILIES[family] if isinstance(family, str) else family
    tokenizer = make_tokenizer(family)
    ends = tokenizer.convert_tokens_to_ids(list(family.ends))
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.3,  # or all tokens would be about as likely, and greedy choices a matter of rounding
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends[0],
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family.model_type, **sizes | family.sizes | changed))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": ends}))
    return folder
