"""A teacher trained by several processes, one for each GPU: `torchrun` starts them, accelerate joins them in the trainers.

The calling process writes the task into a file, starts the launcher and reads the result from a file; `python -m
teacher.launch FILE` is what runs in each process. On a machine without a GPU the processes share the CPU (gloo): good for a
test, not for speed.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

from teacher.config import TeacherConfig
from teacher.distributed import is_main, world_size


def launch(config: TeacherConfig, base: Path, pairs: Path, out: Path) -> dict[str, Any]:
    """Run `train_teacher` in `config.processes` processes; returns the fields of its `TeacherResult`.

    Raises:
        RuntimeError: a process failed; its own message stands above in the log.
    """
    out.mkdir(parents=True, exist_ok=True)
    task, result = out / "launch.json", out / "launch-result.json"
    result.unlink(missing_ok=True)
    paths = {"base": str(base.resolve()), "pairs": str(pairs.resolve()), "out": str(out.resolve())}
    task.write_text(json.dumps({"config": config.model_dump(mode="json"), **paths}), encoding="utf-8")
    # Everything but the file's own path is fixed text: nothing of the data becomes a word of this command.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(config.processes)]
    done = subprocess.run([*command, "-m", "teacher.launch", str(task.resolve())], check=False)
    if done.returncode or not result.exists():
        raise RuntimeError(
            f"the training in {config.processes} processes failed with exit code {done.returncode}: see its messages above; "
            "running it again resumes from the last checkpoint"
        )
    found = json.loads(result.read_text(encoding="utf-8"))
    task.unlink()
    result.unlink()
    return found


def main() -> None:
    from teacher.train import train_teacher

    if world_size() == 1:  # or each process would start processes of its own
        raise SystemExit("teacher.launch is what torchrun starts; call train_teacher instead")
    logging.basicConfig(level=logging.INFO if is_main() else logging.ERROR, format="%(asctime)s %(name)s %(message)s")
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    out = Path(task["out"])
    result = train_teacher(TeacherConfig.model_validate(task["config"]), Path(task["base"]), Path(task["pairs"]), out)
    if is_main():
        (out / "launch-result.json").write_text(json.dumps(dataclasses.asdict(result)), encoding="utf-8")


if __name__ == "__main__":
    main()
