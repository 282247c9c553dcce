"""AGPO and GRPO side by side on the GPU machine, from one warm start, each then measured on the same test pairs.

What `run` does one after the other fits into ten minutes for a teacher of the grade alone. With reasons it does not: here
several processes ask for the reasons, a part of the pairs each, and both policies train at the same time. A policy that has
not ended when only the evaluation's time is left is stopped, and the last checkpoint that both have is measured.

This process uses Python's own library alone, but for what it starts.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import time
from pathlib import Path

from benchmarks.gpu.run import kill, prepared, start

ESTIMATORS = ("agpo", "grpo")
_MARGIN = 10.0  # seconds before the deadline at which all is stopped


class Policies:
    """The processes of one visit; every state is a folder of `place`, as `run` has them."""

    def __init__(self, place: Path, out: Path, deadline: float, arguments: list[str]) -> None:
        self.place, self.out, self.arguments = place, out, arguments
        self.deadline = deadline - _MARGIN
        self.payload, self.environment = prepared(place)
        self.running: list[subprocess.Popen[bytes]] = []
        self._packed = 0.0  # when, in seconds since 1970
        out.mkdir(parents=True, exist_ok=True)

    def start(self, module: str, log: str, *words: str) -> subprocess.Popen[bytes]:
        """A process of this package, whose output goes into the file `log` of `place`."""
        process = start(module, list(words), self.place / log, self.environment)
        self.running.append(process)
        return process

    def work(self, name: str, phase: str) -> subprocess.Popen[bytes]:
        """`benchmarks.gpu.work` on state `name`, which does `phase` alone."""
        (self.place / name).mkdir(exist_ok=True)
        paths = ["--payload", str(self.payload), "--state", str(self.place / name), "--deadline", str(self.deadline)]
        return self.start("work", f"{name}.log", *paths, "--only", phase, *self.arguments)

    def wait(self, processes: list[subprocess.Popen[bytes]], until: float) -> None:
        """Until they have ended or `until`, in seconds since 1970; brings home what there is every 15 seconds."""
        while any(process.poll() is None for process in processes) and time.time() < until:
            time.sleep(min(1.0, max(0.0, until - time.time())))
            if time.time() - self._packed > 15:
                self.pack()

    def pack(self) -> None:
        """All results so far as one archive, since few files come back from such a machine."""
        self._packed = time.time()
        patterns = ("*.log", "*/phases.json", "*/results/[!.]*", "*/*/metrics.jsonl", "*/*/reasons.json")
        with tarfile.open(self.out / ".all.tgz", "w:gz") as archive:
            for path in sorted(path for pattern in patterns for path in self.place.glob(pattern)):
                archive.add(path, path.relative_to(self.place))
        (self.out / ".all.tgz").rename(self.out / "all.tgz")

    def stop(self, processes: list[subprocess.Popen[bytes]]) -> None:
        for process in processes:
            if process.poll() is None:
                kill(process)


def train(
    place: Path, out: Path, deadline: float, arguments: list[str], *, shards: int, steps: int, evaluation: float
) -> int:
    """Warm start, both policies with `steps` steps, and the test pairs of all three by `deadline` (seconds since 1970).

    `evaluation` is how many seconds before it the policies are stopped. Returns the exit code.
    """
    here = Policies(place, out, deadline, [*arguments, "--set", f"teacher.agpo.steps={steps}"])
    here.wait([here.work("unpacked", "model")], here.deadline)
    asked = [
        here.start("shard", "shards.log", str(here.payload), str(place), str(i), str(shards), *arguments)
        for i in range(shards)
    ]
    here.wait(asked, here.deadline)
    for path in place.glob("shard-*/cache/*/*.parquet"):
        kept = place / "warm" / "warm_start" / "reasons" / path.parent.name
        kept.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, kept / path.name)
    here.wait([here.work("warm", "warm_start")], here.deadline)
    warm = place / "warm" / "warm_start"
    if not (warm / "model").exists():
        here.stop(here.running)
        here.pack()
        print((place / "warm.log").read_text("utf-8", "replace")[-3000:])
        return 1
    policies = {}
    for name in ESTIMATORS:
        _fork(warm, place / name / "warm_start")
        policies[name] = here.work(name, name)
    _fork(warm, place / "measured-warm_start" / "warm_start")
    measuring = [here.work("measured-warm_start", "annotate_test")]
    stop = here.deadline - evaluation
    here.wait(list(policies.values()), stop)
    late = [name for name in ESTIMATORS if not (place / name / name / "model").exists()]
    here.stop([policies[name] for name in late])
    common = min((_last_checkpoint(place / name / name) for name in late), default=0)
    merging = [
        here.start("merge", f"{name}.log", str(warm / "model"), str(place / name / name), str(common)) for name in late
    ]
    here.wait(merging, here.deadline)
    for name in ESTIMATORS:
        if (place / name / name / "model").exists():
            _fork(place / name / name, place / f"measured-{name}" / name)
            measuring.append(here.work(f"measured-{name}", "annotate_test"))
    here.wait(measuring, here.deadline)
    here.stop(here.running)
    here.pack()
    measured = [name for name in ("warm_start", *ESTIMATORS) if list(place.glob(f"measured-{name}/results/*.parquet"))]
    print(json.dumps({"measured": measured, "stopped": late, "checkpoint": common}))
    return 0 if len(measured) == 1 + len(ESTIMATORS) else 1


def _fork(source: Path, target: Path) -> None:
    """What a state needs of another's training, by links."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("model", "evaluation.json", "reasons.parquet", "reasons.json"):
        if (source / name).exists() and not (target / name).exists():
            (target / name).symlink_to((source / name).resolve())


def _last_checkpoint(training: Path) -> int:
    """The step of a training's last checkpoint; 0 without one."""
    steps = (int(path.name.rsplit("-", 1)[1]) for path in training.glob("checkpoints/agpo/checkpoint-*"))
    return max(steps, default=0)
