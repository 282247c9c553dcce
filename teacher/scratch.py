"""A small decoder made from the source itself: its tokenizer from the texts, its weights from the seed.

For machines where nothing can be downloaded. It knows nothing but what the warm start and AGPO teach it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow.dataset as pads
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data.contracts import PAIRS, RATIONALES, TEXTS, ContractError, read_table
from teacher.rationale import lexical_rationale
from teacher.verifier import ANSWER

# hidden size, layers, heads, feed-forward size, vocabulary
SIZES = {
    "tiny": (64, 2, 2, 128, 700),
    "small": (128, 3, 4, 384, 1500),
    "medium": (384, 8, 6, 1024, 4000),
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def make_decoder(pairs: Path, out: Path, size: str, seed: int) -> Path:
    """Write an untrained decoder of `size` (tiny, small, medium) with a byte-level BPE tokenizer into `out`.

    `pairs` is the folder that data-prepare wrote; the texts (never the grades) and the rationales of its split train make
    the vocabulary. Raises `ContractError` for an unknown size.
    """
    if size not in SIZES:
        raise ContractError(f"unknown size 'scratch:{size}'; choose one of {', '.join(SIZES)}")
    hidden, layers, heads, feed_forward, vocabulary = SIZES[size]
    tokenizer = train_tokenizer(_corpus(pairs), vocabulary)
    return write_decoder(
        tokenizer, out, seed, hidden=hidden, layers=layers, heads=heads, feed_forward=feed_forward, positions=1024
    )


def write_decoder(
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
    seed: int,
    *,
    hidden: int,
    layers: int,
    heads: int,
    feed_forward: int,
    positions: int,
) -> Path:
    """Write an untrained Llama of these sizes for `tokenizer`, and the tokenizer, into `out`; the seed fixes its weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def _corpus(pairs: Path) -> Iterator[str]:
    # Of split train only: a teacher must not change with the pool.
    columns = ["query", "ad_title", "ad_text"]
    table = read_table(pairs / "pairs", PAIRS, columns=columns, where=pads.field("split") == "train")
    for row in table.slice(0, 20_000).to_pylist():
        yield f"Query: {row['query']}\nAd: {row['ad_title']}\nText: {row['ad_text'] or ''}"
        yield lexical_rationale(row["query"], row["ad_title"])
    if (pairs / "rationales").exists():
        for reason in read_table(pairs / "rationales", RATIONALES)["reasoning"].to_pylist()[:20_000]:
            yield f"{reason} {ANSWER.format(grade=0)}"
    if (pairs / "texts").exists():
        yield from read_table(pairs / "texts", TEXTS)["text"].to_pylist()[:20_000]


def train_tokenizer(corpus: Iterator[str], vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    # One case: half the vocabulary, and a word is the same token in a query and at the head of a title.
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    # Digits stand alone, so that a grade is always one token.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[0-9]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        additional_special_tokens=SPECIAL[2:],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
