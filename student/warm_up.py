"""Learning from unlabelled pairs before the first label.

A new head on an encoder knows nothing of relevance, and a few thousand labels do not teach it what the encoder's own cosine
says for nothing. So the cross-encoder first learns to agree with a free score (the cosine, BM25, another encoder's cosine)
on pairs of splits pool and train, whose grades are not read, and that random pairs are irrelevant. A warmed-up encoder is
kept under the digest of all that made it: trials that differ in what follows share one.

Targets are ranks, since scores of different sources have no common scale: the lowest pair has LOWEST, the highest 1. A
target t is learned as the binomial distribution of K − 1 raters who each say "relevant" with probability t, so that every
grade's logit has a meaning when the labels come.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from filelock import FileLock
from scipy.stats import binom, rankdata

from data.contracts import ContractError, MetricsLog, digest, digest_files
from student.baselines import Bm25
from student.config import StudentConfig
from student.dataset import Examples, sample_texts
from student.fit import fit
from student.model import quiet_transformers, save_tokenizer
from student.setup import Setup

logger = logging.getLogger(__name__)
Array = np.ndarray
LOWEST = 0.3
HARD_NEGATIVE = 0.15
RANDOM_NEGATIVE = 0.02
NEAR = (10, 50)
"""Of a query's nearest ads, which places are mined: the nearest ones may well be relevant."""


def warm_up(setup: Setup, pairs: Path, valid: Examples, cache: Path, metrics: MetricsLog) -> Path:
    """The folder, inside `cache`, of the student's classifier after its warm-up, which is done if it is not there yet.

    Raises `ContractError` when splits pool and train hold no pair.
    """
    rows = sample_texts(pairs, setup.config.warm_up.pairs, setup.config.seed, setup.scale.size)
    if not len(rows):
        raise ContractError(
            f"{pairs} has no pairs in splits pool and train to warm up on; set student.warm_up.pairs to 0"
        )
    setup = replace(setup, config=_training_config(setup.config))
    start = [folder for folder in (setup.base, setup.scored_by) if folder]
    weights = digest_files(file for folder in start for file in sorted(folder.glob("*.safetensors")))
    tokenizers = [setup.tokenizer.to_str()]
    if setup.scored_by:
        tokenizers.append(digest_files(sorted(setup.scored_by.glob("tokenizer*"))))
    texts = [[*row] for row in zip(rows.pair_ids, rows.queries, rows.ads, strict=True)]
    settings = setup.config.model_dump(exclude={"device"}, exclude_defaults=True)
    folder = cache / digest([settings, setup.scale.size, weights, tokenizers, texts, valid.digest()])
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{folder.name}.lock"):  # of trials that run at once the first one trains
        if folder.exists():
            logger.info("warm-up: reused from %s", folder)
        else:
            _train(setup, rows, valid, folder, metrics)
    return folder


def _train(setup: Setup, rows: Examples, valid: Examples, folder: Path, metrics: MetricsLog) -> None:
    targets, (negatives, negative_targets) = rank_targets(free_scores(setup, rows)), negative_pairs(setup, rows)
    training = with_targets(rows.joined(negatives), np.r_[targets, negative_targets], setup.scale.size)
    logger.info("warm-up: %d unlabelled pairs by %s, %d negatives", len(rows), _source(setup), len(negatives))
    checkpoints, building = (folder.with_name(f".{folder.name}.{part}") for part in ("checkpoints", "building"))
    fitted = fit(setup, training, valid, folder=checkpoints, metrics=metrics, phase="warm_up")
    shutil.rmtree(building, ignore_errors=True)
    with quiet_transformers():
        fitted.reader.model.save_pretrained(building)
    building.rename(folder)
    shutil.rmtree(checkpoints, ignore_errors=True)


def free_scores(setup: Setup, rows: Examples) -> Array:
    """What costs no label: a score (N,) of each pair by the source that the settings name."""
    config = setup.config
    if config.warm_up.source == "bm25":
        return Bm25(list(rows.ads)).scores(rows.queries, rows.ads, relative=True)
    encoder = setup.encoder()
    if setup.scored_by:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = save_tokenizer(setup.scored_by, Path(folder), config.max_length)
        encoder = replace(encoder, base=setup.scored_by, tokenizer=tokenizer)
    return encoder.cosine(rows.queries, rows.ads)


def rank_targets(scores: Array) -> Array:
    """Targets (N,) from LOWEST to 1 by the rank of each score; equal scores share their mean rank."""
    return LOWEST + (1 - LOWEST) * (rankdata(scores) - 1) / max(len(scores) - 1, 1)


def negative_pairs(setup: Setup, rows: Examples) -> tuple[Examples, Array]:
    """Pairs of a query with an ad that no row pairs it with, and their targets."""
    config, rng = setup.config.warm_up, np.random.default_rng([setup.config.seed, 1])
    ads_of: dict[str, set[str]] = {}
    for query, ad in zip(rows.query_id, rows.ads, strict=True):
        ads_of.setdefault(query, set()).add(ad)
    drawn = rng.integers(len(rows), size=(round(config.random_negatives * len(rows)), 2))
    hard = mined(setup, rows, rng, round(config.hard_negatives * len(rows)))
    places = np.concatenate([drawn, hard])
    targets = np.r_[np.full(len(drawn), RANDOM_NEGATIVE), np.full(len(hard), HARD_NEGATIVE)]
    apart = np.array([rows.ads[ad] not in ads_of[rows.query_id[query]] for query, ad in places], dtype=bool)
    queries, ads = places[apart].T if apart.any() else np.zeros((2, 0), np.int64)
    ids = np.array([f"{rows.pair_ids[q]}-{rows.pair_ids[a]}" for q, a in zip(queries, ads, strict=True)], dtype=object)
    return replace(rows.take(queries), ads=rows.ads[ads], pair_ids=ids), targets[apart]


def mined(setup: Setup, rows: Examples, rng: np.random.Generator, count: int) -> Array:
    """Places (count, 2) in `rows` of a query and of an ad that is near it by the encoder's cosine, in places `NEAR`."""
    if not count:
        return np.zeros((0, 2), np.int64)
    _, unique = np.unique(rows.ads, return_index=True)
    asked = rng.integers(len(rows), size=count)
    encoder = setup.encoder()
    ads, queries = encoder.vectors(list(rows.ads[unique])), encoder.vectors(list(rows.queries[asked]))
    low, high = (min(place, len(unique)) for place in NEAR)
    places = np.zeros((count, 2), np.int64)
    for i, query in enumerate(queries):
        nearest = np.argsort(-(ads @ query), kind="stable")[:high]
        choice = nearest[int(rng.integers(min(low, high - 1), high))]
        places[i] = asked[i], unique[choice]
    return places


def with_targets(rows: Examples, targets: Array, grades: int) -> Examples:
    """The rows with targets (N,) in 0 … 1 as distributions over the grades, which nobody's label has a part in."""
    soft = binom.pmf(np.arange(grades), grades - 1, targets[:, None])
    return replace(rows, soft=soft, gold=np.zeros_like(soft), mix=np.zeros(len(rows)), weight=np.ones(len(rows)))


def _training_config(config: StudentConfig) -> StudentConfig:
    """What of the settings matters in the warm-up, with all else at its default, so that it can be shared."""
    names = ("warm_up", "max_length", "batch_size", "eval_batch_size", "weight_decay", "max_grad_norm")
    common = {name: getattr(config, name) for name in (*names, "device", "precision", "seed")}
    return StudentConfig(
        **common, epochs=config.warm_up.epochs, learning_rate=config.warm_up.learning_rate, patience=100
    )


def _source(setup: Setup) -> str:
    config = setup.config.warm_up
    return config.source + (f" of {config.encoder}" if config.encoder else "")
