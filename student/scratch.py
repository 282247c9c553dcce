"""A small encoder made from the source itself: its tokenizer from the texts, its weights from the seed.

For machines where nothing can be downloaded. Before it sees a label it learns from unlabelled text: masked words of
query and ad together (BERT, arXiv 1810.04805), and, as no layer of random weights compares words, which words of
one side stand on the other too, and which share of a made-up query's words the ad holds (in the spirit of the inverse
cloze task, arXiv 1906.00300). Texts of splits valid
and test are not read.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.dataset as pads
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import BertConfig, BertModel, BertTokenizer

from data.contracts import PAIRS, ContractError, log_progress, read_table
from student.dataset import tokenize
from student.model import quiet_transformers
from student.scorer import ad_text, load_tokenizer, query_text

logger = logging.getLogger(__name__)

# hidden size, layers, heads, feed-forward size, vocabulary, steps on unlabelled text
SIZES = {
    "tiny": (32, 2, 2, 64, 800, 0),
    "small": (128, 3, 4, 256, 4000, 300),
    "medium": (256, 6, 8, 1024, 8000, 1000),
}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
MAX_ROWS = 50_000
MAX_LENGTH = 64


def make_encoder(pairs: Path, out: Path, size: str, seed: int, *, steps: int | None = None) -> Path:
    """Write a BERT encoder of `size` (tiny, small, medium) with a WordPiece tokenizer into `out`; returns `out`.

    `pairs` is the folder that data-prepare wrote; only texts of splits train and pool are read, never a grade. `steps`
    overrides the steps on unlabelled text (0: random weights). Raises `ContractError` for an unknown size or no text.
    """
    if size not in SIZES:
        raise ContractError(f"unknown size 'scratch:{size}'; choose one of {', '.join(SIZES)}")
    hidden, layers, heads, feed_forward, vocabulary, default_steps = SIZES[size]
    queries, ads = _texts(pairs)
    vocab = train_wordpiece([*dict.fromkeys(queries), *dict.fromkeys(ads)], vocabulary)
    out.mkdir(parents=True, exist_ok=True)
    BertTokenizer(vocab=vocab, model_max_length=512).save_pretrained(out)
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=feed_forward,
        max_position_embeddings=512,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertModel(config)
        _look_for_equals(model)
        steps = default_steps if steps is None else steps
        if steps:
            _learn_from_text(model, load_tokenizer(out / "tokenizer.json", MAX_LENGTH), queries, ads, steps, seed)
    with quiet_transformers():
        model.save_pretrained(out)
    return out


def train_wordpiece(texts: list[str], size: int) -> dict[str, int]:
    """A WordPiece vocabulary (piece → id) of at most `size` pieces, special tokens first; the same for the same texts.

    The trainer numbers the pieces "##x" in the order of a hash map and breaks ties by number, so that two runs give two
    vocabularies; naming those pieces beforehand, and leaving rare characters out ourselves, makes it repeatable.
    """
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = [word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))]
    counts = Counter(character for word in words for character in word)
    alphabet = sorted(sorted(counts, key=lambda c: (-counts[c], c))[: size // 4])
    known = set(alphabet)
    named = [*SPECIAL, *(f"##{character}" for character in alphabet)]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=named, initial_alphabet=alphabet, min_frequency=2, show_progress=False
    )
    tokenizer.train_from_iterator(("".join(c for c in word if c in known) for word in words), trainer)
    return tokenizer.get_vocab()


def _texts(pairs: Path) -> tuple[list[str], list[str]]:
    columns = ["query", "ad_title", "ad_text", "attributes"]
    table = read_table(pairs / "pairs", PAIRS, columns=columns, where=pads.field("split").isin(["train", "pool"]))
    rows = table.slice(0, MAX_ROWS).to_pylist()
    if not rows:
        raise ContractError(f"{pairs} has no rows in splits train and pool to make an encoder from; add rows to them")
    queries = [query_text(row["query"]) for row in rows]
    return queries, [ad_text(row["ad_title"], row["ad_text"], row["attributes"]) for row in rows]


def _look_for_equals(model: BertModel) -> None:
    """Let every token attend to its like at the start: keys equal queries, in the spirit of arXiv 2305.09828.

    Without it and the labels for single words below, some seeds do not learn to compare words within the steps given.
    """
    with torch.no_grad():
        for layer in model.encoder.layer:
            attention = layer.attention.self
            attention.query.weight.mul_(2.0)
            attention.key.weight.copy_(attention.query.weight)


def on_other_side(ids: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
    """For each token (B, L) of ids and segment (B, L): 1.0 if the same token is in the row's other segment."""
    same = ids.unsqueeze(2) == ids.unsqueeze(1)
    other = segment.unsqueeze(2) != segment.unsqueeze(1)
    return (same & other).any(dim=2).float()


def _learn_from_text(
    model: BertModel, tokenizer: Tokenizer, queries: list[str], ads: list[str], steps: int, seed: int
) -> None:
    """Train `model` in place for `steps` batches, half of real pairs and half of made-up queries with an ad."""
    rng = np.random.default_rng(seed)
    hidden, size = model.config.hidden_size, model.config.vocab_size
    words = torch.nn.Linear(hidden, hidden)
    bias = torch.nn.Parameter(torch.zeros(size))
    match, found = torch.nn.Linear(hidden, 1), torch.nn.Linear(hidden, 1)
    parameters = [*model.parameters(), *words.parameters(), bias, *match.parameters(), *found.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / (0.1 * steps + 1), max(0.0, (steps - step) / (0.9 * steps)))
    )
    mask_id = tokenizer.token_to_id("[MASK]")
    model.train()
    shown, total = max(1, steps // 5), 0.0
    source = _pair_batches(tokenizer, queries, ads, rng)
    for step in range(steps):
        tokens, share = next(source)
        batch = {name: torch.from_numpy(array) for name, array in tokens.items()}
        ids = batch["input_ids"]
        chosen = (torch.rand(ids.shape) < 0.15) & (ids >= len(SPECIAL))
        masked = torch.where(chosen & (torch.rand(ids.shape) < 0.9), mask_id, ids)
        output = model(**{**batch, "input_ids": masked})
        guess = torch.nn.functional.gelu(words(output.last_hidden_state[chosen]))
        logits = guess @ model.embeddings.word_embeddings.weight.T + bias
        guessing = cross_entropy(logits, ids[chosen]) if chosen.any() else logits.sum()
        seen = masked >= len(SPECIAL)
        there = on_other_side(masked, batch["token_type_ids"])
        finding = binary_cross_entropy_with_logits(found(output.last_hidden_state).squeeze(2)[seen], there[seen])
        made_up = ~torch.isnan(share)
        score = match(output.pooler_output).squeeze(1)[made_up]
        loss = 0.3 * guessing + 3 * finding + binary_cross_entropy_with_logits(score, share[made_up])
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        total += float(loss.detach())
        if (step + 1) % shown == 0:
            message = "encoder from scratch: step %d of %d, loss %.3f"
            log_progress(logger, step + 1, steps, message, step + 1, steps, total / shown)
            total = 0.0
    model.eval()


def _pair_batches(
    tokenizer: Tokenizer, queries: list[str], ads: list[str], rng: np.random.Generator, size: int = 48
) -> Iterator[tuple[dict[str, np.ndarray], torch.Tensor]]:
    """Endless batches: inputs (size, length); the share (size,) of the query's words in the ad, NaN for real pairs."""
    ad_words = [ad.split() for ad in ads]
    while True:
        rows = rng.integers(len(ads), size=size)
        half = size // 2
        texts, share = [queries[i] for i in rows[:half]], np.full(size, np.nan, dtype=np.float32)
        for place, i in enumerate(rows[half:], start=half):
            other = ad_words[int(rng.integers(len(ads)))]
            text, share[place] = _made_up_query(ad_words[i], other, rng)
            texts.append(text)
        tokens = tokenize(tokenizer, texts, [ads[i] for i in rows], pad_id=0)
        yield tokens.batch(range(size)), torch.from_numpy(share)


def _made_up_query(own: list[str], other: list[str], rng: np.random.Generator) -> tuple[str, float]:
    """A query of up to five words, some of this ad and some of another, and the share that is of this ad."""
    n = int(rng.integers(1, 6))
    from_own = rng.random(n) < rng.random()
    words = []
    for mine in from_own:
        bag = own if mine else other
        word = bag[int(rng.integers(len(bag)))] if bag else ""
        if len(word) > 4 and rng.random() < 0.1:  # a slip of the finger
            at = int(rng.integers(1, len(word)))
            word = word[:at] + word[at + 1 :]
        words.append(word)
    held = set(own)
    share = [bool(mine) or word in held for mine, word in zip(from_own, words, strict=True)]
    return " ".join(words), float(np.mean(share))
