"""Score query-ad pairs with an exported student: numpy, onnxruntime and tokenizers, nothing else.

This file is copied into every export as `score.py`, so it imports nothing of the product. Training and evaluation take
their text and tokens from here too: one implementation, so what is served is what was measured.
Precision bf16 also needs openvino, and a CPU with units for bfloat16.
As a command it reads JSON lines ({"query": …, "ad_title": …, "ad_text": …, "attributes": {…}}) and writes JSON lines:

    python score.py int8 --at irrelevant:precision=0.95 < pairs.jsonl > scores.jsonl

With `--at`, each pair also has a `decision`: here whether it is one of those that are irrelevant with 95 % precision.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

# bf16 is the fp32 model, computed in bfloat16.
MODEL_FILES = {"fp32": "model.onnx", "int8": "model.int8.onnx", "fp16": "model.fp16.onnx", "bf16": "model.onnx"}
# What a score's model_version says of the precision; it changes with how the precision computes.
VERSIONS = {"fp32": "fp32", "int8": "int8-by-token", "fp16": "fp16", "bf16": "bf16"}
MAX_CHARACTERS = 4000  # of one side; far more than fits any max_length, so that a huge text costs no time


def query_text(query: str) -> str:
    """The first segment of the model's input."""
    return _clean(query)


def ad_text(title: str, text: str | None = None, attributes: Mapping[str, str] | Sequence[Any] | None = None) -> str:
    """The second segment: title, attributes, then the text, so that what is cut for length is the end of the text.

    Parameters: `attributes` is a mapping or, as Arrow gives maps, a list of (name, value). A value that is no text counts as
    its JSON, which is how the data stage stores it.
    """
    parts = [title]
    pairs = attributes.items() if isinstance(attributes, Mapping) else (attributes or ())
    parts += [f"{name}: {shown}" for name, value in sorted(pairs) if (shown := _as_text(value))]
    if text:
        parts.append(text)
    return _clean(" | ".join(parts))


def load_tokenizer(path: Path, max_length: int) -> Tokenizer:
    """The tokenizer of a model folder, set to cut at `max_length` tokens and not to pad.

    An ad that contains "[SEP]" or another special token is read as ordinary characters: an advertiser must not be able
    to end the ad's segment.
    """
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    tokenizer.encode_special_tokens = True
    return tokenizer


def batches_by_length(lengths: Sequence[int] | np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Row numbers, longest rows first, `batch_size` at a time: hardly any padding, and memory peaks at once."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def batches_by_tokens(lengths: Sequence[int] | np.ndarray, tokens: int) -> Iterator[np.ndarray]:
    """Row numbers, longest rows first, in batches of at most `tokens` tokens with padding (one row at least)."""
    lengths = np.asarray(lengths)
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, tokens // max(1, int(lengths[order[start]])))
        yield order[start : start + size]
        start += size


def pad(rows: Sequence[Sequence[int]], value: int = 0, multiple: int = 1) -> np.ndarray:
    """int64 array (len(rows), longest row or the next `multiple`), filled up on the right with `value`."""
    width = max(len(row) for row in rows)
    padded = np.full((len(rows), round_up(width, multiple)), value, dtype=np.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded


def round_up(width: int, multiple: int) -> int:
    """The next multiple from `width` on."""
    return -(-width // multiple) * multiple


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Probabilities float64 (N, K) of `logits` (N, K) divided by `temperature`."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    exponential = np.exp(scaled)
    return exponential / exponential.sum(axis=1, keepdims=True)


def probabilities(
    logits: np.ndarray, temperature: float = 1.0, curves: Sequence[Sequence[Sequence[float]]] | None = None
) -> np.ndarray:
    """Calibrated probabilities float64 (N, K) of logits (N, K): divided by `temperature`, then each grade's by its curve.

    `curves` has for each grade the probabilities before and after, between which lines are drawn; rows sum to 1 again.
    """
    probs = softmax(logits, temperature)
    if curves:
        probs = np.stack([np.interp(probs[:, k], curve[0], curve[1]) for k, curve in enumerate(curves)], axis=1)
        probs /= probs.sum(axis=1, keepdims=True)
    return probs


def parse_decision(text: str, scale: Mapping[str, Any]) -> tuple[int, str, float]:
    """Grade, metric and share of a decision: `irrelevant:precision=0.95`, or `recall=0.9` of what counts as relevant.

    A grade is given by name or number. Raises ValueError with what is wrong.
    """
    names = [grade["name"] for grade in scale["grades"]]
    name, _, rest = text.rpartition(":")
    metric, _, number = rest.partition("=")
    try:
        share = float(number)
    except ValueError:
        share = float("nan")
    if metric not in ("precision", "recall") or not 0 < share <= 1:
        raise ValueError(f"'{text}' is no decision; write precision=0.95 or recall=0.9, or {names[0]}:precision=0.95")
    if not name:
        return scale["relevant_from"], metric, share
    if name in names:
        return names.index(name), metric, share
    if name.isdecimal() and int(name) < len(names):
        return int(name), metric, share
    raise ValueError(f"there is no grade '{name}'; the grades are {', '.join(names)}")


def event_score(grade_probs: np.ndarray, grade: int, relevant_from: int) -> np.ndarray:
    """Probability (N,) of a grade's event: this grade or better where it counts as relevant, else this grade or worse."""
    return (grade_probs[:, grade:] if grade >= relevant_from else grade_probs[:, : grade + 1]).sum(axis=1)


def decision_threshold(text: str, scale: Mapping[str, Any], curves: Sequence[Mapping[str, Sequence[float]]]) -> float:
    """The threshold of `event_score` for a decision: the lowest with the precision, or the highest with the recall.

    `curves` has for each grade the thresholds, falling, and the precision and recall at each on split valid. Raises
    ValueError when no threshold has that precision.
    """
    grade, metric, share = parse_decision(text, scale)
    curve = curves[grade]
    reached = [i for i, value in enumerate(curve[metric]) if value >= share - 1e-12]
    if not reached:
        best = f"; the best has {max(curve['precision']):.3f}" if curve["precision"] else ""
        raise ValueError(f"on the labels of split valid no threshold has {text}{best}")
    return curve["threshold"][reached[-1] if metric == "precision" else reached[0]]


class Scorer:
    """An exported student. `threads` = 0 uses all cores; `precision` fp16 uses a GPU where onnxruntime has one.

    Each thread computes batches of its own: with small batches that is faster than all threads on one large batch.
    Raises ValueError when this machine cannot compute in `precision`.
    """

    def __init__(self, folder: str | Path, precision: str = "fp32", threads: int = 0) -> None:
        folder = Path(folder)
        self.card = json.loads((folder / "student.json").read_text(encoding="utf-8"))
        self.scale = json.loads((folder / "scale.json").read_text(encoding="utf-8"))
        self.tokenizer = load_tokenizer(folder / "tokenizer.json", self.card["max_length"])
        self.threads = threads or os.cpu_count() or 1
        # Other widths take kernels that round otherwise in bfloat16, and a pair's score would depend on its batch.
        self.multiple = 16 if precision == "bf16" else 1
        file = folder / MODEL_FILES[precision]
        self.run = _openvino(file, self.threads) if precision == "bf16" else _onnxruntime(file, precision == "fp16")
        self.version = f"{self.card['fingerprint']}-{VERSIONS[precision]}"
        self.threshold: float = self.card["threshold"]

    def logits(self, texts: Sequence[tuple[str, str]], batch_tokens: int = 384) -> np.ndarray:
        """Logits float32 (N, K) of N (query text, ad text); a batch holds `batch_tokens` tokens, padding included."""
        encodings = self.tokenizer.encode_batch(list(texts))
        out = np.zeros((len(texts), len(self.scale["grades"])), dtype=np.float32)

        def score(rows: np.ndarray) -> None:
            batch = [encodings[i] for i in rows]
            inputs = {
                "input_ids": pad([e.ids for e in batch], self.card["pad_token_id"], self.multiple),
                "attention_mask": pad([e.attention_mask for e in batch], 0, self.multiple),
                "token_type_ids": pad([e.type_ids for e in batch], 0, self.multiple),
            }
            out[rows] = self.run({name: inputs[name] for name in self.card["inputs"]})

        # Few different shapes, too: for each one OpenVINO keeps memory.
        widths = [round_up(len(e), self.multiple) for e in encodings]
        batches = list(batches_by_tokens(widths, batch_tokens))
        if min(self.threads, len(batches)) < 2:
            for rows in batches:
                score(rows)
        else:
            with ThreadPoolExecutor(self.threads) as pool:
                list(pool.map(score, batches))
        return out

    def grade_probs(self, pairs: Iterable[Mapping[str, Any]], batch_tokens: int = 384) -> np.ndarray:
        """Calibrated probabilities float64 (N, K) of the K grades, for rows of the `pairs` table."""
        texts = [(query_text(p["query"]), ad_text(p["ad_title"], p.get("ad_text"), p.get("attributes"))) for p in pairs]
        return probabilities(self.logits(texts, batch_tokens), self.card["temperature"], self.card.get("isotonic"))

    def p_relevant(self, grade_probs: np.ndarray) -> np.ndarray:
        """Probability float64 (N,) that the grade is one that counts as relevant; compare it with `threshold`."""
        return grade_probs[:, self.scale["relevant_from"] :].sum(axis=1)

    def decide(self, grade_probs: np.ndarray, at: str) -> np.ndarray:
        """Whether each pair is caught, bool (N,), by a decision such as `irrelevant:precision=0.95`; raises ValueError."""
        if "decisions" not in self.card:
            raise ValueError("this student was trained by an earlier version, without thresholds; train it again")
        threshold = decision_threshold(at, self.scale, self.card["decisions"])
        return event_score(grade_probs, parse_decision(at, self.scale)[0], self.scale["relevant_from"]) >= threshold


Run = Callable[[dict[str, np.ndarray]], np.ndarray]  # inputs (B, W) by name to logits (B, K)


def _onnxruntime(file: Path, on_gpu: bool) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    gpu = [name for name in ("CUDAExecutionProvider",) if name in onnxruntime.get_available_providers()]
    # On the CPU the fused "add, then normalise" takes eight times as long as the two operations one after the other,
    # and the fused "add the bias, then GELU" half as long again.
    session = onnxruntime.InferenceSession(
        str(file),
        options,
        providers=[*(gpu if on_gpu else ()), "CPUExecutionProvider"],
        disabled_optimizers=["SkipLayerNormFusion", "BiasGeluFusion"],
    )
    return lambda inputs: session.run(None, inputs)[0]


def _openvino(file: Path, threads: int) -> Run:
    refuse_bf16()
    import openvino

    model = openvino.Core().compile_model(
        str(file),
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": openvino.Type.bf16,
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": threads,  # each thread has a core, and a request of its own
        },
    )
    of_thread = threading.local()

    def run(inputs: dict[str, np.ndarray]) -> np.ndarray:
        if not hasattr(of_thread, "request"):
            of_thread.request = model.create_infer_request()
        return np.array(of_thread.request.infer(inputs)[0])

    return run


def refuse_bf16() -> None:
    """Raises ValueError when precision bf16 cannot be had on this machine."""
    try:
        import openvino
    except ImportError:
        raise ValueError("precision bf16 needs the package openvino (pip install openvino)") from None
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise ValueError("this CPU has no units for bfloat16 (AMX or AVX512-BF16); take precision fp32 or int8")


def _as_text(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False)


def _clean(text: str) -> str:
    # A lone surrogate (from a broken escape in JSON) cannot be encoded and would stop the tokenizer.
    return text[:MAX_CHARACTERS].encode("utf-8", "replace").decode("utf-8")


def main() -> None:
    """Standard input to standard output, JSON lines, in windows of a thousand; ends at a line that is no pair."""
    parser = argparse.ArgumentParser(prog="score.py", description="Score pairs: JSON lines in, JSON lines out.")
    parser.add_argument("precision", nargs="?", default="fp32", help=f"which model: {', '.join(MODEL_FILES)}")
    parser.add_argument(
        "--at", metavar="[GRADE:]precision=SHARE", help="also decide, at this precision (or recall=SHARE)"
    )
    options = parser.parse_args()
    folder = Path(__file__).parent
    there = [precision for precision, file in MODEL_FILES.items() if (folder / file).exists()]
    if options.precision not in there:
        sys.exit(f"score.py: there is no precision '{options.precision}'; give {' or '.join(there)}")
    window: list[dict[str, Any]] = []

    def flush() -> None:
        probs = scorer.grade_probs(window) if window else np.zeros((0, len(scorer.scale["grades"])))
        decisions = scorer.decide(probs, options.at) if options.at else [None] * len(probs)
        for p, row, decision in zip(scorer.p_relevant(probs), probs, decisions, strict=True):
            line = {"p_relevant": float(p), "relevant": bool(p >= scorer.threshold), "grades": row.tolist()}
            print(json.dumps(line if decision is None else line | {"decision": bool(decision)}))
        window.clear()

    try:
        scorer = Scorer(folder, options.precision)
        flush()  # nothing yet, but a decision that cannot be taken
    except ValueError as error:
        sys.exit(f"score.py: {error}")
    for number, line in enumerate(sys.stdin.buffer, 1):
        if line.strip():
            try:
                window.append(parse_pair(line))
            except ValueError as error:
                flush()
                sys.exit(f"score.py: line {number} {error}; the lines before it are scored")
        if len(window) == 1000:
            flush()
    flush()


def parse_pair(line: bytes) -> dict[str, Any]:
    """One JSON line as a row of the `pairs` table; raises ValueError, which goes on where "line 3" left off."""
    try:
        row = json.loads(line)
        if isinstance(row, dict) and isinstance(attributes := row.get("attributes"), dict):
            row["attributes"] = {name: _as_text(value) for name, value in attributes.items()}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from None
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("query", "ad_title")):
        raise ValueError("is no pair: it needs the texts `query` and `ad_title`")
    if not isinstance(row.get("ad_text") or "", str) or not isinstance(row.get("attributes") or {}, dict):
        raise ValueError("is no pair: `ad_text` must be a text and `attributes` an object, where they are given")
    return row


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # when nobody reads on, as behind `head`, end without a word, as other tools do
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main()
