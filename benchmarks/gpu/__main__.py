"""Pack what a GPU machine without a network needs, work there within a time limit, and measure what came back.

    python -m benchmarks.gpu pack .gpu --pairs PAIRS                      # here: parcels of at most 61 MiB
    python3 -m benchmarks.gpu run /tmp/gpu --out $OUT --seconds 540       # there; run it again and it goes on
    python3 -m benchmarks.gpu policies /tmp/gpu --out $OUT --seconds 540  # there: AGPO and GRPO side by side, with reasons
    python -m benchmarks.gpu report FOLDER --pairs PAIRS                  # here: teachers on the test pairs, intervals

`run` needs only Python's own library until it has unpacked the wheels that `pack` put into the parcels.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

MODEL = "weights:qwen2.5-coder-1.5b-instruct"


def main() -> None:
    began = time.time()
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    pack = verbs.add_parser("pack", help="write the parcels")
    pack.add_argument("out", type=Path)
    pack.add_argument("--pairs", type=Path, required=True, help="the folder that data-prepare wrote")
    pack.add_argument("--model", default=MODEL, help="weights:NAME, a GGUF file, or a model folder")
    pack.add_argument("--parcel-mib", type=int, default=61, help="a call carries 64 MiB, the repository included")
    pack.add_argument("--no-wheels", action="store_true", help="for a machine that has every package")
    run = verbs.add_parser("run", help="unpack the parcels and work")
    run.add_argument("place", type=Path, help="the folder with the parcels; the state of the work stays in it")
    run.add_argument("--out", type=Path, required=True, help="gets metrics, summary and annotations every minute")
    run.add_argument("--seconds", type=float, required=True, help="ends before so many have passed")
    run.add_argument("--every", type=float, default=60, help="seconds between writes to --out")
    run.add_argument(
        "--config", type=Path, help="settings over the preset single-gpu; this package's recipe.toml if left out"
    )
    run.add_argument("--set", action="append", default=[], help="key=value over those")
    run.add_argument("--name", default="state", help="folder of the state: works of several names go on side by side")
    run.add_argument("--labels", type=int, default=0, help="keep so many human labels of train and of valid; 0: all")
    run.add_argument("--test-pairs", type=int, default=1000, help="pairs of test that every teacher annotates")
    both = verbs.add_parser("policies", help="AGPO and GRPO at the same time, from a warm start on reasons")
    both.add_argument("place", type=Path, help="the folder with the parcels")
    both.add_argument("--out", type=Path, required=True, help="gets an archive of what there is every 15 seconds")
    both.add_argument("--seconds", type=float, required=True, help="ends before so many have passed")
    both.add_argument("--steps", type=int, default=40, help="of each policy")
    both.add_argument("--evaluation", type=float, default=150, help="seconds before the end at which they are stopped")
    both.add_argument("--shards", type=int, default=4, help="processes that ask for reasons")
    both.add_argument("--config", type=Path, default=Path(__file__).with_name("reasons.toml"))
    both.add_argument("--set", action="append", default=[], help="key=value over it")
    both.add_argument("--test-pairs", type=int, default=1000)
    report = verbs.add_parser("report", help="measure the teachers on the test pairs")
    report.add_argument("folder", type=Path, help="what `run` wrote to --out")
    report.add_argument("--pairs", type=Path, required=True)
    options = parser.parse_args()
    if options.verb == "run":
        from benchmarks.gpu.run import run as work

        arguments = [] if options.config is None else ["--config", str(options.config.resolve())]
        arguments += [word for value in options.set for word in ("--set", value)]
        arguments += ["--labels", str(options.labels), "--test-pairs", str(options.test_pairs)]
        deadline = began + options.seconds
        raise SystemExit(work(options.place, options.out, deadline, options.every, options.name, arguments))
    if options.verb == "policies":
        from benchmarks.gpu.policies import train

        arguments = ["--config", str(options.config.resolve())]
        arguments += [word for value in options.set for word in ("--set", value)]
        arguments += ["--test-pairs", str(options.test_pairs)]
        limits = {name: getattr(options, name) for name in ("shards", "steps", "evaluation")}
        raise SystemExit(train(options.place, options.out, began + options.seconds, arguments, **limits))
    from benchmarks.gpu.pack import pack as write_parcels
    from benchmarks.gpu.report import report as measure
    from data.contracts import ContractError

    try:
        if options.verb == "pack":
            write_parcels(options.out, options.pairs, options.model, options.parcel_mib << 20, not options.no_wheels)
        else:
            measure(options.folder, options.pairs)
    except ContractError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
