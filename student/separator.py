"""A token between query and ad, and one at the end, where the encoder's own tokenizer puts none.

A decoder's tokenizer, such as Qwen2's, writes the two texts one behind the other: "red" and "shoes" then read as one query
"redshoes" with no ad does, and a pair of empty texts is no token at all. The token is one that no text can contain, since
texts are encoded without special tokens (`student.scorer.load_tokenizer`). It is part of `tokenizer.json`, so that whoever
scores with the exported folder puts it where training did.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer
from tokenizers.processors import TemplateProcessing


def separate(tokenizer_json: Path, candidates: Sequence[str]) -> bool:
    """Let the tokenizer in this file put a token between the texts of a pair; False when no candidate is a token of it.

    A tokenizer that has one between them already stays as it is. Otherwise it is the first of `candidates`, and stands
    at the end of a pair, and of a text by itself, too; what the tokenizer has put before and behind them stays.
    """
    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    tokenizer.no_padding()
    word = _word(tokenizer)
    pair = tokenizer.encode(word, word)
    if not word or _apart(pair):
        return True
    token = next((each for each in candidates if tokenizer.token_to_id(each) is not None), None)
    if token is None:
        return False
    single = tokenizer.encode(word)
    pieces = {"between": [token]}
    pieces |= {"begin": _before(single), "end": _behind(single) or [token]}
    pieces |= {"begin_pair": _before(pair), "end_pair": _behind(pair) or [token]}
    tokenizer.post_processor = TemplateProcessing(
        single=[*_named(pieces, "begin"), "$A:0", "end:0"],
        pair=[*_named(pieces, "begin_pair"), "$A:0", "between:0", "$B:1", "end_pair:1"],
        special_tokens=[_special(tokenizer, name, tokens) for name, tokens in pieces.items() if tokens],
    )
    tokenizer.save(str(tokenizer_json))
    return True


def _word(tokenizer: Tokenizer) -> str:
    """A text of one token or more; empty when there is none."""
    texts = ("a", "1", *tokenizer.get_vocab())
    return next((text for text in texts if tokenizer.encode(text, add_special_tokens=False).ids), "")


def _apart(pair: Encoding) -> bool:
    """Whether a token that is of neither text stands before the second one."""
    return pair.sequence_ids[pair.sequence_ids.index(1) - 1] is None


def _before(encoding: Encoding) -> list[str]:
    return encoding.tokens[: encoding.sequence_ids.index(0)]


def _behind(encoding: Encoding) -> list[str]:
    length = next(i for i, text in enumerate(reversed(encoding.sequence_ids)) if text is not None)
    return encoding.tokens[len(encoding.tokens) - length :]


def _named(pieces: dict[str, list[str]], name: str) -> list[str]:
    return [f"{name}:0"] if pieces[name] else []


def _special(tokenizer: Tokenizer, name: str, tokens: list[str]) -> dict[str, Any]:
    return {"id": name, "ids": [tokenizer.token_to_id(token) for token in tokens], "tokens": tokens}
