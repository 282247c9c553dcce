"""Settings of the student: its training, its export, and the scoring job over the exported folder."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, ValidationInfo, model_validator

from data.contracts import Config

Precision = Literal["fp32", "int8", "fp16", "bf16"]


class WarmUpConfig(Config):
    """What the cross-encoder learns from unlabelled pairs before it sees a label."""

    pairs: int = Field(default=0, ge=0)
    """Pairs of splits pool and train, without their grades, to learn from; 0 leaves the warm-up out."""
    source: Literal["cosine", "bm25"] = "cosine"
    """What the pairs are ranked by: the cosine of an encoder, or BM25 as a share of the query's limit."""
    encoder: str = ""
    """Encoder whose cosine it is, named as `student.base` is; empty means that one."""
    random_negatives: float = Field(default=0.33, ge=0, le=10)
    """Random query-ad pairs for each pair, to be scored near 0."""
    hard_negatives: float = Field(default=0.0, ge=0, le=10)
    """Mined pairs for each pair, to be scored low: ads near by the encoder's cosine that are no pair of the query."""
    epochs: int = Field(default=1, ge=1, le=100)
    """Passes over these pairs."""
    learning_rate: float = Field(default=5e-5, gt=0, le=0.1)
    """Peak learning rate of AdamW."""

    @model_validator(mode="after")
    def _encoder_has_an_effect(self, info: ValidationInfo) -> Self:
        if self.encoder and self.source == "bm25" and info.context != "recorded":
            raise ValueError("`encoder` has no effect with source = 'bm25'; leave one of the two out")
        return self


class StudentConfig(Config):
    """How the student is distilled, calibrated and evaluated."""

    base: str = Field(default="scratch:small", min_length=1)
    """Encoder to start from: path:FOLDER, hf:NAME, pypi:NAME==VERSION#sha256=… or scratch:SIZE (tiny, small, medium;
    made from the pairs' own texts)."""
    warm_up: WarmUpConfig = WarmUpConfig()
    """What the student learns from unlabelled pairs before any label."""
    layers: tuple[Annotated[int, Field(ge=1, le=100)], ...] = ()
    """Numbers of layers of smaller students, which are cut from the trained one and learn from it too (on the training rows
    and the pairs of the warm-up); all are exported, and `export.layers` chooses."""
    max_length: int = Field(default=96, ge=16, le=512)
    """Tokens of query and ad together; longer pairs are cut, the longer of the two sides first."""
    epochs: int = Field(default=6, ge=1, le=100)
    """Passes over the training rows at most; early stopping may end sooner."""
    patience: int = Field(default=2, ge=1, le=100)
    """Epochs no better on split valid after which training stops: by ROC-AUC or, where at least 50 pairs of valid are
    annotated, by the loss that is trained."""
    batch_size: int = Field(default=32, ge=1, le=4096)
    """Pairs in one optimiser step."""
    eval_batch_size: int = Field(default=128, ge=1, le=8192)
    """Pairs in one forward pass when nothing is learned."""
    learning_rate: float = Field(default=5e-4, gt=0, le=0.1)
    """Peak learning rate of AdamW. 5e-5 suits a pretrained encoder, 5e-4 one made from scratch."""
    weight_decay: float = Field(default=0.01, ge=0, le=1)
    """Decoupled weight decay; biases and normalisation weights are exempt."""
    warmup_ratio: float = Field(default=0.1, ge=0, le=0.9)
    """Share of all steps over which the learning rate rises from 0 to its peak."""
    decay_ratio: float = Field(default=0.2, ge=0, le=1)
    """Share of all steps, the last ones, over which the learning rate falls linearly to 0. A long fall takes away the steps
    in which a student with few labels begins to learn."""
    dropout: bool = False
    """Whether the encoder's own dropout is at work in training. Few epochs over a few thousand rows learn faster without."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
    distill_temperature: float = Field(default=1.0, ge=0.05, le=20)
    """Softens teacher and student distributions in the soft cross-entropy (arXiv 1503.02531); 1 leaves them alone. Well
    below 1 the likeliest grade alone is taught, and weighs less beside human grades: the gradient shrinks with it."""
    soft_labels: Literal["teacher", "ensemble"] = "teacher"
    """What an annotated pair without a human grade teaches: the teacher's probabilities, or the geometric mean of these and
    those of the same student taught by human labels alone, weighted by their log loss on the annotated pairs of valid."""
    gold_mix: float = Field(default=0.5, ge=0, le=1)
    """Weight of the human grade in rows that have both a human grade and an annotation; the rest is the teacher's."""
    soft_gold: bool = True
    """A human rating between two grades (the mean of several raters, in column grade_raw) teaches both of them; without,
    a row teaches the grade it was put into."""
    gold_weight: float = Field(default=1.0, ge=0, le=100)
    """Weight of a row with a human grade relative to a fully agreed annotation."""
    agreement_power: float = Field(default=1.0, ge=0, le=10)
    """An annotated row weighs agreement to this power; 0 weighs all annotations alike."""
    cascade_weight: float = Field(default=1.0, ge=0, le=10)
    """Weight of an annotation that an earlier student gave (`annotate.cascade`), relative to the teacher's."""
    min_agreement: float = Field(default=0.0, ge=0, le=1)
    """Annotations with less agreement than this are not learned from."""
    class_balance: float = Field(default=0.0, ge=0, le=1)
    """Class weights are frequency to minus this power: 0 leaves the imbalance, 1 makes all grades count alike."""
    margin_weight: float = Field(default=0.0, ge=0, le=100)
    """Weight of margin-MSE between pairs of one query (arXiv 2010.02666); above 0, batches keep queries together."""
    listnet_weight: float = Field(default=0.0, ge=0, le=100)
    """Weight of ListNet over a query's pairs (Cao et al. 2007); above 0, batches keep queries together, as for the next."""
    lambda_weight: float = Field(default=0.0, ge=0, le=100)
    """Weight of LambdaLoss, which weighs pairs by what their order is worth in NDCG (Wang et al. 2018)."""
    ordinal_weight: float = Field(default=0.0, ge=0, le=100)
    """Weight of the squared earth mover's distance (arXiv 1611.05916): errors cost more the more grades they are off."""
    calibration: Literal["temperature", "best"] = "temperature"
    """How logits become probabilities, fitted on split valid: a temperature and an offset for each grade, or the better
    of that and isotonic curves on top, by cross-validated log loss."""
    contrastive_weight: float = Field(default=0.0, ge=0, le=100)
    """Weight of contrastive reasoning self-distillation (arXiv 2510.11056): the teacher's reasons are read in training and
    never at inference; above 0, a step takes about twice as long."""
    contrastive_temperature: float = Field(default=0.1, gt=0, le=10)
    """Divides the cosines of the contrastive loss."""
    reason_length: int = Field(default=64, ge=1, le=512)
    """Tokens of a reason that the contrastive loss reads, beside max_length for query and ad."""
    use_annotations: bool = True
    """Whether annotations are learned from; without them the student needs no teacher (flow student-from-labels)."""
    annotation_key: str = ""
    """Which annotations to learn from when the table holds several keys; empty takes the key written last."""
    gold_only_baseline: bool = True
    """Also train the same student on the human grades alone, for as many steps, to show what the annotations add."""
    decisions: tuple[str, ...] = ("0:precision=0.95", "0:precision=0.8", "precision=0.9", "recall=0.95")
    """Decisions to measure on test, at thresholds from valid: [GRADE:]precision=SHARE or recall=SHARE. GRADE is a name or
    number: this grade or worse, or from the relevant ones this or better; without it, relevant."""
    suspects: Literal["off", "features", "student"] = "off"
    """Name the human labels that are probably wrong (arXiv 1911.00068), as judged by what has not learned from them: a
    logistic regression on the encoder's vectors (`features`), or the student itself, in five more trainings (`student`)."""
    drop_suspects: float = Field(default=0.0, ge=0, le=0.5)
    """Share of the human labels that the student does not learn from, the most suspect first; above 0 another student is
    trained on all of them, to show what leaving them out changes."""
    bootstrap_samples: int = Field(default=1000, ge=100, le=100_000)
    """Bootstrap resamples, by query, behind each 95 % interval."""
    log_every: int = Field(default=10, ge=1)
    """Optimiser steps between two training log entries."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU where there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the gradients in training; auto takes bf16 on GPUs that have it and on CPUs with AMX or AVX512-BF16,
    for encoders at least 256 wide, and fp32 elsewhere, where it is faster. Weights and optimiser are always fp32."""
    seed: int = Field(default=0, ge=0, le=2**31 - 1)
    """Seed of the head's weights, the data order, dropout and the bootstrap."""

    @model_validator(mode="after")
    def _suspects_are_named(self) -> Self:
        if self.drop_suspects and self.suspects == "off":
            raise ValueError("`drop_suspects` needs `suspects`: features or student")
        return self


class ExportConfig(Config):
    """How the student becomes a folder that scores with onnxruntime and tokenizers alone."""

    layers: int = Field(default=0, ge=0, le=100)
    """Which size the exported folder holds, of those that `student.layers` made; 0 takes the largest. The others are in
    folders of their own inside."""
    parity_rows: int = Field(default=512, ge=16, le=1_000_000)
    """Pairs of splits test and valid on which the exported models are compared with the trained one."""
    max_probability_difference: float = Field(default=1e-4, gt=0, le=1)
    """The export fails if a probability of the fp32 model differs by more than this from the trained model's."""

    max_int8_auc_loss: float = Field(default=0.01, ge=0, le=1)
    """The export fails if int8, fp16 or bf16 loses more ROC-AUC than this against fp32 on the pairs compared, and the 95 %
    interval of the loss, resampled by query, is above 0."""
    max_decisions_changed: float = Field(default=0.05, ge=0, le=1)
    """The export fails if int8, fp16 or bf16 decides otherwise than fp32 (relevant or not) on a larger share of a grade."""

    fp16: bool = False
    """Also write model.fp16.onnx, for GPUs (package onnxruntime-gpu)."""
    bf16: bool = False
    """Also compare and measure precision bf16: model.onnx, computed in bfloat16 by the package openvino, on a CPU with units
    for it."""
    batch_tokens: int = Field(default=384, ge=1, le=1_000_000)
    """Tokens, padding included, in one forward pass when throughput is measured; each thread has its own batch."""
    threads: int = Field(default=0, ge=0, le=1024)
    """CPU threads of onnxruntime while throughput is measured; 0 takes all cores."""
    seed: int = Field(default=0, ge=0, le=2**31 - 1)
    """Seed of the sample of pairs compared."""


class ScoreConfig(Config):
    """How a whole table is scored with Spark."""

    precision: Precision = "int8"
    """Which exported model scores: fp32, int8 (smaller and faster), fp16 (on a GPU, see `export.fp16`), or bf16 (on a
    CPU with AMX the fastest, see `export.bf16`)."""
    batch_tokens: int = Field(default=384, ge=1, le=1_000_000)
    """Tokens, padding included, in one forward pass; each thread has its own batch."""
    window: int = Field(default=4096, ge=1, le=1_000_000)
    """Pairs that a task holds at once; they are sorted by length before they are batched."""
    partitions: int = Field(default=0, ge=0, le=100_000)
    """Spark tasks; each commits its rows by itself. 0 makes one for every 20,000 pairs, and one for each core at least."""
    threads: int = Field(default=1, ge=0, le=1024)
    """CPU threads of onnxruntime in each task; 1 suits one task for each core, 0 takes all cores."""
    splits: tuple[Literal["train", "valid", "test", "pool"], ...] = ("train", "valid", "test", "pool")
    """Splits of the pairs table to score."""
