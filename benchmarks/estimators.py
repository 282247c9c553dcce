"""The experiment of the paper at our scale: what each advantage estimator does to accuracy and to pass@k.

    python -m benchmarks.estimators --task countdown --out runs/estimators
    python -m benchmarks.estimators --task relevance --pairs runs/demo/pairs --out runs/estimators
    python -m benchmarks.estimators --task gsm8k --model path:DIR --math ../shared/data/math --out runs/estimators   (a GPU)

Every method starts from the same warm start (one for each seed) and gets the same prompts in the same order, the same
settings and the same budget of sampled tokens. A method and a seed are one process and one result file, so that an
interrupted experiment goes on where it was. Out: `TASK/table.md`, `TASK/passk.png`, `TASK/summary.json`, and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.children import run
from benchmarks.estimator_run import result_file, run_method
from teacher.passk import pass_at_k

METHODS = ("base", "warm_start", "grpo", "dr_grpo", "nsr", "w_reinforce", "ngrpo", "a_grae", "agpo")
DELTAS, NEGATIVES = (0.5, 1, 2), (0, -0.1, -0.3, -1)
ABLATION = tuple(f"agpo:delta={delta},negative={negative}" for delta in DELTAS for negative in NEGATIVES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("countdown", "relevance", "gsm8k"), default="countdown")
    parser.add_argument("--out", type=Path, default=Path("runs/estimators"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="names, or agpo:delta=1,negative=-0.3")
    parser.add_argument(
        "--ablation", action="store_true", help="also δ × R for AGPO, with the first seed, on validation"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, one thread each when more than one")
    parser.add_argument("--pairs", type=Path, help="relevance: the pairs folder of a run of preset sample")
    parser.add_argument("--math", type=Path, help="gsm8k: the folder with the math sets")
    parser.add_argument("--model", help="gsm8k: the model to start from, path:DIR or hf:NAME")
    parser.add_argument("--child", nargs=2, metavar=("METHOD", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        run_method(options, options.child[0], int(options.child[1]))
        return
    began = time.monotonic()
    folder = options.out / options.task
    jobs = [(method, seed) for seed in options.seeds for method in options.methods]
    if options.ablation:
        jobs += [(method, options.seeds[0]) for method in ABLATION]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda seed: _child("warm_start", seed, options.jobs), options.seeds))
        list(pool.map(lambda job: _child(job[0], job[1], options.jobs), jobs))
    summary = summarise(folder, options.methods, options.seeds)
    if options.ablation:
        summary["ablation"] = ablation(folder, options.seeds[0])
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(table(summary), encoding="utf-8")
    plot(summary, folder / "passk.png")
    minutes = (time.monotonic() - began) / 60
    print(json.dumps({"benchmark": "estimators", "task": options.task, "minutes": round(minutes, 1), **summary}))


def summarise(folder: Path, methods: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Means over seeds on the test problems, with 95 % intervals from a bootstrap over seeds and problems.

    Problems are the same for every seed, so that one draw of problems serves all methods: differences between methods are
    paired, and the hypothesis is judged on them.
    """
    rng = np.random.default_rng(0)
    runs = {
        method: [json.loads(result_file(folder, method, seed).read_text("utf-8")) for seed in seeds]
        for method in methods
    }
    first = next(iter(runs.values()))[0]["test"]
    samples, problems = first["samples"], len(first["right"])
    draws = [(rng.integers(len(seeds), size=len(seeds)), rng.integers(problems, size=problems)) for _ in range(2000)]

    def interval(values: np.ndarray) -> list[float]:
        """Of (seeds, problems): mean and the 2.5 % and 97.5 % quantiles of its bootstrap."""
        means = [values[np.ix_(s, p)].mean() for s, p in draws]
        return [round(float(x), 4) for x in (values.mean(), *np.quantile(means, [0.025, 0.975]))]

    ks = [2**i for i in range(samples.bit_length())]
    by_k = {
        method: {k: np.array([pass_at_k(samples, np.array(run["test"]["right"]), k) for run in found]) for k in ks}
        for method, found in runs.items()
    }
    rows = {}
    for method, found in runs.items():
        greedy = np.array([run["test"]["greedy"] for run in found])
        rows[method] = {
            "greedy": [round(float(greedy.mean()), 4), round(float(greedy.std(ddof=1)), 4) if len(greedy) > 1 else 0.0],
            "pass": {k: interval(by_k[method][k]) for k in ks},
            "distinct": round(float(np.mean([np.mean(run["test"]["distinct"]) for run in found])), 2),
            **{
                name: round(float(np.mean([run["test"][name] for run in found])), 4)
                for name in ("entropy", "parse_rate", "tokens")
            },
            **{
                name: round(float(np.mean([run.get(name, 0) for run in found])), 1)
                for name in ("sampled_tokens", "steps", "seconds")
            },
            "stopped": [run["stopped"] for run in found if run.get("stopped")],
        }
    most = max(ks)
    pairs = {}
    for better, worse, k in (
        ("agpo", "base", most),
        ("agpo", "warm_start", most),
        ("grpo", "base", most),
        ("grpo", "warm_start", most),
        ("agpo", "grpo", most),
        ("agpo", "grpo", 1),
    ):
        if better in by_k and worse in by_k:
            pairs[f"{better} - {worse}, pass@{k}"] = interval(by_k[better][k] - by_k[worse][k])
    return {"seeds": list(seeds), "problems": problems, "samples": samples, "methods": rows, "differences": pairs}


def ablation(folder: Path, seed: int) -> dict[str, Any]:
    """AGPO's δ and R on the validation problems: every cell, and pass@k of the extremes' difference averaged over the other.

    The intervals are of the problems alone (95 %, paired bootstrap): it is one seed.
    """
    ks, rng = (1, 16, 64), np.random.default_rng(0)
    cells: dict[str, dict[str, float]] = {}
    passed = []
    for method in ABLATION:
        valid = json.loads(result_file(folder, method, seed).read_text("utf-8"))["valid"]
        passed.append([pass_at_k(valid["samples"], np.array(valid["right"]), k) for k in ks])
        by_k = {f"pass@{k}": round(float(values.mean()), 4) for k, values in zip(ks, passed[-1], strict=True)}
        cells[method] = {"greedy": round(valid["greedy"], 4), **by_k, "entropy": round(valid["entropy"], 4)}
    grid = np.array(passed).reshape(len(DELTAS), len(NEGATIVES), len(ks), -1)
    draws = rng.integers(grid.shape[-1], size=(2000, grid.shape[-1]))
    effects = {}
    for name, change in (
        (f"R {NEGATIVES[-1]:g} - R {NEGATIVES[0]:g}", grid[:, -1].mean(0) - grid[:, 0].mean(0)),
        (f"delta {DELTAS[-1]:g} - delta {DELTAS[0]:g}", grid[-1].mean(0) - grid[0].mean(0)),
    ):
        for k, values in zip(ks, change, strict=True):
            limits = np.quantile(values[draws].mean(1), [0.025, 0.975])
            effects[f"{name}, pass@{k}"] = [round(float(x), 4) for x in (values.mean(), *limits)]
    return {"cells": cells, "effects": effects}


def table(summary: dict[str, Any]) -> str:
    """The summary as Markdown."""
    ks = [k for k in (1, 4, 16, 64, 256) if k <= summary["samples"]]
    head = ["method", "greedy", *(f"pass@{k}" for k in ks), "entropy", "distinct right", "parsed", "sampled tokens"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for method, row in summary["methods"].items():
        passes = ["{:.3f} [{:.3f}, {:.3f}]".format(*row["pass"][k]) for k in ks]
        cells = [
            method,
            "{:.3f} ± {:.3f}".format(*row["greedy"]),
            *passes,
            f"{row['entropy']:.3f}",
            f"{row['distinct']:.1f}",
            f"{row['parse_rate']:.3f}",
            f"{row['sampled_tokens']:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += _differences(summary["differences"])
    if "ablation" in summary:
        lines += [
            "",
            "| AGPO's δ and R (validation) | greedy | pass@1 | pass@16 | pass@64 | entropy |",
            "|---|---|---|---|---|---|",
        ]
        for method, row in summary["ablation"]["cells"].items():
            lines.append(
                f"| {method.removeprefix('agpo:')} | " + " | ".join(f"{value:.3f}" for value in row.values()) + " |"
            )
        lines += _differences(summary["ablation"]["effects"])
    return "\n".join(lines) + "\n"


def _differences(found: dict[str, list[float]]) -> list[str]:
    rows = [f"| {name} | {mean:+.3f} | {low:+.3f} … {high:+.3f} |" for name, (mean, low, high) in found.items()]
    return ["", "| difference | mean | 95 % interval |", "|---|---|---|", *rows]


def plot(summary: dict[str, Any], path: Path) -> None:
    """pass@k by method, on a logarithmic k axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for method, row in summary["methods"].items():
        ks = list(row["pass"])
        means, low, high = zip(*row["pass"].values(), strict=True)
        style = {"base": ":", "warm_start": "--"}.get(method, "-")
        (line,) = axes.plot(
            ks, means, style, marker="o", markersize=3, label=method, linewidth=2.5 if method == "agpo" else 1.3
        )
        if method in ("agpo", "grpo", "warm_start"):
            axes.fill_between(ks, low, high, color=line.get_color(), alpha=0.12)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("k")
    axes.set_ylabel("pass@k")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _child(method: str, seed: int, jobs: int) -> None:
    run("benchmarks.estimators", *sys.argv[1:], "--child", method, str(seed), one_thread=jobs > 1)


if __name__ == "__main__":
    main()
