"""Reasons to learn from, from a model itself or from a stronger one (STaR, arXiv 2203.14465).

Each labelled pair is asked `reason_samples` times, with the completion begun for the model so that the reason comes before
the grade. Every reason is then verified in one way: which grade does the model give the pair when it reads only this reason?
One that leads to the human grade is right. Where none does, the grade is given and a reason for it asked for, which must not
name what was given. What was left out: STaR's outer loop (AGPO follows), and more than one reason for a pair.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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
    first_line,
    log_progress,
    read_json,
    read_table,
    whole_file,
    write_json,
)
from teacher.chat_template import special_tokens
from teacher.config import REASONS_METHOD, TeacherConfig
from teacher.engines import open_engine
from teacher.engines.base import Completion, Engine, Sampling
from teacher.engines.config import TransformersConfig
from teacher.examples import labelled_rows
from teacher.model import load_tokenizer, weights_fingerprint
from teacher.prompt import Prompt, PromptWriter, as_data
from teacher.reading import AnswerReader, answer_logprobs
from teacher.reason_text import names_the_given, reason_in, says_nothing
from teacher.verifier import ANSWER

logger = logging.getLogger(__name__)

REASONS_FILE = "reasons.parquet"
FUNNEL_FILE = "reasons.json"
_CHUNK = 64  # pairs that a kill loses, if they fill the engine
_EXAMPLES = 4  # of each outcome, for the report
_LONGEST = 4000  # characters of a reason
_OPENING = "Reason:"  # what a completion is begun with
_TAG = ANSWER.partition("{")[0]
_HINT = (
    "The right grade is {grade}, {name}. Say in one short sentence what in the query and the ad makes it so, as if "
    "the grade had not been given."
)
_RULE = re.compile(r"\brule (\d+)", re.IGNORECASE)
# What can be wrong with a reason, the farther it came the later.
_EMPTY, _NOTHING, _NO_RULE, _TOO_LONG, _NAMES, _ELSEWHERE = (
    "no reason", "says nothing of the pair", "names no rule", "longer than max_completion_tokens",
    "names the grade that was given", "the reason alone leads elsewhere",
)  # fmt: skip
_UNANSWERED = "the engine could not complete its prompt"  # then why; no answer, so it is asked again
_FAULTS = (_EMPTY, _NOTHING, _NO_RULE, _TOO_LONG, _NAMES, _ELSEWHERE)

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
        "method": REASONS_METHOD,
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
                # Enough pairs to fill the engine; a served one keeps its own queue.
                batch = engine.batch_size if isinstance(engine, TransformersConfig) else 0
                size = max(_CHUNK, batch // settings.reason_samples)
                for start in range(0, len(missing), size):
                    chunk = missing[start : start + size]
                    answers = asker.ask(chunk)
                    _write(folder / f"{digest([row['pair_id'] for row in chunk])}.parquet", filter(_answered, answers))
                    asked |= _by_pair(answers)
                    done, counts = start + len(chunk), Counter(row["outcome"] for row in asked.values())
                    shown = ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items()))
                    log_progress(logger, done, len(missing), "reasons: %d of %d pairs (%s)", done, len(missing), shown)
            finally:
                opened.close()
    chosen = [asked[row["pair_id"], row["grade"]] for row in rows]
    write_json(out / FUNNEL_FILE, _funnel(chosen, rows))
    if not any(map(_answered, chosen)):
        raise ContractError(
            f"none of {len(chosen)} pairs got a reason ({_most(chosen)}): see to teacher.warm_start.reason_engine"
        )
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


@dataclass(frozen=True)
class _Candidate:
    """A reason, what is wrong with it (empty if nothing), and the probability of the human grade after it."""

    reason: str
    fault: str
    probability: float = 0.0


class _Asker:
    """Asks an engine for the reasons of labelled pairs."""

    def __init__(self, config: TeacherConfig, engine: Engine, prompt: Prompt, tokenizer: Any, learner: Any) -> None:
        self._engine, self._prompt, self._tokenizer, self._learner = engine, prompt, tokenizer, learner
        self._config, self._num_grades = config, prompt.scale.size
        self._special = tuple(dict.fromkeys(special_tokens(tokenizer) + special_tokens(learner)))
        self._writer, self._reader = PromptWriter(prompt, tokenizer), AnswerReader(tokenizer, self._num_grades)
        self._guideline = prompt.system()
        self._sampling = Sampling(
            n=config.warm_start.reason_samples,
            temperature=config.warm_start.reason_temperature,
            max_tokens=max(1, config.max_completion_tokens - len(self._target(""))),
            seed=config.seed,
        )
        self._verification = Sampling(temperature=0.0, max_tokens=1, logprobs=answer_logprobs(self._num_grades))

    def ask(self, rows: Sequence[Row]) -> list[Row]:
        """A `REASONS` row for each of some labelled pairs, in their order."""
        by_id = {row["pair_id"]: row for row in rows}
        dropped = {"outcome": "dropped", "reasoning": None, "dropped": _UNANSWERED, "n_right": 0}
        answers = {pair_id: {"pair_id": pair_id, "grade": row["grade"], **dropped} for pair_id, row in by_id.items()}
        prompts: dict[str, list[int]] = {}
        for pair_id, ids in zip(by_id, self._writer(rows), strict=True):
            if isinstance(ids, str):
                answers[pair_id]["dropped"] = f"no prompt: {ids}"
            else:
                prompts[pair_id] = ids
        for hinted, outcome in ((False, "right"), (True, "hinted")):
            asked = {
                pair_id: self._with_hint(by_id[pair_id]) if hinted else ids
                for pair_id, ids in prompts.items()
                if answers[pair_id]["outcome"] == "dropped"
            }
            for pair_id, candidates in self._candidates(asked, prompts, by_id, hinted).items():
                sound = [candidate for candidate in candidates if not candidate.fault]
                if not hinted:
                    answers[pair_id]["n_right"] = len(sound)
                if sound:  # the likeliest, the first among equals
                    best = max(sound, key=lambda candidate: candidate.probability)
                    answers[pair_id] |= {"outcome": outcome, "reasoning": best.reason, "dropped": ""}
                elif not hinted or _answered(answers[pair_id]):
                    answers[pair_id]["dropped"] = max((each.fault for each in candidates), key=_place)
        return list(answers.values())

    def _candidates(
        self, asked: Mapping[str, list[int]], prompts: Mapping[str, list[int]], by_id: Mapping[str, Row], hinted: bool
    ) -> dict[str, list[_Candidate]]:
        """The reasons sampled for each prompt of `asked`, verified by what the model answers to `prompts` after them."""
        opening = self._tokenizer(_OPENING, add_special_tokens=False)["input_ids"]
        completions = self._completed({pair_id: ids + opening for pair_id, ids in asked.items()}, self._sampling)
        sampled = {
            pair_id: [_Candidate("", group)]
            if isinstance(group, str)
            else [self._candidate(completion, by_id[pair_id], hinted) for completion in group]
            for pair_id, group in completions.items()
        }
        begun = {
            (pair_id, each.reason): prompts[pair_id]
            + self._tokenizer(f"{each.reason} {_TAG}", add_special_tokens=False)["input_ids"]
            for pair_id, group in sampled.items()
            for each in group
            if not each.fault
        }
        led = {
            (pair_id, reason): self._led(answer, reason, by_id[pair_id]["grade"])
            for (pair_id, reason), answer in self._completed(begun, self._verification).items()
        }
        return {
            pair_id: [led.get((pair_id, each.reason), each) for each in group] for pair_id, group in sampled.items()
        }

    def _led(self, answer: list[Completion] | str, reason: str, grade: int) -> _Candidate:
        """A reason that the model continues with `answer`; `grade` is the human one."""
        if isinstance(answer, str):
            return _Candidate(reason, answer)
        sample = self._reader.read_opened(answer[0])
        probability = sample.probs[grade] if sample.probs else 0.0
        return _Candidate(reason, "" if sample.grade == grade else _ELSEWHERE, probability)

    def _completed(self, prompts: Mapping[Any, list[int]], sampling: Sampling) -> dict[Any, list[Completion] | str]:
        """The completions of each prompt, or why the engine has none."""
        results: dict[Any, list[Completion] | str] = {}
        most = self._engine.max_model_len
        for tag, ids in prompts.items():
            if len(ids) + sampling.max_tokens <= most:
                self._engine.submit(tag, ids, sampling)
            else:
                results[tag] = f"{_UNANSWERED}: longer than its max_model_len, {most}"
        while done := self._engine.finished():
            for tag, result in done:
                results[tag] = f"{_UNANSWERED}: {first_line(result)}" if isinstance(result, Exception) else result
        return results

    def _candidate(self, completion: Completion, row: Row, hinted: bool) -> _Candidate:
        own = f"{row['query']} {row['ad_title']} {row['ad_text'] or ''}"
        text = reason_in(completion.text, own, cut_off=completion.finish_reason == "length")
        reason = as_data(text or "", _LONGEST, self._special)
        return _Candidate(
            reason, _TOO_LONG if text is None else self._fault(reason, own, row["grade"] if hinted else None)
        )

    def _fault(self, reason: str, own: str, given: int | None) -> str:
        """What is wrong with a reason before it is verified; `own` is the pair's text, `given` the grade of a hint."""
        if not reason:
            return _EMPTY
        if says_nothing(reason, own, self._guideline):
            return _NOTHING
        rules = {int(number) for number in _RULE.findall(reason)}
        if self._prompt.config.name_rule and not rules & set(range(1, len(self._prompt.config.rules) + 1)):
            return _NO_RULE
        if len(self._target(reason)) > self._config.max_completion_tokens:
            return _TOO_LONG
        if given is not None and names_the_given(reason, own, self._prompt.scale.grades[given].name):
            return _NAMES
        return ""

    def _target(self, reason: str) -> list[int]:
        """The tokens of the completion that the learner is to learn, with a place for its end token."""
        text = f"{reason} {ANSWER.format(grade=0)}"
        return [*self._learner(text, add_special_tokens=False)["input_ids"], self._learner.eos_token_id]

    def _with_hint(self, row: Row) -> list[int]:
        """The token ids of a pair's prompt that gives the grade."""
        fields = (row["query"], row["ad_title"], row["ad_text"], dict(row["attributes"] or ()))
        messages = self._prompt.messages(*fields, self._special)
        name = self._prompt.scale.grades[row["grade"]].name
        messages[-1]["content"] += f"\n{_HINT.format(grade=row['grade'], name=name)}"
        text = self._prompt.render(self._tokenizer, messages)
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]


def _answered(row: Row) -> bool:
    """Whether the engine answered: a failure of its own is asked again."""
    return not row["dropped"].startswith(_UNANSWERED)


def _place(fault: str) -> int:
    """How far a reason with this fault came; what the engine did not answer may still come anywhere."""
    return _FAULTS.index(fault) if fault in _FAULTS else len(_FAULTS)


def _rows_of(folder: Path) -> list[Row]:
    rows = (row for file in sorted(folder.glob("*.parquet")) for row in read_table(file, REASONS).to_pylist())
    return [row for row in rows if _answered(row)]


def _by_pair(rows: Sequence[Row]) -> dict[tuple[str, int], Row]:
    return {(row["pair_id"], row["grade"]): row for row in rows}


def _write(path: Path, rows: Iterable[Row]) -> None:
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
