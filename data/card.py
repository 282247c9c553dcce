"""The data card: what is in a prepared table, for people (`card.md`, the report) and for programs (`card.json`)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.contracts import SPLITS, write_json, write_text

_ESCAPES = {"<": "&lt;", "&": "&amp;"}


@dataclass(frozen=True)
class CardTable:
    """One table of the card. Cells are text or numbers; the first column names the row."""

    title: str
    note: str
    header: tuple[str, ...]
    rows: list[tuple[Any, ...]]


def write_card(out: Path, card: dict[str, Any]) -> None:
    """Write `card.json` and `card.md`."""
    write_json(out / "card.json", card)
    write_text(out / "card.md", card_markdown(card))


def card_markdown(card: dict[str, Any]) -> str:
    """The card as Markdown. Names of sources, grades and reasons are escaped; texts of ads and queries are not in it."""
    lines = [f"# Data card: {_plain(card['source'])}", "", f"Licence: {_plain(card['licence'])}. Fingerprint "
             f"`{card['fingerprint']}`, seed {card['seed']}, split by {_plain(card['split_by'])}.", ""]  # fmt: skip
    for table in card_tables(card):
        lines += [f"## {table.title}", ""]
        if table.note:
            lines += [_plain(table.note), ""]
        lines.append("| " + " | ".join(map(_plain, table.header)) + " |")
        lines.append("|---" + "|---:" * (len(table.header) - 1) + "|")
        lines += ["| " + " | ".join(map(_plain, row)) + " |" for row in table.rows]
        lines.append("")
    return "\n".join(lines)


def card_tables(card: dict[str, Any]) -> list[CardTable]:
    """The tables of a card; those without rows, or of which an older card holds nothing, are left out."""
    tables = [make(card) for make, needs in _TABLES if all(name in card for name in needs)]
    return [table for table in tables if table.rows]


def _warnings(card: dict[str, Any]) -> CardTable:
    return CardTable("Warnings", "", ("What to change before training",), [(text,) for text in card["warnings"]])


def _counts(card: dict[str, Any]) -> CardTable:
    steps = ("rows_in", "rejected", "duplicates", "unlabelled_left_out", "not_sampled", "beyond_limits", "rows")
    rows = [(name.replace("_", " "), card[name], f"{100 * card[name] / card['rows_in']:.2f} %") for name in steps]
    return CardTable(
        "Rows", "Every row that came in is in one of the lines below the first.", ("", "rows", "share"), rows
    )


def _reasons(card: dict[str, Any]) -> CardTable:
    counted = sorted(card["rejected_by_reason"].items(), key=lambda item: (-item[1], item[0]))
    return CardTable("Kept aside", "Faulty rows, in rejected/.", ("reason", "rows"), counted)


def _grades(card: dict[str, Any]) -> CardTable:
    by_split = {split: counts for split, counts in card["grades_by_split"].items() if counts}
    names = sorted({name for counts in by_split.values() for name in counts}, key=lambda name: (name == "none", name))
    rows = []
    for split, counts in by_split.items():
        total = sum(counts.values())
        shares = [_share_of(counts.get(name, 0), total) for name in names]
        rows.append((split, card.get(f"queries_{split}", ""), total, *shares))
    note = f"From ratings to grades: {card['grading']}." if "grading" in card else ""
    return CardTable("Grades by split", note, ("split", "queries", "pairs", *names), rows)


def _balance(card: dict[str, Any]) -> CardTable:
    rows = [(split, f"{row['difference']:.4f}", f"{row['deviations']:.1f}") for split, row in card["balance"].items()]
    note = (
        "Largest difference between a grade's share in the split and in all labelled pairs. Splits go by a hash of the "
        "query alone; in standard deviations of such a split, up to 3 is chance; above 5, see the warnings."
    )
    return CardTable("Balance of the grades", note, ("split", "difference", "standard deviations"), rows)


def _labels(card: dict[str, Any]) -> CardTable:
    labels = card["labels"]
    rows = [
        ("rows merged into another of the same pair", card["duplicates"]),
        ("pairs with several labels", labels["several"]),
        ("… of which their grades differ", labels["conflicting"]),
        ("… by more than one grade", labels["far_apart"]),
    ]
    note = "A pair gets the lower median of its labels; their variance is kept in disagreement/."
    return CardTable("Duplicates and conflicts", note, ("", "count"), rows)


def _leakage(card: dict[str, Any]) -> CardTable:
    rows = [
        (name, leaks["distinct"], leaks["in_several_splits"],
         *[_share_of(leaks["also_in_train"][split], leaks["pairs"][split]) for split in SPLITS[1:]])
        for name, leaks in card["leakage"].items()
    ]  # fmt: skip
    note = "Near-duplicates differ in case, spacing, punctuation, word order or plural only. On the right: pairs of a split "
    header = ("", "distinct", "in several splits", *[f"{split} pairs also in train" for split in SPLITS[1:]])
    return CardTable("Leakage between splits", note + "whose query or ad is in train, too.", header, rows)


def _lengths(card: dict[str, Any]) -> CardTable:
    keys = ("n", "mean", "median", "p95", "max")
    rows = [
        (name, *[f"{row[key]:g}" if key != "n" else row[key] for key in keys]) for name, row in card["lengths"].items()
    ]
    return CardTable("Lengths in characters", "", ("", "pairs", *keys[1:]), rows)


def _languages(card: dict[str, Any]) -> CardTable:
    counts = card["languages"]
    shown = list(counts.items())[:8]
    rest = sum(counts.values()) - sum(n for _, n in shown)
    rows = [(name, n, f"{100 * n / sum(counts.values()):.1f} %") for name, n in [*shown, ("other", rest)] if n]
    note = f"Guessed from title and text of {sum(counts.values())} pairs; a guess from a short title often misses."
    return CardTable("Languages of the ads", note, ("language", "pairs", "share"), rows)


def _strata(card: dict[str, Any]) -> CardTable:
    rows = [(name, *[counts[k] for k in ("queries", "pairs", "taken")]) for name, counts in card["strata"].items()]
    note = "Pairs of the log whose queries fall to the pool, by how often their query was seen."
    return CardTable("Log", note, ("stratum", "queries", "pairs", "taken"), rows)


def _share_of(count: int, total: int) -> str:
    return f"{count:,} ({100 * count / total:.1f} %)" if total else "0"


def _plain(value: Any) -> str:
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return " ".join(re.sub(r"[\\|*_\[<&]", lambda match: _ESCAPES.get(match[0], "\\" + match[0]), text).split())


_TABLES = (
    (_warnings, ("warnings",)),
    (_counts, ("not_sampled",)),
    (_reasons, ("rejected_by_reason",)),
    (_grades, ("grades_by_split",)),
    (_balance, ("balance",)),
    (_labels, ("labels", "duplicates")),
    (_leakage, ("leakage",)),
    (_lengths, ("lengths",)),
    (_languages, ("languages",)),
    (_strata, ("strata",)),
)
