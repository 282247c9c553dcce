"""Folders that are filled under a hidden name: those of living processes are held by a lock, those of killed ones removed.

What was left out: file systems without locks. There a folder that a killed process left stays for a day.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)

_LOCK = "lock"
_NEW = ".new-"  # not held yet
_HELD = ".making-"
# Earlier releases named them by the kind of model and did not hold them.
_OURS = re.compile(r"\.(new|making|hf|pypi|weights|scratch)-\w{8}", re.ASCII)
_UNHELD_SECONDS = 24 * 3600.0


@contextmanager
def staging(place: Path) -> Iterator[Path]:
    """A new folder in `place`, which is removed at the end, or by `remove_leftovers` if this process is killed."""
    place.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=_NEW, dir=place))
    lock = os.open(new / _LOCK, os.O_RDWR | os.O_CREAT)
    try:
        with suppress(OSError):  # without locks it is known by its age
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Only now under the name that others try: the lock is that of the file, whatever its folder is called.
        folder = new.rename(place / new.name.replace(_NEW, _HELD))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def remove_leftovers(place: Path) -> None:
    """Remove the folders of `staging` in `place` whose process has been killed."""
    for folder in place.glob(".*"):
        if _OURS.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink() and _left(folder):
            shutil.rmtree(folder, ignore_errors=True)  # another user's may stay, and another process be quicker
            logger.info("removed %s, which a killed process had left", folder)


def _left(folder: Path) -> bool:
    """Whether nobody holds a folder; where no lock can say it, one counts as left a day after its last change."""
    if not folder.name.startswith(_HELD):
        return _age(folder) > _UNHELD_SECONDS
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR)
    except OSError:  # it is another user's, or was removed just now
        return _age(folder) > _UNHELD_SECONDS
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES) and _age(folder) > _UNHELD_SECONDS
    finally:
        os.close(lock)
    return True


def _age(folder: Path) -> float:
    """Seconds since the last change of anything in it."""
    changed = 0.0
    for path in (folder, *folder.rglob("*")):
        with suppress(FileNotFoundError):  # its process lives and goes on
            changed = max(changed, path.lstat().st_mtime)
    return time.time() - changed
