"""Whether new pairs are like those that the teacher and the student learned from: fine, look, or stop.

Each measure is a population stability index, PSI = Σ (new − old) · ln(new / old) over the shares of its bins, so that one
pair of limits serves all; 0.1 and 0.25 are the usual ones. By chance alone it is (1 / n_old + 1 / n_new) · χ² with one
degree of freedom less than bins (Yurdakul 2018): that is taken off, so that small batches raise no alarm.

What is compared: the common words of queries and of ads, words that were never seen (against how many to expect, by Good and
Turing), query lengths, scripts of queries; and, once a batch was annotated before, the teacher's grades, the student's
scores, and how often the two disagree on a shadow sample. What was left out: languages that share a script; their words
give them away.
"""

from __future__ import annotations

import logging
import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
from pydantic import BaseModel, Field

from data.contracts import ANNOTATIONS, PAIRS, Config, read_json, write_json
from data.contracts import words as words_of
from pipeline.annotated import of_the_split

logger = logging.getLogger(__name__)
Level = Literal["fine", "look", "stop"]
FILE = "_drift.json"  # so that a folder of Parquet files is read without it
PROFILE = "profile.json"  # in a teacher's folder
SAMPLE = 100_000  # pairs that are read on each side
COMMON = 200  # words that are compared one by one
EXPECTED = 2  # how often a word has to be expected on the smaller side
_LONGEST = 8  # words of a query, and more


class DriftConfig(Config):
    """When new pairs differ too much from those that the models learned from. Limits are of a population stability index."""

    look: float = Field(default=0.1, gt=0)
    """From here on, a person should look: an event in Prefect and a mark in the report."""

    stop: float = Field(default=0.25, gt=0)
    """From here on, a student that learned from the new pairs does not become champion."""

    min_queries: int = Field(default=200, ge=1)
    """New pairs with fewer queries are not judged until later ones have joined them, nor any against a model that learned
    from fewer."""

    shadow: int = Field(default=500, ge=0)
    """New pairs, and as many old ones, that the exported student scores to be compared with the teacher; 0 leaves it out."""


class Measure(BaseModel):
    """One comparison: what the new pairs were expected to have and have, in words, and the index."""

    name: str
    expected: str
    found: str
    psi: float


class Check(BaseModel):
    """What was found of one batch of new pairs, compared with what the `teacher` or the `student` learned from."""

    against: Literal["teacher", "student"]
    at: datetime
    annotation_key: str = ""
    pairs: int
    queries: int
    known: int = 0
    """Queries that it learned from (0: not recorded)."""
    measures: list[Measure]
    """Empty where it learned from too few queries to judge by them."""

    def level(self, limits: DriftConfig) -> Level:
        """The verdict of the worst measure."""
        worst = self.worst.psi
        return "stop" if worst >= limits.stop else "look" if worst >= limits.look else "fine"

    @property
    def worst(self) -> Measure:
        """The measure with the highest index."""
        return max(self.measures, key=lambda measure: measure.psi)

    def sentence(self) -> str:
        """The worst measure in words."""
        worst = self.worst
        return f"{worst.name} {worst.found}, by the {self.against}'s pairs {worst.expected} (PSI {worst.psi:.2f})"


class Profile(BaseModel):
    """What is remembered of the queries (and the ads of each) that a model learned from."""

    queries: int
    lengths: dict[str, int]
    scripts: dict[str, int]
    words: dict[str, dict[str, int]]
    """For `query` and `ad`: in how many queries (in the ads of how many) each word is."""


Texts = Mapping[str, tuple[str, list[str]]]
"""By query_id: the query, and the titles of its ads."""


def read_texts(pairs: Path, where: pads.Expression) -> Texts:
    """The queries and ads of a sample of the pairs for which `where` holds."""
    texts: dict[str, tuple[str, list[str]]] = {}
    for row in _sample(pairs / "pairs", ["query_id", "query", "ad_title"], where).to_pylist():
        texts.setdefault(row["query_id"], (row["query"], []))[1].append(row["ad_title"])
    return texts


def profile(texts: Texts) -> Profile:
    """The profile of queries with their ads."""
    words = {kind: _counts(texts, kind) for kind in ("query", "ad")}
    return Profile(queries=len(texts), lengths=_lengths(texts), scripts=_scripts(texts), words=words)


def remember(pairs: Path, teacher: Path) -> None:
    """Write the profile of split train, which a teacher has learned from, into the teacher's folder."""
    write_json(teacher / PROFILE, profile(read_texts(pairs, _in("train"))).model_dump(mode="json"))


def compare(known: Profile, new: Texts) -> list[Measure]:
    """The measures of the texts of new pairs."""
    measures = []
    for kind, title in (("query", "in queries"), ("ad", "in ads")):
        old, now = Counter(known.words[kind]), _counts(new, kind)
        # What only one query has is the share of words to expect that no query has had (Good and Turing, Good 1953).
        alone, unseen = sum(n == 1 for n in old.values()), sum(n for word, n in now.items() if word not in old)
        measures.append(_shares(f"unseen words {title}", alone, old.total(), unseen, now.total()))
        # Chosen from both sides: what is common on one side only in part is so by chance, and would be less so on the other.
        both = old + now
        share = min(old.total(), now.total()) / max(both.total(), 1)
        common = [word for word, count in both.most_common(COMMON) if count * share >= EXPECTED]
        measures.append(_bins(f"common words {title}", *(_with_others(counts, common) for counts in (old, now))))
    measures.append(_bins("query lengths", known.lengths, _lengths(new)))
    measures.append(_bins("scripts of queries", known.scripts, _scripts(new)))
    return measures


def psi(old: Sequence[float], new: Sequence[float]) -> float:
    """The population stability index of two histograms over the same bins, less what chance gives in all but rare cases.

    That is the mean of its distribution by chance and three standard deviations. Half a count is added to each bin.
    """
    before, after = (np.asarray(counts, dtype=np.float64) + 0.5 for counts in (old, new))
    freedom, scale = len(before) - 1, 1 / before.sum() + 1 / after.sum()
    before, after = before / before.sum(), after / after.sum()
    index = float(((after - before) * np.log(after / before)).sum())
    return max(0.0, index - scale * (freedom + 3 * math.sqrt(2 * freedom)))


def check_pairs(limits: DriftConfig, run: Path, pairs: Path) -> list[Check]:
    """For data-prepare: the pool pairs without an annotation against what a teacher, if there is one, learned from.

    Writes `_drift.json` into `pairs`. Empty where there is no teacher yet, or too few new queries; without measures where
    the teacher learned from too few.
    """
    pool = _sample(pairs / "pairs", ["pair_id"], _in("pool"))["pair_id"]
    known = _sample(run / "annotations", ["pair_id"], _among(pool))["pair_id"]
    new = read_texts(pairs, _among(pool) & ~_among(known))
    checks = []
    if (run / "teacher" / PROFILE).exists() and len(new) >= limits.min_queries:
        known = Profile.model_validate(read_json(run / "teacher" / PROFILE))
        count = sum(len(ads) for _, ads in new.values())
        checks = [_judge(limits, "teacher", known, new, at=datetime.now(UTC), pairs=count)]
    _save(pairs, checks)
    return checks


def check_annotations(limits: DriftConfig, run: Path, annotations: Path, key: str) -> list[Check]:
    """For annotate: the pairs annotated under `key` since the last check, against what teacher and student learned from.

    Adds to `_drift.json` in `annotations`, and returns all checks under this key. A student that learns from the table
    learns from each of these batches, so the worst of them is its verdict.
    """
    pairs, before = run / "pairs", [check for check in load(annotations) if check.annotation_key == key]
    until = max((check.at for check in before), default=None)
    rows = (pads.field("annotation_key") == key) & (pads.field("status") == "ok") & of_the_split(annotations, pairs)
    created = pads.field("created_at")
    since = rows if until is None else rows & (created > pa.scalar(until, pa.timestamp("us", tz="UTC")))
    now = datetime.now(UTC)
    columns = ["pair_id", "grade"]
    new = _sample(annotations, columns, since)
    texts = read_texts(pairs, _among(new["pair_id"]))
    if len(texts) < limits.min_queries:
        return before
    about: dict[str, Any] = {"at": now, "annotation_key": key, "pairs": len(new)}
    path, train = run / "teacher" / PROFILE, read_texts(pairs, _in("train"))
    teacher = Profile.model_validate(read_json(path)) if path.exists() else profile(train)
    checks = [_judge(limits, "teacher", teacher, texts, **about)]
    if until is not None:
        old = _sample(annotations, columns, rows & (created <= pa.scalar(until, pa.timestamp("us", tz="UTC"))))
        learned = dict(train) | dict(read_texts(pairs, _among(old["pair_id"])))
        check = _judge(limits, "student", profile(learned), texts, **about)
        if check.measures:
            check.measures += [_grades(old, new), *_shadow(limits.shadow, run, old, new)]
        checks.append(check)
    _save(annotations, load(annotations) + checks)
    return before + checks


def load(folder: Path) -> list[Check]:
    """The checks that are recorded in a stage's folder, oldest first."""
    path = folder / FILE
    return [Check.model_validate(check) for check in read_json(path)["checks"]] if path.exists() else []


def verdict(checks: Iterable[Check], limits: DriftConfig) -> tuple[Level, str]:
    """The worst of the checks: its level, and its sentence unless all is fine. One without measures says nothing."""
    worst = max((check for check in checks if check.measures), key=lambda check: check.worst.psi, default=None)
    level: Level = "fine" if worst is None else worst.level(limits)
    return level, "" if worst is None or level == "fine" else worst.sentence()


def figures(checks: list[Check], limits: DriftConfig) -> dict[str, Any]:
    """What a stage reports of its checks: the level and the highest index, and why some were not judged."""
    found: dict[str, Any] = {}
    if judged := [check for check in checks if check.measures]:
        found |= {"drift": verdict(judged, limits)[0], "drift_psi": max(check.worst.psi for check in judged)}
    if unjudged := [check for check in checks if not check.measures]:
        found["drift_not_judged"] = _too_few(unjudged[-1], limits)
    return found


def _judge(
    limits: DriftConfig, against: Literal["teacher", "student"], known: Profile, new: Texts, **about: Any
) -> Check:
    """The check of new texts; without measures where `known` has too few queries, which the log says."""
    measures = compare(known, new) if known.queries >= limits.min_queries else []
    check = Check(against=against, known=known.queries, queries=len(new), measures=measures, **about)
    if not measures:
        logger.info("drift is not judged: %s", _too_few(check, limits))
    return check


def _too_few(check: Check, limits: DriftConfig) -> str:
    return (
        f"the {check.against} learned from {check.known:,} queries, fewer than drift.min_queries ({limits.min_queries})"
    )


def _save(folder: Path, checks: list[Check]) -> None:
    write_json(folder / FILE, {"checks": [check.model_dump(mode="json") for check in checks]})


def _grades(old: pa.Table, new: pa.Table) -> Measure:
    grades = (Counter(map(str, table["grade"].to_pylist())) for table in (old, new))
    return _bins("the teacher's grades", *grades)


def _shadow(count: int, run: Path, old: pa.Table, new: pa.Table) -> list[Measure]:
    """The exported student's scores, and how often it gives another grade than the teacher, on a sample of both sides."""
    if not count or not (run / "export" / "student.json").exists():
        return []
    from student.scorer import Scorer  # loads onnxruntime

    scorer, scores, differing = Scorer(run / "export"), [], []
    names = ["pair_id", "query", "ad_title", "ad_text", "attributes"]
    for table in (old, new):
        sample = table.sort_by("pair_id").slice(0, count)  # ids are hashes
        pairs = _sample(run / "pairs" / "pairs", names, _among(sample["pair_id"]))
        probs = scorer.grade_probs(pairs.to_pylist())
        teacher = dict(zip(sample["pair_id"].to_pylist(), sample["grade"].to_pylist(), strict=True))
        scores.append(scorer.p_relevant(probs))
        grades = np.array([teacher[pair_id] for pair_id in pairs["pair_id"].to_pylist()])
        differing.append((int((probs.argmax(axis=1) != grades).sum()), len(grades)))
    edges = np.unique(np.quantile(scores[0], np.linspace(0, 1, 11)[1:-1]))
    names = [f"up to {edge:.3f}" for edge in edges] + ["above"]
    bins = (Counter(names[i] for i in np.searchsorted(edges, each)) for each in scores)
    disagree = _shares("student and teacher disagree", *differing[0], *differing[1])
    return [_bins("the student's scores", *bins), disagree]


def _shares(name: str, old: int, of_old: int, new: int, of_new: int) -> Measure:
    expected, found = (f"{part / max(whole, 1):.1%}" for part, whole in ((old, of_old), (new, of_new)))
    return Measure(name=name, expected=expected, found=found, psi=psi([old, of_old - old], [new, of_new - new]))


def _bins(name: str, old: Mapping[str, int], new: Mapping[str, int]) -> Measure:
    """In words by the bin whose share changed most."""
    bins = sorted(old.keys() | new.keys())
    before, after = ([counts.get(each, 0) for each in bins] for counts in (old, new))
    shares = [np.array(counts) / max(sum(counts), 1) for counts in (before, after)]
    at = int(np.abs(shares[1] - shares[0]).argmax())
    expected, found = (f"{bins[at]}: {share[at]:.1%}" for share in shares)
    return Measure(name=name, expected=expected, found=found, psi=psi(before, after))


def _with_others(counts: Counter[str], common: list[str]) -> dict[str, int]:
    chosen = {word: counts[word] for word in common}
    return chosen | {"all others": counts.total() - sum(chosen.values())}


def _counts(texts: Texts, kind: str) -> Counter[str]:
    """In how many queries, or in the ads of how many, each word is."""
    parts = ([query] if kind == "query" else ads for query, ads in texts.values())
    return Counter(word for part in parts for word in {word for text in part for word in words_of(text)})


def _lengths(texts: Texts) -> dict[str, int]:
    lengths = (len(words_of(query)) for query, _ in texts.values())
    return dict(Counter(f"{min(n, _LONGEST)}{' or more' if n >= _LONGEST else ''} words" for n in lengths))


def _scripts(texts: Texts) -> dict[str, int]:
    return dict(Counter(_script(query) for query, _ in texts.values()))


def _script(text: str) -> str:
    """The script of most of a text's letters, as Unicode names them; `none` without letters."""
    letters = Counter(unicodedata.name(c, "OTHER").partition(" ")[0] for c in text if c.isalpha())
    return max(letters, key=lambda name: (letters[name], name), default="none").lower()


def _sample(folder: Path, columns: list[str], where: pads.Expression) -> pa.Table:
    """About `SAMPLE` of the rows for which `where` holds, those whose pair_id, a hash, is low; all where there are fewer."""
    dataset = pads.dataset(folder, format="parquet") if folder.exists() else None
    if dataset is None or not dataset.files:
        fields = {field.name: field for schema in (PAIRS, ANNOTATIONS) for field in schema}
        return pa.schema([fields[name] for name in columns]).empty_table()
    if (rows := dataset.count_rows(filter=where)) > SAMPLE:
        where &= pads.field("pair_id") < f"{SAMPLE * 16**8 // rows:08x}"
    return dataset.to_table(columns, filter=where)


def _in(split: str) -> pads.Expression:
    return pads.field("split") == split


def _among(ids: Any) -> pads.Expression:
    values = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else pa.array(ids, pa.string())
    return pads.field("pair_id").isin(values)
