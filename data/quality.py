"""What a prepared table lacks for the stages after it: faults that doom them, and warnings, each with its remedy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from data.contracts import GradeScale

if TYPE_CHECKING:
    from data.config import DataConfig

TEXT_SIGNS = {
    "c1_controls": (
        "[\x80-\x9f]",
        "control characters U+0080–U+009F: for windows-1252 read as latin-1 set `data.encoding`",
    ),
    "mojibake": (
        "Ã[\x80-\xbf]|Â[\xa0-\xbf]|â€",
        "letters such as Ã©: for UTF-8 read as something else set `data.encoding`",
    ),
    "backslash_quotes": (r'\\"', 'quotes after a backslash (\\"): write a quote inside a field as two quotes'),
    "html": (
        r"&(amp|lt|gt|quot|nbsp|#\d+);|</?(b|br|p|li|ul|strong|div|span)\b[^<]*>",
        "HTML: set `data.html` to true",
    ),
}
"""Signs in the texts of a pair that something went wrong before: name → (regular expression, what it is and what to do)."""

_FEW = 10
_BEYOND_CHANCE = 5  # standard deviations


def split_fault(counts: dict[str, dict[str, int]], config: DataConfig, scale: GradeScale) -> str:
    """Why no teacher and no student can come of these splits, with the remedy; empty when they can.

    `counts` are those of `split_counts`. A split whose share is 0 is left out on purpose.
    """
    faults = []
    for split in ("train", "valid", "test"):
        relevant, others = _classes(counts.get(split, {}), scale)
        if getattr(config.shares, split) and not (relevant + others if split == "train" else relevant and others):
            faults.append(f"split {split} has {relevant} relevant and {others} other labelled pairs")
    if not faults:
        return ""
    remedy = "label pairs of more queries, change `data.shares` or `data.relevant_from`, or try another `data.seed`"
    if config.source_name == "table" and "grade" not in config.columns:
        remedy = "name the column of the labels as `grade` in `data.columns`"
    return (
        f"{' and '.join(faults)}, but later stages need labels in train, and both kinds in valid and test (relevant is "
        f"grade {scale.relevant_from}, '{scale.grades[scale.relevant_from].name}', and above): {remedy}"
    )


def split_warnings(
    counts: dict[str, dict[str, int]], balance: dict[str, dict[str, float]], config: DataConfig, scale: GradeScale
) -> list[str]:
    """A sentence for each split that spoils results; `counts` and `balance` are those of `data.balance`."""
    texts = []
    for split in ("valid", "test"):
        relevant, others = _classes(counts.get(split, {}), scale)
        if not getattr(config.shares, split):
            texts.append(
                f"`data.shares.{split}` is 0, and neither teacher nor student can be trained without split {split}."
            )
        elif min(relevant, others) < _FEW:
            texts.append(
                f"Split {split} has {relevant} relevant and {others} other labelled pairs: what is measured on so few is "
                f"mostly chance. Label pairs of more queries, or raise `data.shares.{split}`."
            )
    for split, row in balance.items():
        if row["deviations"] > _BEYOND_CHANCE:
            texts.append(
                f"The grades of split {split} are {row['deviations']:.1f} standard deviations from those of all pairs, more "
                f"than chance: some of its {counts[split]['groups']} labelled queries have very many pairs. Label pairs of "
                "more queries, thin out the large ones, or try another `data.seed`."
            )
    return texts


def text_warnings(counts: dict[str, Any], config: DataConfig) -> list[str]:
    """A sentence for each sign in the texts; `counts` are the pairs that show it."""
    shown = {name: n for name, n in counts.items() if n and (name != "html" or config.source_name == "table")}
    return [f"{n:,} pairs hold {TEXT_SIGNS[name][1]}." for name, n in shown.items()]


def _classes(counts: dict[str, int], scale: GradeScale) -> tuple[int, int]:
    """Relevant and other labelled pairs of a split."""
    by_grade = [counts.get(f"n{k}", 0) for k in range(scale.size)]
    return sum(by_grade[scale.relevant_from :]), sum(by_grade[: scale.relevant_from])
