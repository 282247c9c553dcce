"""Per-token log probabilities of sequences that begin alike, with each common beginning computed once.

The completions of a group follow one prompt, and the examples of a batch one guideline. Such a group is one row: the common
beginning (the prefix), then the rest of every sequence (its branch) one after the other. A token attends to the prefix and
to its own branch, and a branch's positions continue from the prefix's end, so every sequence is computed as if it stood
alone (Prefix Grouper, arXiv 2506.05433). It works with every causal transformers model that takes a four-dimensional
attention mask and position ids; `can_share` says whether a model does.

Only hidden states that predict a token of interest go through the head, and TRL's fused head never holds the logits of all
of them: it works in tiles, and again in the backward pass. The model must have been given to `trl.trainer.utils.
add_fused_lm_head`, as every TRL trainer does.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.contracts import first_line, out_of_memory
from teacher.cpu_kernels import Layout, attach, install, lay_out

logger = logging.getLogger(__name__)

# A mean difference of log probabilities is put down to rounding up to this much, or up to twice what a change of the
# embeddings by their own rounding makes. In bfloat16, Qwen2.5-Coder-0.5B differed by 0.03 to 0.06, at most 1.0 times the
# latter; with wrong positions by three to six times, with the mask left out by six to ten times.
_ROUNDING, _TIMES = 1e-4, 2.0

# Added to the scores of what is hidden. Not −inf: a block of keys that is hidden wholly may then make gradients of NaN in
# some of the GPU's kernels (pytorch issue 109517); the exponential of this is 0 too.
_HIDDEN = -30_000.0


class Group(NamedTuple):
    """Sequences whose first `shared` tokens are the same and are computed once; 0 computes each sequence in full."""

    rows: tuple[int, ...]
    """Indices of the sequences."""
    shared: int

    def tokens(self, lengths: Sequence[int]) -> int:
        """Tokens that are computed, given the length of every sequence."""
        return self.shared + sum(lengths[row] - self.shared for row in self.rows)


def group_by_prefix(prefixes: Sequence[Sequence[int]]) -> list[Group]:
    """One group for every different prefix, from the prefix of every sequence (for a rollout: its prompt)."""
    rows: dict[tuple[int, ...], list[int]] = {}
    for row, prefix in enumerate(prefixes):
        rows.setdefault(tuple(prefix), []).append(row)
    return [Group(tuple(members), len(prefix)) for prefix, members in rows.items()]


def common_prefix(sequences: Sequence[list[int]]) -> int:
    """How many tokens all sequences begin with."""
    first, last = min(sequences), max(sequences)
    return next((t for t, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def unpadded(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The tokens of every row where the mask is 1; both (rows, width)."""
    return [row.tolist() for row in ids[mask.bool()].split(mask.sum(dim=1).tolist())]


def micro_batches(
    groups: Sequence[Group], lengths: Sequence[int], budget: int, hidden_size: int, at_least: int = 1
) -> list[list[Group]]:
    """Groups for one forward and backward pass each, of at most `budget` tokens with padding, the longest first.

    A group is cut where it is larger than that, or where its branches would spend more on attending to places that the mask
    hides than the prefix costs again (see `masked_hidden_size`). A single sequence longer than `budget` is a micro-batch by
    itself. There are `at_least` micro-batches if there are as many sequences.
    """
    cut = [piece for group in groups for piece in _cut(group, lengths, budget, hidden_size)]
    cut.sort(key=lambda group: -group.tokens(lengths))
    batches: list[list[Group]] = []
    for group in cut:
        if batches and (len(batches[-1]) + 1) * batches[-1][0].tokens(lengths) <= budget:
            batches[-1].append(group)
        else:
            batches.append([group])
    while len(batches) < at_least:
        largest = max(batches, key=lambda batch: sum(len(group.rows) for group in batch))
        if len(largest) == 1:
            (group,) = largest
            half = (len(group.rows) + 1) // 2
            largest = [Group(group.rows[:half], group.shared), Group(group.rows[half:], group.shared)]
            batches.remove([group])
        else:
            batches.remove(largest)
        half = (len(largest) + 1) // 2
        batches += [largest[:half], largest[half:]]
    return batches


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
    """Whether sharing is right for this model: computes one group both ways, and logs the reason if it is not.

    The group is the longest prompt, with completions of any tokens that are of full length, half of it and one, as many as
    make a mean of 64 tokens.
    """
    prompt = max(prompts, key=len)
    vocabulary = causal_lm(model).get_input_embeddings().weight.size(0)
    generator = torch.Generator().manual_seed(0)
    lengths = [completion_length, (completion_length + 1) // 2, 1]
    lengths *= math.ceil(64 / sum(lengths))
    sequences = [[*prompt, *torch.randint(vocabulary, (n,), generator=generator).tolist()] for n in lengths]
    training = model.training
    model.eval()  # dropout would differ either way
    error = _sharing_error(model, sequences, len(prompt), pad)
    model.train(training)
    if error:
        logger.warning("every sequence is computed with its own prompt, as this model cannot share it: %s", error)
    return error is None


def _sharing_error(model: Any, sequences: Sequence[Sequence[int]], shared: int, pad: int) -> str | None:
    starts, rows = [shared] * len(sequences), range(len(sequences))
    separate = [Group((row,), 0) for row in rows]
    with torch.no_grad():
        alone, _ = token_log_probs(model, sequences, starts, separate, pad)
        try:
            together, _ = token_log_probs(model, sequences, starts, [Group(tuple(rows), shared)], pad)
        except (
            RuntimeError,
            ValueError,
            TypeError,
            IndexError,
        ) as error:  # what models raise at a mask they do not know
            if out_of_memory(error):
                raise
            return f"it does not take a four-dimensional attention mask ({first_line(error)})"
        with _rounded_embeddings(causal_lm(model)):
            rounded, _ = token_log_probs(model, sequences, starts, separate, pad)
    difference = (alone - together).abs().mean().item()
    limit = max(_ROUNDING, _TIMES * (alone - rounded).abs().mean().item())
    if math.isnan(difference) or difference > limit:
        return f"log probabilities differ by {difference:.2g} on average, and rounding explains {limit:.2g}"
    return None


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


def _cut(group: Group, lengths: Sequence[int], budget: int, hidden_size: int) -> Iterator[Group]:
    """`group` in pieces of nearly equal numbers of sequences, or whole."""
    rows = group.rows
    branch = sum(lengths[row] - group.shared for row in rows) / len(rows)

    def cost(size: int) -> float:
        # Of a layer, in units of 4·hidden_size operations: 6·hidden_size a token for its weights, and one a pair of tokens.
        tokens = group.shared + size * branch
        return math.ceil(len(rows) / size) * tokens * (6 * hidden_size + tokens)

    size = len(rows) if group.shared else 1
    if hidden_size and group.shared:
        size = min(range(1, len(rows) + 1), key=lambda size: (cost(size), -size))
    size = math.ceil(len(rows) / math.ceil(len(rows) / size))
    piece: tuple[int, ...] = ()
    for row in rows:
        if piece and (len(piece) == size or Group((*piece, row), group.shared).tokens(lengths) > budget):
            yield Group(piece, group.shared if len(piece) > 1 else 0)
            piece = ()
        piece += (row,)
    yield Group(piece, group.shared if len(piece) > 1 else 0)


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
    ids, positions, branches, predictors, rows = [], [], [], [], []
    for i, group in enumerate(groups):
        shared = group.shared or starts[group.rows[0]]  # a single sequence may be cut anywhere
        rows.append((shared, [len(sequences[row]) - shared for row in group.rows]))
        line = list(sequences[group.rows[0]][:shared])
        places, owners = list(range(shared)), [0] * shared
        for branch, row in enumerate(group.rows, 1):
            sequence = sequences[row]
            offset = len(line) - shared
            line += sequence[shared:]
            places += range(shared, len(sequence))
            owners += [branch] * (len(sequence) - shared)
            before = range(starts[row] - 1, len(sequence) - 1)
            predictors += [(i, t if t < shared else t + offset) for t in before]
        ids.append(line)
        positions.append(places)
        branches.append(owners)
    owner = _padded(branches, -1)
    query, key = owner[:, :, None], owner[:, None, :]
    causal = torch.ones(owner.size(1), owner.size(1), dtype=torch.bool).tril()
    visible = causal & ((key == 0) | (key == query)) & (key >= 0)
    # Padding too must attend to something, and every row to something in the first block of keys that a GPU's kernel reads.
    visible[:, :, 0] = True
    inputs = {
        "input_ids": _padded(ids, pad),
        "position_ids": _padded(positions, 0),
        "attention_mask": visible[:, None],
    }
    return inputs, torch.tensor(predictors, dtype=torch.long).view(-1, 2), lay_out(rows, owner.size(1))


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
