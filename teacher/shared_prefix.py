"""Per-token log probabilities of sequences that begin alike, with each common beginning computed once.

The completions of a group follow one prompt, and the prompts of a batch one guideline. Such a group is one row: the common
beginning (the prefix), then the rest of every sequence (its branch) one after the other; a branch may be a group itself. A
token attends to what comes before it on the way from the root to its own sequence's end, and a branch's positions continue
from the prefix's end, so every sequence is computed as if it stood alone (Prefix Grouper, arXiv 2506.05433, of one level).
It works with every causal transformers model that takes a four-dimensional attention mask and position ids; `can_share` says
whether a model does.

Only hidden states that predict a token of interest go through the head, and TRL's fused head never holds the logits of all
of them: it works in tiles, and again in the backward pass. The model must have been given to `trl.trainer.utils.
add_fused_lm_head`, as every TRL trainer does.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.contracts import ContractError, first_line, out_of_memory
from teacher.cpu_kernels import Layout, Part, attach, install, lay_out
from teacher.prefix_groups import Group, group_by_prefix

logger = logging.getLogger(__name__)

# A mean difference of log probabilities is put down to rounding up to this much, or up to twice what a change of the
# embeddings by their own rounding makes. In bfloat16, Qwen2.5-Coder-0.5B differed by 0.03 to 0.06, at most 1.0 times the
# latter; with wrong positions by three to six times, with the mask left out by six to ten times.
_ROUNDING, _TIMES = 1e-4, 2.0

# Added to the scores of what is hidden. Not −inf: a block of keys that is hidden wholly may then make gradients of NaN in
# some of the GPU's kernels (pytorch issue 109517); the exponential of this is 0 too.
_HIDDEN = -30_000.0


def token_log_probs(
    model: Any, sequences: Sequence[Sequence[int]], starts: Sequence[int], groups: Sequence[Group], pad: int
) -> tuple[Tensor, Tensor | None]:
    """Log probability of every sequence's tokens from `starts` on (≥ 1), and the entropy where they were predicted.

    Args:
        model: a causal language model with the fused head, possibly within adapters and wrappers for several processes.
        groups: which sequences to compute, in which order.

    Returns:
        (N,) for all those tokens, sequence after sequence in the order of the groups; no entropy if the head has none.
    """
    base = causal_lm(model)
    if base.device.type == "cpu":
        install()
    if all(group.shared == 0 for group in groups):
        inputs, predictors = _separate_rows(sequences, starts, groups, pad)
    else:
        inputs, predictors, layout = _shared_rows(sequences, starts, groups, pad)
        if _skips_masked(base):
            attach(inputs["attention_mask"], layout)
        else:
            hidden = ~inputs["attention_mask"]
            inputs["attention_mask"] = torch.zeros(hidden.shape, dtype=_compute_dtype(base)).masked_fill_(
                hidden, _HIDDEN
            )
    labels = [token for group in groups for row in group.rows for token in sequences[row][starts[row] :]]
    targets = torch.tensor([labels], dtype=torch.long, device=base.device)
    inputs = {name: tensor.to(base.device) for name, tensor in inputs.items()}
    with _only(base.base_model, predictors.to(base.device)):
        output = model(**inputs, shift_labels=targets, fused_lm_head=True)
    return output.log_probs[0], None if output.entropy is None else output.entropy[0]


def masked_hidden_size(model: Any) -> int:
    """The hidden size of a model whose attention computes what a mask hides; 0 if it does not."""
    return 0 if _skips_masked(causal_lm(model)) else causal_lm(model).config.get_text_config().hidden_size


def _skips_masked(base: Any) -> bool:
    return base.device.type == "cpu" and base.config._attn_implementation == "sdpa"


def causal_lm(model: Any) -> Any:
    """The causal language model inside adapters and wrappers."""
    model = extract_model_from_parallel(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def can_share(model: Any, prompts: Sequence[Sequence[int]], completion_length: int, pad: int) -> bool:
    """Whether sharing is right for this model: computes some sequences both ways, and logs the reason if it is not.

    They are the longest prompt and another one that begins like it, with completions of any tokens that are of full length,
    half of it and one, as many as make a mean of 64 tokens, and three for each prompt.
    """
    prompt = max(prompts, key=len)
    vocabulary = causal_lm(model).get_input_embeddings().weight.size(0)
    generator = torch.Generator().manual_seed(0)

    def any_tokens(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=generator).tolist()

    half = len(prompt) // 2
    other = [*prompt[:half], *any_tokens((len(prompt) - half + 1) // 2)]
    lengths = [completion_length, (completion_length + 1) // 2, 1]
    lengths *= max(1, math.ceil(32 / sum(lengths)))
    prefixes = [list(prefix) for prefix in (prompt, other) for _ in lengths]
    sequences = [[*prefix, *any_tokens(n)] for prefix, n in zip(prefixes, 2 * lengths, strict=True)]
    with _measuring(model):
        error = _sharing_error(model, sequences, prefixes, pad)
    if error:
        logger.warning(
            "every sequence is computed with its own prompt, as this model cannot share it: %s; that only takes longer, and "
            "teacher.agpo.shared_prefix=false leaves out this trial",
            error,
        )
    return error is None


def check_head(model: Any, pad: int, temperature: float = 1.0) -> None:
    """Raise `ContractError` when the fused head gives other log probabilities than the model, which would learn from those.

    It multiplies the last hidden states with the weights of the head. BERT's family has a layer of its own before them.
    """
    base, generator = causal_lm(model), torch.Generator().manual_seed(0)
    ids = torch.randint(base.get_input_embeddings().weight.size(0), (32,), generator=generator).tolist()
    sequence: tuple[Any, ...] = ([ids], [1], [Group((0,), 0)], pad)
    with _measuring(model):
        logits = base(torch.tensor([ids], device=base.device)).logits[0, :-1].float() / temperature
        own = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:], device=base.device)[:, None])[:, 0]
        try:
            found, _ = token_log_probs(model, *sequence)
            with _rounded_embeddings(base):
                rounded, _ = token_log_probs(model, *sequence)
            reason = _difference(own, found, (found - rounded).abs())
        except (RuntimeError, AttributeError) as error:
            if out_of_memory(error):
                raise
            reason = first_line(error)
    if reason:
        raise ContractError(
            f"models of type {base.config.model_type} cannot be trained: the loss reads their logits from the last hidden "
            f"states, and finds others than the model's own ({reason}); choose another model"
        )


def _sharing_error(model: Any, sequences: list[list[int]], prefixes: list[list[int]], pad: int) -> str | None:
    starts = [len(prefix) for prefix in prefixes]
    groups = group_by_prefix(prefixes)
    separate = [Group((row,), 0) for group in groups for row in group.rows]
    alone, _ = token_log_probs(model, sequences, starts, separate, pad)
    try:
        together, _ = token_log_probs(model, sequences, starts, groups, pad)
    except (
        RuntimeError,
        ValueError,
        TypeError,
        IndexError,
    ) as error:  # what models raise at a mask they do not know
        if out_of_memory(error):
            raise
        return f"with a four-dimensional attention mask it fails ({first_line(error)})"
    with _rounded_embeddings(causal_lm(model)):
        rounded, _ = token_log_probs(model, sequences, starts, separate, pad)
    return _difference(alone, together, (alone - rounded).abs())


def _difference(expected: Tensor, found: Tensor, rounding: Tensor) -> str | None:
    """In words, that log probabilities differ by more than rounding can explain; None if they do not."""
    difference = (expected - found).abs().mean().item()
    limit = max(_ROUNDING, _TIMES * rounding.mean().item())
    if math.isnan(difference) or difference > limit:
        return f"log probabilities differ by {difference:.2g} on average, and rounding explains {limit:.2g}"
    return None


@contextmanager
def _measuring(model: Any) -> Iterator[None]:
    """Inside there are no gradients, and no dropout, with which two passes would differ anyway."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@contextmanager
def _rounded_embeddings(base: Any) -> Iterator[None]:
    """Inside, every number of an embedding is changed at random, by at most the rounding of what the model computes in."""
    generator = torch.Generator().manual_seed(0)
    step = torch.finfo(_compute_dtype(base)).eps

    def change(module: Any, arguments: Any, output: Tensor) -> Tensor:
        factor = 1 + step * (2 * torch.rand(output.shape, generator=generator) - 1)
        return (output * factor.to(output.device)).to(output.dtype)

    handle = base.get_input_embeddings().register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()


def _compute_dtype(base: Any) -> torch.dtype:
    device = base.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else base.dtype


def _separate_rows(
    sequences: Sequence[Sequence[int]], starts: Sequence[int], groups: Sequence[Group], pad: int
) -> tuple[dict[str, Tensor], Tensor]:
    """One row a sequence, padded on the right, where it changes no position and nothing before it."""
    rows = [row for group in groups for row in group.rows]
    ids = _padded([sequences[row] for row in rows], pad)
    mask = _padded([[1] * len(sequences[row]) for row in rows], 0)
    predictors = [(i, t - 1) for i, row in enumerate(rows) for t in range(starts[row], len(sequences[row]))]
    return {"input_ids": ids, "attention_mask": mask}, torch.tensor(predictors, dtype=torch.long).view(-1, 2)


def _shared_rows(
    sequences: Sequence[Sequence[int]], starts: Sequence[int], groups: Sequence[Group], pad: int
) -> tuple[dict[str, Tensor], Tensor, Layout]:
    """Input ids and positions (groups, width), attention mask (groups, 1, width, width), predictors (N, 2): row, column."""
    rows = [_Row(sequences, starts, i) for i in range(len(groups))]
    for row, group in zip(rows, groups, strict=True):
        shared = group.shared or starts[group.rows[0]]  # a single sequence may be cut anywhere
        row.add(Group(group.members, shared))
    ends = _padded([row.ends for row in rows], 0)
    width = ends.size(1)
    column = torch.arange(width)
    # A token is seen from behind it, until the branches end that continue it.
    visible = (column <= column[:, None]) & (column[:, None] < ends[:, None, :])
    # Padding too must attend to something, and every row to something in the first block of keys that a GPU's kernel reads.
    visible[:, :, 0] = True
    inputs = {
        "input_ids": _padded([row.ids for row in rows], pad),
        "position_ids": _padded([row.positions for row in rows], 0),
        "attention_mask": visible[:, None],
    }
    predictors = torch.tensor([place for row in rows for place in row.predictors], dtype=torch.long).view(-1, 2)
    return inputs, predictors, lay_out([part for row in rows for part in row.parts], width)


class _Row:
    """Row `number` of a batch while it is written: of every token its id, its position, and where the part of the row ends
    that may see it."""

    def __init__(self, sequences: Sequence[Sequence[int]], starts: Sequence[int], number: int) -> None:
        self._sequences, self._starts, self._number = sequences, starts, number
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.ends: list[int] = []
        self.predictors: list[tuple[int, int]] = []
        self.parts: list[Part] = []

    def add(self, member: int | Group, path: tuple[int, ...] = (), depth: int = 0) -> None:
        """Write a group or a sequence, whose first tokens are in the columns `path`."""
        begin, known = len(self.ids), len(path)
        first = member.rows[0] if isinstance(member, Group) else member
        until = member.shared if isinstance(member, Group) else len(self._sequences[first])
        self.ids += self._sequences[first][known:until]
        self.positions += range(known, until)
        self.ends += [0] * (until - known)
        here = len(self.parts)
        path += tuple(range(begin, len(self.ids)))
        if isinstance(member, Group):
            for branch in member.members:
                self.add(branch, path, depth + 1)
        else:
            self.predictors += [(self._number, path[t - 1]) for t in range(self._starts[member], len(path))]
        end = len(self.ids)
        self.ends[begin : begin + until - known] = [end] * (until - known)
        if until > known:
            self.parts.insert(here, Part(depth, self._number, begin, until - known, end - begin))


def _padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """The rows as a tensor (rows, width). A width of 64 more than a multiple of 128 is one more: with a mask of such a width
    cuDNN's attention in torch 2.11 has gradients of NaN on an H100 (pytorch issue 196678)."""
    tensor = pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=fill)
    return torch.nn.functional.pad(tensor, (0, int(tensor.size(1) % 128 == 64)), value=fill)


@contextmanager
def _only(backbone: Any, places: Tensor) -> Iterator[None]:
    """Inside, `backbone` returns only the hidden states at `places` (N, 2), as one row (1, N, hidden_size)."""

    def gather(module: Any, arguments: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[places[:, 0], places[:, 1]][None]
        return output

    handle = backbone.register_forward_hook(gather)
    try:
        yield
    finally:
        handle.remove()
