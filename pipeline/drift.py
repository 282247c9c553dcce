"""Whether new pairs are like those that the teacher and the student learned from: fine, look, or stop.

Each measure is a population stability index, PSI = Σ (new − old) · ln(new / old) over the shares of its bins, so that one
pair of limits serves all; 0.1 and 0.25 are the usual ones. By chance alone it is (1 / n_old + 1 / n_new) · χ² with one
degree of freedom less than bins (Yurdakul 2018): that is taken off, so that small batches raise no alarm.

What is compared, of each query with one of its ads (`pipeline.drift_profile`): the common words of queries and of ads, words
that were never seen (against how many to expect, by Good and Turing), query lengths, scripts of queries; and, once a batch
was annotated before, the teacher's grades, the student's scores, and how often the two disagree on a shadow sample. What was
left out: languages that share a script; their words give them away.

Measures are recorded, verdicts are not: `look` and `stop` are those of the settings with which a record is read.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
from pydantic import BaseModel, Field

from data.contracts import Config, read_json, write_json
from pipeline import drift_profile
from pipeline.annotated import of_the_split
from pipeline.artifacts import read_record
from pipeline.drift_profile import (
    Profile,
    Texts,
    among,
    annotated_grades,
    in_split,
    new_pairs,
    profile,
    read,
    read_texts,
    texts_among,
    word_counts,
)

logger = logging.getLogger(__name__)
Level = Literal["fine", "look", "stop"]
FILE = "_drift.json"  # so that a folder of Parquet files is read without it
STUDENT_FILE = "drift.json"  # in a student's folder: the checks of what it learned from
FIGURES = ("drift", "drift_psi", "drift_not_judged")  # that a stage reports
_VERSION = 2  # of a check; 1 counted the words of all ads of a query
COMMON = 200  # words that are compared one by one
EXPECTED = 2  # how often a word has to be expected on the smaller side


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
    """New pairs, one of each query, and as many old ones, that the exported student scores to be compared with the teacher;
    0 leaves it out."""


class Measure(BaseModel):
    """One comparison: what the new pairs were expected to have and have, in words, and the index."""

    name: str
    expected: str
    found: str
    psi: float


class Check(BaseModel):
    """What was found of one batch of new pairs, compared with what the `teacher` or the `student` learned from."""

    version: int = _VERSION
    against: Literal["teacher", "student"]
    at: datetime
    annotation_key: str = ""
    pairs: int
    queries: int
    known: int = 0
    """Queries that it learned from (0: not recorded)."""
    measures: list[Measure]
    """Empty where nothing was judged."""
    reason: str = ""
    """Why nothing was judged, from version 2 on."""

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

    def not_judged(self) -> str:
        """Why it has no measures; empty where it has."""
        if self.measures:
            return ""
        return self.reason or f"the {self.against} learned from {self.known:,} queries only"


def compare(known: Profile, new: Texts) -> list[Measure]:
    """The measures of the texts of new pairs."""
    measures = []
    for kind, title in (("query", "in queries"), ("ad", "in ads")):
        old, now = Counter(known.words[kind]), word_counts(new, kind)
        # What only one query has is the share of words to expect that no query has had (Good and Turing, Good 1953).
        alone, unseen = sum(n == 1 for n in old.values()), sum(n for word, n in now.items() if word not in old)
        measures.append(_shares(f"unseen words {title}", alone, old.total(), unseen, now.total()))
        # Chosen from both sides: what is common on one side only in part is so by chance, and would be less so on the other.
        both = old + now
        share = min(old.total(), now.total()) / max(both.total(), 1)
        common = [word for word, count in both.most_common(COMMON) if count * share >= EXPECTED]
        measures.append(_bins(f"common words {title}", *(_with_others(counts, common) for counts in (old, now))))
    of_new = profile(new)
    measures.append(_bins("query lengths", known.lengths, of_new.lengths))
    measures.append(_bins("scripts of queries", known.scripts, of_new.scripts))
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


def check_pairs(limits: DriftConfig, run: Path, pairs: Path, labelled: str) -> list[Check]:
    """For data-prepare: the pool pairs without an annotation against what a teacher, if there is one, learned from.

    Writes `_drift.json` into `pairs`, whose labelled part has the fingerprint `labelled`. Empty where there is no teacher
    yet, or too few new queries; without measures where the teacher learned from too few, or it is not known from what.
    """
    ids = new_pairs(pairs, run / "annotations")
    new, teacher = texts_among(pairs, ids), run / "teacher"
    checks = []
    if (teacher / drift_profile.FILE).exists() and len(new) >= limits.min_queries:
        known = drift_profile.remembered(teacher, pairs, labelled)
        about: dict[str, Any] = {"at": datetime.now(UTC), "pairs": len(ids)}
        checks = [_judge(limits, "teacher", known or drift_profile.refused(teacher), new, **about)]
    save(pairs, checks)
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
    new = annotated_grades(annotations, pairs, since)
    texts = texts_among(pairs, list(new))
    if len(texts) < limits.min_queries:
        return before
    about: dict[str, Any] = {"at": now, "annotation_key": key, "pairs": len(new)}
    record, train = read_record(pairs), read_texts(pairs, in_split("train"))
    labelled = str(record.figures.get("fingerprint_labelled", "")) if record else ""
    known = drift_profile.remembered(run / "teacher", pairs, labelled) or profile(train)
    checks = [_judge(limits, "teacher", known, texts, **about)]
    if until is not None:
        old = annotated_grades(annotations, pairs, rows & (created <= pa.scalar(until, pa.timestamp("us", tz="UTC"))))
        before_texts = texts_among(pairs, list(old))
        check = _judge(limits, "student", profile(dict(train) | dict(before_texts)), texts, **about)
        if check.measures:
            sides = [_one_of_each(before_texts, old), _one_of_each(texts, new)]
            check.measures += [_grades(*sides), *_shadow(limits.shadow, run, *sides)]
        checks.append(check)
    save(annotations, load(annotations) + checks)
    return before + checks


def load(folder: Path, file: str = FILE) -> list[Check]:
    """The checks that are recorded in a stage's folder, oldest first.

    Measures of ads by an earlier release are left out: with fewer ads a query, ads of the same kind looked like others.
    """
    recorded = read_json(folder / file)["checks"] if (folder / file).exists() else []
    checks = [Check.model_validate({"version": 1} | check) for check in recorded]
    for check in checks:
        if check.version == 1:
            check.measures = [measure for measure in check.measures if not measure.name.endswith("in ads")]
    return checks


def save(folder: Path, checks: list[Check], file: str = FILE) -> None:
    """Record checks in a stage's folder, in the place of those that are there."""
    write_json(folder / file, {"checks": [check.model_dump(mode="json") for check in checks]})


def verdict(checks: Iterable[Check], limits: DriftConfig) -> tuple[Level, str]:
    """The worst of the checks: its level, and its sentence unless all is fine. One without measures says nothing."""
    worst = max((check for check in checks if check.measures), key=lambda check: check.worst.psi, default=None)
    level: Level = "fine" if worst is None else worst.level(limits)
    return level, "" if worst is None or level == "fine" else worst.sentence()


def verdict_of_student(student: Path, limits: DriftConfig) -> tuple[Level, str]:
    """The verdict of what the student in this folder learned from."""
    recorded = read_json(student / STUDENT_FILE) if (student / STUDENT_FILE).exists() else {}
    if "level" in recorded:  # by an earlier release, which recorded the verdict by the limits of then, and no measures
        return recorded["level"], recorded["sentence"]
    return verdict(load(student, STUDENT_FILE), limits)


def figures(checks: list[Check], limits: DriftConfig) -> dict[str, Any]:
    """What a stage reports of its checks: the level and the highest index, and why some were not judged."""
    found: dict[str, Any] = {}
    if judged := [check for check in checks if check.measures]:
        found |= {"drift": verdict(judged, limits)[0], "drift_psi": max(check.worst.psi for check in judged)}
    if unjudged := [check for check in checks if not check.measures]:
        found["drift_not_judged"] = unjudged[-1].not_judged()
    return found


def with_limits(recorded: Mapping[str, Any], folder: Path, limits: DriftConfig) -> dict[str, Any]:
    """A stage's recorded figures, with those of its checks by the limits of today."""
    if not (folder / FILE).exists():
        return dict(recorded)
    others = {name: value for name, value in recorded.items() if name not in FIGURES}
    key = recorded.get("annotation_key", "")
    return others | figures([check for check in load(folder) if check.annotation_key == key], limits)


def _judge(
    limits: DriftConfig, against: Literal["teacher", "student"], known: Profile | str, new: Texts, **about: Any
) -> Check:
    """The check of new texts; without measures where `known` has too few queries, or is the reason why there is none."""
    queries, reason = (known.queries, "") if isinstance(known, Profile) else (0, known)
    if not reason and queries < limits.min_queries:
        reason = f"the {against} learned from {queries:,} queries, fewer than drift.min_queries ({limits.min_queries})"
        logger.info("drift is not judged: %s", reason)
    measures = compare(known, new) if isinstance(known, Profile) and not reason else []
    about |= {"known": queries, "queries": len(new), "reason": reason}
    return Check(against=against, measures=measures, **about)


def _one_of_each(texts: Texts, grades: Mapping[str, int]) -> dict[str, int]:
    """The grade of the pair that stands for a query, by pair_id, in the order of the queries' ids, which are hashes."""
    return {text.pair_id: grades[text.pair_id] for text in texts.values()}


def _grades(old: Mapping[str, int], new: Mapping[str, int]) -> Measure:
    return _bins("the teacher's grades", *(Counter(map(str, grades.values())) for grades in (old, new)))


def _shadow(count: int, run: Path, old: Mapping[str, int], new: Mapping[str, int]) -> list[Measure]:
    """The exported student's scores, and how often it gives another grade than the teacher, on a sample of both sides."""
    if not count or not (run / "export" / "student.json").exists():
        return []
    from student.scorer import Scorer  # loads onnxruntime

    scorer, scores, differing = Scorer(run / "export"), [], []
    names = ["pair_id", "query", "ad_title", "ad_text", "attributes"]
    for teacher in (old, new):
        pairs = read(run / "pairs" / "pairs", names, among(list(teacher)[:count]))
        probs = scorer.grade_probs(pairs.to_pylist())
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
