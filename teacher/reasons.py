"""Reasons to learn from, from a model itself or from a stronger one (STaR, arXiv 2203.14465).

Each labelled pair is asked `reason_samples` times. A reason that led to the human grade is kept. Where none did, the grade
is given and a reason for it asked for; that one is kept if it does not name the grade that was given, and if the model,
shown the pair and this reason alone, answers with the human grade. What was left out: STaR's outer loop (AGPO follows), and
more than one reason for a pair.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from data.contracts import (
    REASONS,
    ContractError,
    digest,
    digest_files,
    log_progress,
    read_json,
    read_table,
    whole_file,
    write_json,
)
from teacher.chat_template import special_tokens
from teacher.config import TeacherConfig
from teacher.engines import open_engine
from teacher.engines.base import Completion, Engine, Sampling
from teacher.examples import labelled_rows
from teacher.model import load_tokenizer, weights_fingerprint
from teacher.prompt import Prompt, PromptWriter, as_data
from teacher.reading import AnswerReader, Sample, answer_logprobs
from teacher.verifier import parse_grade

logger = logging.getLogger(__name__)

REASONS_FILE = "reasons.parquet"
FUNNEL_FILE = "reasons.json"
_METHOD = 1  # raised by hand when the same completions would give other reasons
_CHUNK = 64  # pairs that a kill loses at most
_EXAMPLES = 4  # of each outcome, for the report
_LONGEST = 4000  # characters of a reason
_ANSWER_TOKENS = 24  # the answer tag takes fewer, whatever the tokenizer
_HINT = (
    "The right grade is {grade}, {name}. Give a short reason for it from the query and the ad, as if the grade had not been "
    "given, then the answer."
)
_NAMES_HINT = re.compile(
    r"\bhint\w*|\btold\b|\b(?:right|correct|given|provided|stated|actual) (?:grade|answer|label|rating)\b"
    r"|\b(?:grade|answer|label|rating|score)\b\W*(?:(?:is|was|of|be|ha[sd] (?:not )?been)\W+)?(?:given|provided|stated|\d)",
    re.IGNORECASE,
)
_RULE = re.compile(r"\brule (\d+)", re.IGNORECASE)
# What can be wrong with a completion, the farther it came the later.
_WRONG, _EMPTY, _NO_RULE, _TOO_LONG, _NAMES, _ELSEWHERE = (
    "another grade, or none", "no reason", "names no rule", "longer than max_completion_tokens",
    "names the grade that was given", "the reason alone leads elsewhere",
)  # fmt: skip
_FAULTS = (_WRONG, _EMPTY, _NO_RULE, _TOO_LONG, _NAMES, _ELSEWHERE)

Row = dict[str, Any]


def collect_reasons(config: TeacherConfig, model: Path, base: Path, pairs: Path, out: Path, cache: Path) -> None:
    """Write `reasons.parquet` (`REASONS`, a row for each pair of the warm start) and the funnel `reasons.json` into `out`.

    The model in folder `model` is asked behind `warm_start.reason_engine`; the one in `base` is to learn from the reasons.
    What was asked before, of the same model with the same prompt and sampling, is taken from `cache`, where every chunk of
    pairs is kept as soon as it is done. Raises `ContractError` when no pair gets a reason.
    """
    settings = config.warm_start
    tokenizer, prompt = load_tokenizer(model), Prompt.of(config, pairs)
    rows = labelled_rows(pairs, "train", settings.examples, config.seed)
    engine = settings.reason_engine
    content = {
        "method": _METHOD,
        "model": weights_fingerprint(model),
        "served": getattr(engine, "served_model", ""),
        "learner": digest_files(sorted(base.glob("tokenizer*"))),
        "prompt": prompt.rendered_version(tokenizer),
        "grades": prompt.scale.model_dump(mode="json"),
        "sampling": [settings.reason_samples, settings.reason_temperature, config.max_completion_tokens, config.seed],
    }
    folder = cache / digest(content)
    for place in (folder, out):
        place.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        asked = _by_pair(_rows_of(folder))
        missing = [row for row in rows if (row["pair_id"], row["grade"]) not in asked]
        logger.info("reasons: %d pairs, %d of them asked before (%s)", len(rows), len(rows) - len(missing), folder)
        if missing:
            opened = open_engine(engine, model)
            try:
                asker = _Asker(config, opened, prompt, tokenizer, load_tokenizer(base))
                for start in range(0, len(missing), _CHUNK):
                    chunk = missing[start : start + _CHUNK]
                    answers = asker.ask(chunk)
                    _write(folder / f"{digest([row['pair_id'] for row in chunk])}.parquet", answers)
                    asked |= _by_pair(answers)
                    done, counts = start + len(chunk), Counter(row["outcome"] for row in asked.values())
                    shown = ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items()))
                    log_progress(logger, done, len(missing), "reasons: %d of %d pairs (%s)", done, len(missing), shown)
            finally:
                opened.close()
    chosen = [asked[row["pair_id"], row["grade"]] for row in rows]
    write_json(out / FUNNEL_FILE, _funnel(chosen, rows))
    if all(row["outcome"] == "dropped" for row in chosen):
        raise ContractError(
            f"none of {len(chosen)} pairs got a reason ({_most(chosen)}): take a stronger model for the reasons "
            "(teacher.warm_start.reasons = 'engine'), or reasons = 'lexical'"
        )
    _write(out / REASONS_FILE, chosen)


def read_reasons(out: Path) -> dict[str, str]:
    """The reason of each pair that has one, by pair_id, as `collect_reasons` wrote them into `out`."""
    rows = read_table(out / REASONS_FILE, REASONS, columns=["pair_id", "reasoning"]).to_pylist()
    return {row["pair_id"]: row["reasoning"] for row in rows if row["reasoning"] is not None}


def funnel_metrics(out: Path) -> dict[str, float]:
    """The counts of the funnel as metrics `reasons/…`; empty where no reasons were asked for."""
    if not (out / FUNNEL_FILE).exists():
        return {}
    funnel = read_json(out / FUNNEL_FILE)
    return {f"reasons/{name}": funnel[name] for name in ("asked", "right", "hinted", "dropped")}


@dataclass
class _Candidate:
    """A completion read: its reason, the probability of its grade, and what is wrong with it (empty if nothing)."""

    reason: str
    probability: float
    fault: str


class _Asker:
    """Asks an engine for the reasons of labelled pairs."""

    def __init__(self, config: TeacherConfig, engine: Engine, prompt: Prompt, tokenizer: Any, learner: Any) -> None:
        self._engine, self._prompt, self._tokenizer, self._learner = engine, prompt, tokenizer, learner
        self._config, self._num_grades = config, prompt.scale.size
        self._special = tuple(dict.fromkeys(special_tokens(tokenizer) + special_tokens(learner)))
        self._writer, self._reader = PromptWriter(prompt, tokenizer), AnswerReader(tokenizer, self._num_grades)
        self._sampling = Sampling(
            n=config.warm_start.reason_samples,
            temperature=config.warm_start.reason_temperature,
            max_tokens=config.max_completion_tokens,
            seed=config.seed,
            logprobs=answer_logprobs(self._num_grades),
        )

    def ask(self, rows: Sequence[Row]) -> list[Row]:
        """A `REASONS` row for each of some labelled pairs, in their order."""
        by_id = {row["pair_id"]: row for row in rows}
        dropped = {
            "outcome": "dropped",
            "reasoning": None,
            "dropped": "the engine could not complete its prompt",
            "n_right": 0,
        }
        answers = {pair_id: {"pair_id": pair_id, "grade": row["grade"], **dropped} for pair_id, row in by_id.items()}
        prompts: dict[str, list[int]] = {}
        for pair_id, ids in zip(by_id, self._writer(rows), strict=True):
            if isinstance(ids, str):
                answers[pair_id]["dropped"] = f"no prompt: {ids}"
            else:
                prompts[pair_id] = ids
        for pair_id, samples in self._sampled(prompts, self._sampling).items():
            read = [self._candidate(sample, by_id[pair_id], hinted=False) for sample in samples]
            answers[pair_id]["n_right"] = sum(candidate.fault != _WRONG for candidate in read)
            if (best := _best(read)) is not None:
                answers[pair_id] |= {"outcome": "right", "reasoning": best.reason, "dropped": ""}
        hints = {
            pair_id: self._with_hint(by_id[pair_id]) for pair_id in prompts if answers[pair_id]["outcome"] == "dropped"
        }
        led: dict[str, str] = {}
        for pair_id, samples in self._sampled(hints, self._sampling).items():
            read = [self._candidate(sample, by_id[pair_id], hinted=True) for sample in samples]
            if (best := _best(read)) is not None:
                led[pair_id] = best.reason
            else:
                answers[pair_id]["dropped"] = max((candidate.fault for candidate in read), key=_FAULTS.index)
        for pair_id, grade in self._grades_after(prompts, led).items():
            if grade == by_id[pair_id]["grade"]:
                answers[pair_id] |= {"outcome": "hinted", "reasoning": led[pair_id], "dropped": ""}
            else:
                answers[pair_id]["dropped"] = _ELSEWHERE
        return list(answers.values())

    def _sampled(self, prompts: Mapping[str, list[int]], sampling: Sampling) -> dict[str, list[Sample]]:
        completions = self._completed(prompts, sampling)
        return {pair_id: [self._reader.read(each) for each in group] for pair_id, group in completions.items()}

    def _grades_after(self, prompts: Mapping[str, list[int]], reasons: Mapping[str, str]) -> dict[str, int | None]:
        """What the model answers, greedily, to a pair's prompt that is followed by a reason."""
        begun = {
            pair_id: prompts[pair_id] + self._tokenizer(reason, add_special_tokens=False)["input_ids"]
            for pair_id, reason in reasons.items()
        }
        answers = self._completed(begun, Sampling(temperature=0.0, max_tokens=_ANSWER_TOKENS))
        return {
            pair_id: parse_grade(f"{reasons[pair_id]}{completion.text}", self._num_grades)
            for pair_id, (completion,) in answers.items()
        }

    def _completed(self, prompts: Mapping[str, list[int]], sampling: Sampling) -> dict[str, list[Completion]]:
        """The completions of those prompts that the engine can complete."""
        results: dict[str, list[Completion]] = {}
        for pair_id, ids in prompts.items():
            if len(ids) + sampling.max_tokens <= self._engine.max_model_len:
                self._engine.submit(pair_id, ids, sampling)
        while done := self._engine.finished():
            results |= {pair_id: result for pair_id, result in done if not isinstance(result, Exception)}
        return results

    def _candidate(self, sample: Sample, row: Row, *, hinted: bool) -> _Candidate:
        reason = as_data(sample.reasoning, _LONGEST, self._special)
        fault = self._fault(sample, reason, row, hinted)
        return _Candidate(reason, sample.probs[row["grade"]] if sample.probs else 0.0, fault)

    def _fault(self, sample: Sample, reason: str, row: Row, hinted: bool) -> str:
        if sample.grade != row["grade"]:
            return _WRONG
        if not reason:
            return _EMPTY
        rules = {int(number) for number in _RULE.findall(reason)}
        if self._prompt.config.name_rule and not rules & set(range(1, len(self._prompt.config.rules) + 1)):
            return _NO_RULE
        if len(self._learner(reason, add_special_tokens=False)["input_ids"]) > self._config.max_completion_tokens:
            return _TOO_LONG
        own = f"{row['query']} {row['ad_title']} {row['ad_text'] or ''}".lower()
        if hinted and any(named.group().lower() not in own for named in _NAMES_HINT.finditer(reason)):
            return _NAMES
        return ""

    def _with_hint(self, row: Row) -> list[int]:
        """The token ids of a pair's prompt that gives the grade."""
        fields = (row["query"], row["ad_title"], row["ad_text"], dict(row["attributes"] or ()))
        messages = self._prompt.messages(*fields, self._special)
        name = self._prompt.scale.grades[row["grade"]].name
        messages[-1]["content"] += f"\n{_HINT.format(grade=row['grade'], name=name)}"
        text = self._prompt.render(self._tokenizer, messages)
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]


def _best(candidates: Sequence[_Candidate]) -> _Candidate | None:
    """The candidate without a fault whose grade is likeliest, the first among equals."""
    return max((each for each in candidates if not each.fault), key=lambda each: each.probability, default=None)


def _rows_of(folder: Path) -> list[Row]:
    return [row for file in sorted(folder.glob("*.parquet")) for row in read_table(file, REASONS).to_pylist()]


def _by_pair(rows: Sequence[Row]) -> dict[tuple[str, int], Row]:
    return {(row["pair_id"], row["grade"]): row for row in rows}


def _write(path: Path, rows: Sequence[Row]) -> None:
    with whole_file(path) as temporary:
        pq.write_table(pa.Table.from_pylist(list(rows), schema=REASONS), temporary)


def _most(rows: Sequence[Row]) -> str:
    counts = Counter(row["dropped"] for row in rows if row["dropped"])
    return "; ".join(f"{number} × {reason}" for reason, number in counts.most_common(3))


def _funnel(chosen: Sequence[Row], rows: Sequence[Row]) -> dict[str, Any]:
    """Counts by outcome, why reasons were dropped, the outcomes by grade, and a few examples of each outcome."""
    outcomes = Counter(row["outcome"] for row in chosen)
    by_grade = Counter((row["grade"], row["outcome"]) for row in chosen)
    examples: dict[str, list[Row]] = {outcome: [] for outcome in ("right", "hinted", "dropped")}
    for row, pair in zip(chosen, rows, strict=True):
        if len(examples[row["outcome"]]) < _EXAMPLES:
            examples[row["outcome"]].append(row | {name: pair[name] for name in ("query", "ad_title")})
    return {
        "asked": len(chosen),
        **{outcome: outcomes[outcome] for outcome in examples},
        "n_right": sum(row["n_right"] for row in chosen),
        "dropped_by_reason": dict(Counter(row["dropped"] for row in chosen if row["dropped"]).most_common(20)),
        "by_grade": [
            {"grade": grade} | {outcome: by_grade[grade, outcome] for outcome in examples}
            for grade in sorted({row["grade"] for row in chosen})
        ],
        "examples": examples,
    }
