"""Batches without padding: pairs stand one behind the other in rows, and none sees another.

A pair of a random batch has half the longest pair's length, so padding it costs as much again as reading it. Here several
pairs share a row: attention is block-diagonal, positions begin anew with each pair, and the classifier reads each pair's
first token. Narrow rows waste little attention; measured, 64 tokens are best (docs/results.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from student.dataset import Tokens

Array = np.ndarray
ROW_TOKENS = 64


@dataclass(frozen=True)
class Packed:
    """B pairs in R rows of width W: model inputs int64 (R, W); `pair` (R, W) numbers the pairs of a row, −1 at its end.

    `row` (B,) and `slot` (B,) say which pair of which row each one is, `start` (R, P) where the pairs of a row begin.
    """

    input_ids: Array
    token_type_ids: Array
    position_ids: Array
    pair: Array
    row: Array
    slot: Array
    start: Array


def first_fit(lengths: Sequence[int] | Array, width: int) -> list[list[int]]:
    """Rows of at most `width` tokens: each pair, longest first, in the first row with room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in np.argsort(-np.asarray(lengths), kind="stable"):
        row = next((r for r, free in enumerate(room) if free >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(width)
        rows[row].append(int(i))
        room[row] -= int(lengths[i])
    return rows


def pack(tokens: Tokens, pairs: Array, width: int = ROW_TOKENS, first_position: int = 0) -> Packed:
    """Lay out these pairs (row numbers of `tokens`) in rows of `width`, or of the longest pair's where that is longer."""
    lengths = np.array([len(tokens.ids[i]) for i in pairs])
    rows = first_fit(lengths, max(width, int(lengths.max())))
    shape = len(rows), max(int(lengths[row].sum()) for row in rows)
    ids, types, positions = np.full(shape, tokens.pad_id), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    pair = np.full(shape, -1)
    row_of, slot_of = np.zeros(len(pairs), np.int64), np.zeros(len(pairs), np.int64)
    start = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for r, row in enumerate(rows):
        end = 0
        for slot, i in enumerate(row):
            begin, end = end, end + int(lengths[i])
            ids[r, begin:end], types[r, begin:end] = tokens.ids[pairs[i]], tokens.type_ids[pairs[i]]
            positions[r, begin:end] = np.arange(first_position, first_position + end - begin)
            pair[r, begin:end] = slot
            row_of[i], slot_of[i], start[r, slot] = r, slot, begin
    return Packed(ids, types, positions, pair, row_of, slot_of, start)
