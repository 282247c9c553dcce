"""The work on the GPU machine, phase by phase, through the product's own functions.

A finished phase is in STATE/phases.json and is not done again; a phase that was killed goes on from its own checkpoint or
from the pairs that it has annotated. A phase that fails is recorded with its error, and those that do not need it go on.
The main process (`benchmarks.gpu.run`) takes STATE/results home.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import logging
import math
import platform
import resource
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import torch
from filelock import FileLock

from benchmarks.trainer_overhead import measure
from data.contracts import ANNOTATIONS, PAIRS, MetricsLog, read_json, read_table, whole_file, write_json
from pipeline.annotation.calibration import calibration_of, recalibrate
from pipeline.annotation.config import AnnotateConfig
from pipeline.annotation.job import annotation_key, sampling_of
from pipeline.annotation.store import files_of, take_over
from pipeline.annotation.worker import Job, annotate_partition
from pipeline.dequantise import dequantise
from pipeline.settings import PipelineConfig, choose
from pipeline.wheels import catalogue_entry, check_sha256
from teacher.annotator import Annotator, open_annotator
from teacher.config import AGPOConfig, TeacherConfig
from teacher.model import load_tokenizer
from teacher.prompt import load_prompt
from teacher.train import train_teacher

logger = logging.getLogger("benchmarks.gpu")

TEACHERS = ("base", "warm_start", "agpo", "grpo")
_FOR_ANNOTATION = 0.2  # share of the time that is left for the trainings
_LOADING = 20.0  # seconds, of a training beside its steps and its evaluation
_ENDING = 20.0  # seconds before the deadline at which no more pairs are started
_FILE_ROWS = 40_000  # annotations in a file: it stays under 16 MiB


@dataclass
class Work:
    """What every phase needs: the unpacked `payload`, the `state` so far, and the `deadline` in seconds since 1970.

    `labels` is how many of the pairs of train and of valid keep their human grade (0: all), `test_pairs` how many pairs of
    test every teacher annotates.
    """

    payload: Path
    state: Path
    deadline: float
    settings: PipelineConfig
    labels: int
    test_pairs: int
    phases: dict[str, Any] = field(default_factory=dict)

    @property
    def teacher(self) -> TeacherConfig:
        """The settings of all teachers."""
        return self.settings.teacher

    @property
    def pairs(self) -> Path:
        """The folder that data-prepare wrote, or its copy with few labels."""
        return self.state / "pairs" if self.labels else self.payload / "pairs"

    @property
    def model(self) -> Path:
        """The base model as a plain folder, which all states beside this one share."""
        return self.payload.parent / "model"

    @property
    def left(self) -> float:
        """Seconds to the deadline."""
        return self.deadline - time.time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--payload", type=Path, required=True)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--deadline", type=float, required=True)
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("recipe.toml"))
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--labels", type=int, default=0)
    parser.add_argument("--test-pairs", type=int, default=1000)
    parser.add_argument("--only", action="append", choices=tuple(PHASES), help="a phase; all of them if left out")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    settings = choose("single-gpu", options.config, overrides=options.set)
    payload, state = options.payload.resolve(), options.state.resolve()
    work = Work(payload, state, options.deadline, settings, options.labels, options.test_pairs)
    (work.state / "results").mkdir(exist_ok=True)
    if work.labels and not work.pairs.exists():
        _write_fewer_labels(work)
    record = work.state / "phases.json"
    if record.exists():
        work.phases = read_json(record)
    failed = []
    for name, phase in PHASES.items():
        if options.only and name not in options.only:
            continue
        if name in POLICY_PHASES and not settings.teacher.agpo.steps:
            continue
        if name in work.phases and not work.phases[name].keys() & {"error", "unfinished"}:
            continue
        logger.info("%s begins, %.0f s are left", name, work.left)
        work.phases[name] = _done(phase, work)
        if "error" in work.phases[name]:
            failed.append(name)
        write_json(record, work.phases)
        _write_summary(work)
    if failed:
        raise SystemExit(f"these phases failed, see above: {', '.join(failed)}")


def _done(phase: Callable[[Work], dict[str, Any]], work: Work) -> dict[str, Any]:
    """What a phase gave, with its seconds and peak memory; the error of one that failed."""
    gc.collect()  # trainers are cycles
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.monotonic()
    try:
        result = phase(work)
    except Exception as error:  # minutes of a lent machine are too dear for one phase to take the others with it
        logger.exception("a phase failed")
        result = {"error": f"{type(error).__name__}: {error}"}
    peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return result | {"seconds": round(time.monotonic() - began, 1), "peak_gib": round(peak / 2**30, 2)}


def _write_fewer_labels(work: Work) -> None:
    """A copy of the pairs in which train and valid hold `labels` pairs each; fewer are part of more."""
    table = read_table(work.payload / "pairs" / "pairs", PAIRS).sort_by("pair_id")
    splits = table["split"].to_numpy(zero_copy_only=False)
    rows = np.isin(splits, ["test", "pool"])
    for split in ("train", "valid"):
        rows[np.random.default_rng(0).permutation(np.flatnonzero(splits == split))[: work.labels]] = True
    building = work.pairs.with_name(".pairs")
    shutil.rmtree(building, ignore_errors=True)
    (building / "pairs").mkdir(parents=True)
    pq.write_table(table.filter(pa.array(rows)), building / "pairs" / "part-0.parquet")
    shutil.copyfile(work.payload / "pairs" / "scale.json", building / "scale.json")
    building.rename(work.pairs)


def model(work: Work) -> dict[str, Any]:
    """The base model as a plain folder, in the model's own format where it is not one already."""
    source, building = work.payload / "model", work.model.with_name(".model")
    with FileLock(work.model.with_name(".model.lock")):  # of the states that begin at once, the first one makes it
        if work.model.exists():
            return {}
        shutil.rmtree(building, ignore_errors=True)
        if (gguf := next(source.glob("*.gguf"), None)) is None:
            shutil.copytree(source, building)
        else:
            name, dtype = work.teacher.model.removeprefix("weights:"), "bfloat16"
            if name != work.teacher.model:
                check_sha256(gguf, catalogue_entry(name).sha256)
                dtype = catalogue_entry(name).dtype
            building.mkdir()
            dequantise(gguf, building, dtype)
        building.rename(work.model)
    return {}


def base(work: Work) -> dict[str, Any]:
    """The base model with the prompt, not trained; left out unless `teacher.evaluation.base` is on."""
    if not work.teacher.evaluation.base:
        return {}
    nothing = work.teacher.model_dump() | {
        "warm_start": work.teacher.warm_start.model_dump() | {"examples": 0},
        "agpo": work.teacher.agpo.model_dump() | {"steps": 0},
        "evaluation": work.teacher.evaluation.model_dump() | {"base": False},
    }
    return train_teacher(TeacherConfig.model_validate(nothing), work.model, work.pairs, work.state / "base").figures


def warm_start(work: Work) -> dict[str, Any]:
    """The warm start alone, and how long one evaluation takes."""
    agpo = work.teacher.agpo.model_copy(update={"steps": 0})
    began, out = time.time(), work.state / "warm_start"
    evaluation = work.teacher.evaluation.model_copy(update={"base": False})  # phase `base` has done it
    config = work.teacher.model_copy(update={"agpo": agpo, "evaluation": evaluation})
    metrics = train_teacher(config, work.model, work.pairs, out).figures
    log = MetricsLog(out / "metrics.jsonl")
    trained, evaluated = (log.read(phase)[-1]["time"] / 1000 for phase in ("warm_start", "valid_warm_start"))
    # From here on where an earlier call had trained already.
    return metrics | {"evaluation_seconds": evaluated - max(trained, began)}


def step_ours(work: Work) -> dict[str, Any]:
    """A training step of AGPOTrainer on the warm start, which computes a prompt once for its completions."""
    return _step(work, "ours")


def step_stock(work: Work) -> dict[str, Any]:
    """The same step by TRL's own trainer, which repeats the prompt."""
    return _step(work, "stock")


def _step(work: Work, side: str) -> dict[str, Any]:
    settings = work.teacher.agpo
    options = argparse.Namespace(
        model=work.state / "warm_start" / "model",
        prompts=settings.prompts_per_step,
        group=settings.group_size,
        tokens=work.teacher.max_completion_tokens,
        full_length=False,
        micro_batch=math.gcd(16, settings.prompts_per_step * settings.group_size),
        micro_batch_tokens=settings.micro_batch_tokens,
        lora=work.teacher.lora_rank,
        steps=3,
    )
    measured = measure(side, options)
    medians = {name: round(statistics.median(measured[name]), 3) for name in ("step_seconds", "training_seconds")}
    return medians | {name: measured[name] for name in ("completions", "completion_tokens")}


def plan(work: Work) -> dict[str, Any]:
    """How many sampled tokens AGPO and GRPO each get: what fits into the time that is left, at the step time measured.

    The settings' `teacher.agpo.steps` is the most. A fifth more steps than should be needed, so that the tokens end both.
    """
    agpo, warm = work.teacher.agpo, work.phases["warm_start"]
    seconds = work.phases["step_ours"]["step_seconds"]
    for_steps = work.left * (1 - _FOR_ANNOTATION) / 2 - warm["evaluation_seconds"] - _LOADING
    steps = max(2, min(agpo.steps, int(for_steps / seconds)))
    per_step = agpo.prompts_per_step * agpo.group_size * warm["warm_start/completion_tokens"]
    return {"steps": math.ceil(1.2 * steps), "max_sampled_tokens": int(per_step * steps)}


def agpo(work: Work) -> dict[str, Any]:
    """AGPO from the warm start, as the settings have it, but for the limits of `plan` where that was asked for."""
    return _policy(work, "agpo", {})


def grpo(work: Work) -> dict[str, Any]:
    """GRPO from the same warm start, with the same limit on sampled tokens."""
    return _policy(work, "grpo", {"estimator": "grpo"})


def _policy(work: Work, name: str, changes: dict[str, Any]) -> dict[str, Any]:
    out, planned = work.state / name, work.phases.get("plan", {})
    limits = {limit: planned[limit] for limit in ("steps", "max_sampled_tokens") if limit in planned}
    settings = AGPOConfig.model_validate(work.teacher.agpo.model_dump() | limits | changes)
    skip = work.teacher.warm_start.model_copy(update={"examples": 0})
    evaluation = work.teacher.evaluation.model_copy(update={"base": False})
    config = work.teacher.model_copy(update={"agpo": settings, "warm_start": skip, "evaluation": evaluation})
    out.mkdir(exist_ok=True)
    if not (evaluations := out / "evaluation.json").exists():  # the warm start's weights have been evaluated
        done = read_json(work.state / "warm_start" / "evaluation.json")
        write_json(evaluations, {phase: done[phase] for phase in ("base", "warm_start") if phase in done})
    metrics = train_teacher(config, work.state / "warm_start" / "model", work.pairs, out).figures
    steps = MetricsLog(out / "metrics.jsonl").read("agpo")
    gaps = [(after["time"] - before["time"]) / 1000 for before, after in itertools.pairwise(steps)]
    return metrics | {
        "steps": len(steps),
        "sampled_tokens": sum(step["sampled_tokens"] for step in steps),
        "step_seconds": round(statistics.median(gaps), 3) if gaps else None,
    }


def annotate_test(work: Work) -> dict[str, Any]:
    """The same test pairs annotated by every teacher, which has its votes and probabilities for each pair."""
    teachers = [name for name in TEACHERS if (work.state / name / "model").exists()]
    return {name: _annotate(work, name, "test", work.test_pairs) for name in teachers}


def annotate_pool(work: Work) -> dict[str, Any]:
    """All of `valid`, then as much of the pool as there is time for, by the trained teacher that is best on `valid`.

    The probabilities in the results are calibrated on `valid`, with the raw ones beside, as the annotation job does.
    """
    aucs = {name: work.phases.get(name, {}).get("agpo/auc", 0.0) for name in TEACHERS[1:]}
    best = max(aucs, key=lambda name: aucs[name])
    limits = {"valid": 10**9, "pool": work.settings.annotate.limit or 10**9}
    splits = {split: _annotate(work, best, split, limit) for split, limit in limits.items()}
    unfinished = any(result["annotated"] < result["pairs"] for result in splits.values())
    return {"teacher": best} | splits | ({"unfinished": "time was up"} if unfinished else {})


def _annotate(work: Work, teacher: str, split: str, limit: int) -> dict[str, Any]:
    """Annotate the first `limit` pairs of a split, in the order of their ids, as a worker of the annotation job does."""
    config = _filling(work.settings.annotate)
    folder, out = work.state / teacher / "model", work.state / "annotations" / teacher
    sampling = sampling_of(config, load_prompt(folder), load_tokenizer(folder))
    key, run = annotation_key(folder, config), take_over(out)
    rows = (
        read_table(work.pairs / "pairs", PAIRS, where=pads.field("split") == split).sort_by("pair_id").slice(0, limit)
    )
    total, graded = rows.num_rows, rows.filter(pc.is_valid(rows["grade"]))["pair_id"].to_pylist()
    done = _annotated(out, key)["pair_id"]
    before = len(done)
    rows = rows.filter(pc.invert(pc.is_in(rows["pair_id"], done)))
    began = time.monotonic()
    job = Job(key, str(folder), str(out), run, config, sampling, 1, _open, calibration=calibration_of(out, key))
    for _ in annotate_partition(
        job, _batches(work, rows, config.part_size, lambda: _write_annotations(work, teacher, key))
    ):
        pass
    seconds = time.monotonic() - began
    if split == "valid":
        recalibrate(out, key, run, work.pairs, graded)
    table = _write_annotations(work, teacher, key)
    new = len(table) - before
    return {
        "pairs": total,
        "annotated": total - rows.num_rows + new,
        "ok": pc.sum(pc.equal(table["status"], "ok")).as_py(),
        "pairs_per_s": round(new / seconds, 2),
        "tokens_per_s": round(pc.mean(table["completion_tokens"]).as_py() * new / seconds, 1) if new else 0.0,
    }


def _filling(config: AnnotateConfig) -> AnnotateConfig:
    """No more pairs at a time than fill the engine: what was started must still be answered when time is up."""
    batch = getattr(config.engine, "batch_size", 0)  # an engine without one keeps a queue of its own
    most = min(config.max_in_flight, -(-batch // config.n)) if batch else config.max_in_flight
    return config.model_copy(update={"max_in_flight": most})


def _open(job: Job) -> Annotator:
    return open_annotator(Path(job.teacher), job.config.engine)


def _batches(work: Work, rows: pa.Table, size: int, each_minute: Callable[[], Any]) -> Iterator[pa.RecordBatch]:
    """`rows` as the annotation job's workers get them, part by part, until time is up."""
    columns = rows.select(["pair_id", "query", "ad_title", "ad_text"])
    attributes = [
        None if value is None else json.dumps(list(map(list, value))) for value in rows["attributes"].to_pylist()
    ]
    columns = columns.append_column("attributes", pa.array(attributes, pa.string()))
    written = time.monotonic()
    for start in range(0, rows.num_rows, size):
        if work.left < _ENDING:
            logger.info("no more pairs are started: %.0f s are left", work.left)
            return
        if time.monotonic() - written > 60:
            each_minute()
            written = time.monotonic()
            logger.info("%d of %d pairs are under way", start, rows.num_rows)
        yield from columns.slice(start, size).combine_chunks().to_batches()


def _annotated(out: Path, key: str) -> pa.Table:
    files = files_of(out, key)
    return (
        pads.dataset([str(file) for file in files], format="parquet").to_table() if files else ANNOTATIONS.empty_table()
    )


def _write_annotations(work: Work, teacher: str, key: str) -> pa.Table:
    """What a teacher has annotated, in files that are small enough to come back; returns all of it."""
    table = _annotated(work.state / "annotations" / teacher, key)
    for number, start in enumerate(range(0, table.num_rows, _FILE_ROWS)):
        with whole_file(work.state / "results" / f"{key}-{teacher}-{number}.parquet") as temporary:
            pq.write_table(table.slice(start, _FILE_ROWS), temporary, compression="zstd")
    return table


def _write_summary(work: Work) -> None:
    machine = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "trl")},
    }
    settings = {name: getattr(work.settings, name).model_dump(mode="json") for name in ("teacher", "annotate")}
    write_json(
        work.state / "results" / "summary.json", {"machine": machine, "phases": work.phases, "settings": settings}
    )


PHASES: dict[str, Callable[[Work], dict[str, Any]]] = {
    phase.__name__: phase
    for phase in (model, base, warm_start, step_ours, step_stock, plan, agpo, grpo, annotate_test, annotate_pool)
}
POLICY_PHASES = ("step_ours", "step_stock", "plan", "agpo", "grpo")  # left out where teacher.agpo.steps is 0

if __name__ == "__main__":
    main()
