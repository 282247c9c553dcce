"""The errors that are messages for a person."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class ContractError(ValueError):
    """Input that a person must mend: one sentence with the cause and the remedy, shown without a traceback."""


class Unavailable(ContractError):
    """An outside service does not answer: the same work may succeed later, and what was done so far is kept."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says that memory is not enough; there are several kinds, on a GPU and without one."""
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, at most 300 characters; its kind where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


@contextmanager
def enough_memory(what: str, remedy: str) -> Iterator[None]:
    """Inside, or for a function that it decorates, memory that is not enough is a `ContractError` with this remedy."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise ContractError(f"{what}: memory is not enough ({first_line(error)}): {remedy}") from error
