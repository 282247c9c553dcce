"""The pairs: from rows in the source to pairs in a split, and the data card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data.card import card_tables
from data.contracts import read_json
from pipeline import drift
from pipeline.artifacts import StageRecord

_STEPS = {
    "rows_in": "rows in the source", "rejected": "rejected", "duplicates": "duplicates",
    "unlabelled_left_out": "unlabelled, left out", "not_sampled": "not sampled", "beyond_limits": "beyond limits",
    "rows": "pairs", "rows_train": "… in train", "rows_valid": "… in valid", "rows_test": "… in test",
    "rows_pool": "… in pool",
}  # fmt: skip


def pairs_section(folder: Path, record: StageRecord) -> dict[str, Any]:
    """(step, count, share of the rows in the source) of each step, the tables of the data card, and the checks for drift."""
    card = read_json(folder / "card.json")
    steps = [(title, card[name], card[name] / max(1, card["rows_in"])) for name, title in _STEPS.items()]
    # The steps are its table of rows.
    tables = [table for table in card_tables(card) if table.title != "Rows"]
    return {"steps": steps, "tables": tables, "drift": drift.load(folder)}
