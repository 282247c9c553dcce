"""The main process on the GPU machine: unpacks, starts the work, writes what there is every minute, and ends in time.

It uses Python's own library alone, and never touches the GPU: whatever happens to the work, it ends and its results come
back. The work is killed when time is up; run again, it goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

_MARGIN = 10.0  # seconds before the deadline at which the work is killed
_REPOSITORY = Path(__file__).parents[2]


def run(place: Path, out: Path, deadline: float, every: float, name: str, arguments: list[str]) -> int:
    """Work on the parcels in `place` until `deadline` (seconds since 1970); returns the exit code, 0 also if time was up.

    The work's state is in `place`/`name`: works of several names, with settings of their own, share the base model. Every
    `every` seconds `out` gets `summary.json`, `metrics.jsonl`, `work.log` and Parquet files of annotations.
    """
    out.mkdir(parents=True, exist_ok=True)
    state = place / name
    state.mkdir(parents=True, exist_ok=True)
    payload, environment = prepared(place)
    task = ["--payload", str(payload), "--state", str(state), "--deadline", str(deadline - _MARGIN), *arguments]
    work = start("work", task, state / "work.log", environment)
    ended = False
    while not ended and (left := deadline - _MARGIN - time.time()) > 0:
        try:
            work.wait(min(every, left))
            ended = True
        except subprocess.TimeoutExpired:
            pass  # a minute has passed
        _write_results(state, out)
    if not ended:
        kill(work)
        _write_results(state, out)
    print((state / "work.log").read_text("utf-8", "replace")[-6000:])
    print("all phases are done" if ended and not work.returncode else "not finished: run it again and it goes on")
    return work.returncode if ended else 0


def prepared(place: Path) -> tuple[Path, dict[str, str]]:
    """What the parcels in `place` hold, unpacked, and the environment of processes that use it."""
    payload = _unpacked(place)
    return payload, os.environ | _environment(_site(place, payload))


def start(module: str, words: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """A process of this package with a session of its own, whose output is added to `log`."""
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.gpu.{module}", *words],
            cwd=_REPOSITORY, env=environment, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a process of `start`, with all that it has started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _unpacked(place: Path) -> Path:
    """The folder with what the parcels hold; raises `SystemExit` when one of them is not there yet."""
    payload = place / "payload"
    if payload.exists():
        return payload
    found = {path.name: path for path in place.glob("parcel-*-of-*")}
    counts = {int(name.rsplit("-", 1)[1]) for name in found}
    if len(counts) != 1:
        raise SystemExit(f"{place} holds no parcels, or those of several packings: {sorted(found)}")
    names = [f"parcel-{number}-of-{max(counts)}" for number in range(1, max(counts) + 1)]
    if lacking := [name for name in names if name not in found]:
        raise SystemExit(f"{place} lacks {', '.join(lacking)}: send them first")
    temporary = place / "payload.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    with (place / "parcels.tar").open("wb") as whole:
        for name in names:
            with found[name].open("rb") as part:
                shutil.copyfileobj(part, whole, 1 << 20)
    with tarfile.open(place / "parcels.tar") as archive:
        archive.extractall(temporary, filter="data")
    temporary.rename(payload)
    for path in (place / "parcels.tar", *found.values()):
        path.unlink()
    return payload


def _site(place: Path, payload: Path) -> Path:
    """A folder with the packages that were sent along, for PYTHONPATH."""
    # By this name dill knows modules that are installed from others, which it would pickle, and pyarrow cannot be.
    site = place / "site-packages"
    wheels = [*payload.glob("wheels/*.whl"), *place.glob("extra/*.whl")]
    if wheels and not site.exists():
        options = ["-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--disable-pip-version-check"]
        temporary = place / "site-packages.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", *options, "--target", str(temporary), *map(str, wheels)]
        subprocess.run(command, check=True)
        temporary.rename(site)
    return site


def _environment(site: Path) -> dict[str, str]:
    path = os.pathsep.join([str(site), str(_REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "passive"}
    return {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **offline}


def _write_results(state: Path, out: Path) -> None:
    """Copy what the work has written so far: each file is whole, as the work renames it into its place."""
    for path in sorted(state.glob("results/[!.]*")):
        shutil.copyfile(path, out / path.name)
    shutil.copyfile(state / "work.log", out / "work.log")
    lines = [
        json.dumps({"part": path.parent.name} | json.loads(line))
        for path in sorted(state.glob("*/metrics.jsonl"))
        for line in re.findall(r".+(?=\n)", path.read_text("utf-8"))  # a line that is being written has no end yet
    ]
    (out / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
