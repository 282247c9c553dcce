"""A teacher ready to annotate: the engine that runs it, and what turns pairs into prompts and completions into grades."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teacher.engines import open_engine
from teacher.engines.base import Completion, Engine
from teacher.engines.config import EngineConfig
from teacher.prompt import PromptWriter, load_prompt
from teacher.reading import AnswerReader, Sample


@dataclass(frozen=True)
class Annotator:
    """`prompts` gives the token ids of each of some pairs, or the reason why a pair has none (see `PromptWriter`); `opened`
    says that they end with the answer's tag, so that a completion is the grade's token."""

    engine: Engine
    prompts: Callable[[Sequence[dict[str, Any]]], list[list[int] | str]]
    reader: AnswerReader
    opened: bool = False

    def read(self, completion: Completion) -> Sample:
        """What a completion of one of the prompts says."""
        return self.reader.read_opened(completion) if self.opened else self.reader.read(completion)


def open_annotator(folder: Path, config: EngineConfig) -> Annotator:
    """The teacher in `folder` over the engine that `config` names; raises `ContractError` when it cannot be started."""
    from transformers import AutoTokenizer

    prompt, tokenizer = load_prompt(folder), AutoTokenizer.from_pretrained(folder)
    writer, reader = PromptWriter(prompt, tokenizer), AnswerReader(tokenizer, prompt.scale.size)
    return Annotator(open_engine(config, folder), writer, reader, opened=bool(writer.opening))
