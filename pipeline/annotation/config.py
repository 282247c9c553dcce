"""Settings of the annotation job."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field, ValidationInfo, model_validator

from data.contracts import Config, UserPath
from teacher.engines.config import EngineConfig, VLLMConfig


class SelectConfig(Config):
    """Which pairs of the split are annotated where there is a budget. The strategies have shares of it."""

    pairs: int = Field(default=0, ge=0)
    """At most so many pairs, those counted in that are annotated already; 0 sets no limit."""
    tokens: int = Field(default=0, ge=0)
    """As many pairs as take about so many tokens, of prompts and completions, going by what the measured pairs of `valid`
    and `test` took; 0 sets no limit."""
    random: float = Field(default=1.0, ge=0)
    """Share of pairs chosen by chance."""
    uncertain: float = Field(default=0.0, ge=0)
    """Share of pairs whose two likeliest grades are nearest, by the exported student in `annotate.student`."""
    diverse: float = Field(default=0.0, ge=0)
    """Share of pairs chosen evenly from clusters (k-means) of the vectors of `encoder`."""
    by_stratum: float = Field(default=0.0, ge=0)
    """Share of pairs chosen evenly from strata of the query's frequency: those of the log, or the number of its ads."""
    encoder: str = ""
    """Encoder of `diverse`, named as `student.base` is."""

    @property
    def shares(self) -> dict[str, float]:
        """The strategies in use, with their shares."""
        shares = {name: getattr(self, name) for name in ("random", "uncertain", "diverse", "by_stratum")}
        return {name: share / sum(shares.values()) for name, share in shares.items() if share}

    @property
    def has_budget(self) -> bool:
        """Whether pairs are chosen at all."""
        return bool(self.pairs or self.tokens)

    @model_validator(mode="after")
    def _can_choose(self) -> SelectConfig:
        if not self.shares:
            raise ValueError("no strategy has a share: set one of random, uncertain, diverse and by_stratum")
        if "diverse" in self.shares and not self.encoder:
            raise ValueError("`diverse` needs `encoder`")
        if not self.has_budget and self.shares.keys() != {"random"}:
            raise ValueError("a strategy needs a budget: set `pairs` or `tokens`")
        return self


class CascadeConfig(Config):
    """Which pairs an exported student grades in the teacher's stead (`annotate.student`)."""

    max_loss: float = Field(default=0.0, ge=0, lt=1)
    """The student grades the pairs that it is surest of, as many as cost at most this share of the annotations' accuracy,
    by the labelled pairs of `valid_pairs`: 0.005 is half a point. 0 leaves every pair to the teacher."""
    confidence: float = Field(default=0.9, ge=0.5, lt=1)
    """How sure it is that they cost no more: the fewer labelled pairs there are, the fewer pairs the student then grades,
    and none with fewer than − ln(1 − confidence) / max_loss of them: 460 for 0.9 and 0.005."""
    checked: float = Field(default=0.05, ge=0, le=1)
    """Share of these pairs that the teacher grades all the same, to show how often it says otherwise."""

    @property
    def pairs_needed(self) -> int:
        """With fewer labelled pairs of valid, the student grades none, right as it may be on all of them."""
        return math.ceil(-math.log(1 - self.confidence) / self.max_loss) if self.max_loss else 0


class AnnotateConfig(Config):
    renamed: ClassVar[dict[str, str]] = {"window": "max_in_flight"}

    split: Literal["train", "valid", "test", "pool"] = "pool"
    """Which pairs the teacher labels."""
    limit: int = Field(default=0, ge=0)
    """At most so many pairs, the first in the order of their ids; 0 takes all."""
    student: UserPath | None = None
    """Folder of an exported student, for `select.uncertain` and `cascade`."""
    select: SelectConfig = SelectConfig()
    """A budget, and how pairs are chosen for it."""
    cascade: CascadeConfig = CascadeConfig()
    """Sparing the teacher the pairs that a student is sure of."""
    valid_pairs: int = Field(default=1000, ge=0)
    """Labelled pairs of split `valid` that the teacher labels too, the first in the order of their ids: its probabilities
    are calibrated on them. 0 leaves the probabilities as they are."""
    test_pairs: int = Field(default=1000, ge=0)
    """Labelled pairs of split `test` that the teacher labels too, for its own row in the student's evaluation."""
    n: int = Field(default=4, ge=1, le=256)
    """Completions sampled for a pair; their grades are its votes. With `confidence` the first of them."""
    n_max: int = Field(default=8, ge=1, le=256)
    """With `confidence`: the most completions of a pair."""
    confidence: float = Field(default=0.0, ge=0, lt=1)
    """A pair gets further samples, up to `n_max`, until its leading grade is the majority with this probability (0.85 is
    two that agree without doubt, 0.95 four); 0 samples every pair `n` times."""
    temperature: float = Field(default=0.7, ge=0, le=5)
    """Sampling temperature; 0 is greedy (then one sample is enough)."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the smallest set of tokens whose probabilities reach this sum."""
    max_tokens: int = Field(default=0, ge=0, le=100_000)
    """Longest completion in tokens; 0 takes the length that the teacher was trained with. A teacher of the grade alone is
    always asked for one token."""
    max_in_flight: int = Field(default=512, ge=1, le=1_000_000)
    """Pairs that an engine has started and not yet committed: what a kill loses at most. They are committed in files of a
    quarter of it. An engine is kept busy by at least twice `max_num_seqs` / n (or, of servers, twice `concurrency` ×
    servers); with `confidence` by twice as many again."""
    engines: int = Field(default=1, ge=1, le=10_000)
    """Engines at work at the same time, one partition and one worker process each; on GPUs one for each."""
    partitions: int = Field(default=0, ge=0, le=1_000_000)
    """Partitions of the job; 0 makes one for each engine. A few times as many even out engines of unequal speed, on a
    cluster that has no more task slots than engines (a worker keeps its engine for its next partition)."""
    engine: EngineConfig = VLLMConfig()
    """Which engine, and its memory."""
    max_files: int = Field(default=1000, ge=1)
    """When a run has finished and its annotations lie in more files than this, small ones are merged."""
    file_rows: int = Field(default=1_000_000, ge=2)
    """Rows of a merged file, about."""
    max_failed_share: float = Field(default=0.05, ge=0, le=1)
    """The job fails, and its annotations stay, when more than this share of the pairs failed."""
    min_ok_share: float = Field(default=0.5, ge=0, le=1)
    """The job fails, and its annotations stay, when less than this share of the pairs got a grade."""
    retry_failed: bool = False
    """First drop the rows with status `failed`, so that they are tried again."""
    seed: int = Field(default=0, ge=0, le=2**31 - 1)
    """Seed of the sampling; with the same seed a pair gets the same completions again."""

    @model_validator(mode="after")
    def _room_for_further_samples(self) -> AnnotateConfig:
        if self.confidence and self.n_max < self.n:
            raise ValueError(f"n_max ({self.n_max}) is smaller than n ({self.n}): raise n_max, or set confidence to 0")
        return self

    @model_validator(mode="after")
    def _has_its_student(self, info: ValidationInfo) -> AnnotateConfig:
        if self.uses_student and self.student is None:
            raise ValueError("`select.uncertain` and `cascade` need `student`, the folder of an exported student")
        if self.cascade.max_loss and (self.split in ("valid", "test") or not self.valid_pairs):
            raise ValueError("`cascade` is for splits train and pool, and needs `valid_pairs`, which say what it costs")
        if (needed := self.cascade.pairs_needed) > self.valid_pairs and info.context != "recorded":
            raise ValueError(
                f"by {self.valid_pairs} `valid_pairs`, `cascade` cannot be sure of a loss of {self.cascade.max_loss:g}, and "
                f"the student would grade nothing: it takes {needed}, or a larger `max_loss`"
            )
        return self

    @property
    def uses_student(self) -> bool:
        """Whether what `student` says of the pairs is needed."""
        return bool("uncertain" in self.select.shares or self.cascade.max_loss)

    @property
    def adaptive(self) -> bool:
        """Whether a pair gets further samples while its grade is undecided. Greedy ones would all be the same."""
        return self.confidence > 0 and self.temperature > 0 and self.n < self.n_max

    @property
    def part_size(self) -> int:
        """Pairs of a file as a worker commits it."""
        return max(1, self.max_in_flight // 4)
