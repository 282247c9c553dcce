"""Training on a CPU: attention that skips what a mask hides, and TRL's head without its copies.

On a GPU both are left to the libraries' own kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl.kernels import chunked_logprob

from teacher import grouped_attention

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_trl_forward_tile, _trl_backward_tile = chunked_logprob._forward_tile, chunked_logprob._backward_tile


def install() -> None:
    """Let transformers and TRL use what is here, in this process; all but the time is as before."""
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _attention
    chunked_logprob._forward_tile, chunked_logprob._backward_tile = _forward_tile, _backward_tile


class Part(NamedTuple):
    """Tokens of a row that follow one another: a prefix and what continues it, or the end of a sequence."""

    depth: int
    """How many parts it lies in."""
    row: int
    begin: int
    own: int
    """Its first tokens, which all tokens of the part attend to, those among them to no later one."""
    tokens: int
    """All its tokens, at least its own."""


class Level(NamedTuple):
    """The parts of one depth in a batch of shape (rows, width). All tokens of a part attend to its own ones."""

    places: Tensor | None
    """(parts, longest part): the places of a part's tokens in the batch, as row · width + column; None for whole rows."""
    valid: Tensor
    """(parts, longest part) bool: False where a part is shorter."""
    keys: int
    """The most tokens of its own that a part has."""
    mask: Tensor | None
    """(parts, 1, longest part, keys): what is added to a token's scores, −inf for what it does not see; None where each
    token sees those before it."""


Layout = list[Level]
"""From the whole rows down; a token attends to what it sees on all levels."""


def lay_out(parts: Sequence[Part], width: int) -> Layout:
    """Of a batch (rows, width), in which each row has one part of depth 0, in the order of the rows."""
    depths = sorted({part.depth for part in parts})
    return [_level([part for part in parts if part.depth == depth], width) for depth in depths]


def _level(parts: list[Part], width: int) -> Level:
    own = torch.tensor([part.own for part in parts])
    whole = parts[0].depth == 0
    counts = torch.tensor([width if whole else part.tokens for part in parts])
    step = torch.arange(int(counts.max()))
    valid = step < counts[:, None]
    places = torch.where(valid, torch.tensor([part.row * width + part.begin for part in parts])[:, None] + step, 0)
    mask = None
    if any(part.own < part.tokens for part in parts) or whole:
        key = torch.arange(int(own.max()))
        hidden = (key > step[:, None]) | (key >= own[:, None, None])
        mask = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None]
    return Level(None if whole else places, valid, int(own.max()), mask)


def attach(mask: Tensor, layout: Layout) -> None:
    """Let sdpa attention use `layout` where it is given `mask`, which says the same."""
    mask.shared_prefix = layout  # type: ignore[attr-defined]


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """As without this module, but for a mask with a layout."""
    layout = getattr(attention_mask, "shared_prefix", None)
    size = value.size(-1)
    if layout is None or dropout or more.get("position_bias") is not None or size > query.size(-1):
        return grouped_attention.attention(module, query, key, value, attention_mask, dropout, scaling, **more)
    # With autocast positions are put into query and key in float32, and values come as they were multiplied.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if size < query.size(-1):  # as in DeepSeek's latent attention; the kernel takes heads of one size
        value = torch.nn.functional.pad(value, (0, query.size(-1) - size))
    groups = getattr(module, "num_key_value_groups", 1)
    output = _SharedAttention.apply(query, repeat_kv(key, groups), repeat_kv(value, groups), layout, scaling)
    return output[..., :size].transpose(1, 2).contiguous(), None


class _SharedAttention(torch.autograd.Function):
    """Query, key and value are (rows, heads, width, size).

    With a mask alone every pair of tokens of a row is computed, and most of them are of two branches. Here all tokens attend
    to the own tokens of the part they are in, level by level; the levels are joined by their log-sum-exp, as the blocks of
    Ring Attention are (arXiv 2310.01889).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float | None) -> Tensor:
        first, *others = layout
        output, logsumexp = _attend(query, key, value, first, scale)
        logsumexp = logsumexp[..., None]
        for level in others:
            own_output, own_logsumexp = _attend(query, key, value, level, scale)
            before = _gather(logsumexp, level)
            joined = torch.logaddexp(before, own_logsumexp[..., None])
            part_output = _gather(output, level) * (before - joined).exp()
            part_output += own_output * (own_logsumexp[..., None] - joined).exp()
            _put(output, part_output.to(output.dtype), level)
            _put(logsumexp, joined, level)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.layout, ctx.scale = layout, scale
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # With the output and the log-sum-exp over all keys, the kernels' gradients for a part of the keys are exact.
        # In float32, as the kernel for bfloat16 takes several times as long.
        dtype = grad.dtype
        grad, query, key, value, output, logsumexp = (states.float() for states in (grad, *ctx.saved_tensors))
        totals = [torch.zeros_like(states) for states in (query, key, value)]
        for level in ctx.layout:
            of_queries = [_gather(states, level) for states in (grad, query, output, logsumexp)]
            own_keys = [_gather(states, level, level.keys) for states in (key, value)]
            part_grad, part_query, part_output, part_logsumexp = of_queries
            if level.places is not None:
                # What fills up a shorter part attends to nothing: the exponential of a score less this is 0.
                part_logsumexp = part_logsumexp.masked_fill(~level.valid[:, None, :, None], torch.inf)
            parts = _backward(
                *(part_grad, part_query, *own_keys, part_output, part_logsumexp[..., 0], 0.0, level.mask is None),
                attn_mask=level.mask,
                scale=ctx.scale,
            )
            for total, part in zip(totals, parts, strict=True):
                _put(total, part, level, add=True)
        return totals[0].to(dtype), totals[1].to(dtype), totals[2].to(dtype), None, None


def _attend(query: Tensor, key: Tensor, value: Tensor, level: Level, scale: float | None) -> tuple[Tensor, Tensor]:
    """Output (parts, heads, longest part, size) and log-sum-exp of attention to the parts' own tokens."""
    mask = None if level.mask is None else level.mask.to(query.dtype)
    own_keys = [_gather(states, level, level.keys) for states in (key, value)]
    return _forward(_gather(query, level), *own_keys, is_causal=mask is None, attn_mask=mask, scale=scale)


def _gather(states: Tensor, level: Level, first: int | None = None) -> Tensor:
    """(parts, heads, longest part, size) from (rows, heads, width, size); only the `first` tokens of each part if given."""
    if level.places is None:
        return states[:, :, :first]
    return states.transpose(1, 2).flatten(0, 1)[level.places[:, :first]].transpose(1, 2)


def _put(states: Tensor, parts: Tensor, level: Level, add: bool = False) -> None:
    """Put the parts' values, or those of their first tokens, into `states`, in place, or add them; reverses `_gather`."""
    first = parts.size(2)
    if level.places is None:  # whole rows are only added to
        states[:, :, :first] += parts
        return
    valid = level.valid[:, :first]
    places, width = level.places[:, :first][valid], states.size(2)
    values = parts.transpose(1, 2)[valid]
    states.transpose(1, 2).index_put_((places // width, places % width), values, accumulate=add)


def _forward_tile(tile: Tensor, *arguments: Any, **more: Any) -> None:
    """TRL's, for a `tile` (tokens, part of the vocabulary) of logits, which it overwrites."""
    targets, largest, sum_exp, x_sum_exp, _, _, _, target_logit, begin, columns = arguments[1:]
    other = ("HAS_LOG_SUM_SQ_PROBS", "HAS_MEAN_LOGITS", "HAS_IS_TOP1")
    if any(more[name] for name in other) or not _plain(tile, more):
        return _trl_forward_tile(tile, *arguments, **more)
    local = targets - begin
    here = (local >= 0) & (local < columns)
    at_target = tile.gather(1, local.clamp(0, columns - 1)[:, None])[:, 0]
    target_logit.copy_(torch.where(here, at_target, target_logit))
    new = torch.maximum(largest, tile.amax(dim=1))
    rescale = (largest - new).exp_()
    exp = tile.sub_(new[:, None]).exp()
    sum_here = exp.sum(dim=1)
    sum_exp.mul_(rescale).add_(sum_here)
    if more["HAS_ENTROPY"]:
        x_sum_exp.mul_(rescale).add_(torch.linalg.vecdot(exp, tile)).add_(new * sum_here)
    largest.copy_(new)


def _backward_tile(tile: Tensor, *arguments: Any, **more: Any) -> None:
    """TRL's: turns a `tile` of logits into its gradient, in place."""
    targets, log_z, entropy, grad, grad_entropy, begin, columns = arguments[1:]
    if not _plain(tile, more):
        return _trl_backward_tile(tile, *arguments, **more)
    if not more["HAS_LOGPROB_GRAD"]:
        grad = torch.zeros_like(log_z)
    tile.sub_(log_z[:, None])
    # d log p(target) / dz = 1[target] − p, and d entropy / dz = −p · (log p + entropy)
    weight = -grad[:, None]
    if more["HAS_ENTROPY_GRAD"]:
        weight = weight - grad_entropy[:, None] * (tile + entropy[:, None])
    tile.exp_().mul_(weight)
    local = targets - begin
    here = ((local >= 0) & (local < columns)).nonzero()[:, 0]
    tile[here, local[here]] += grad[here]


def _plain(tile: Tensor, options: dict[str, Any]) -> bool:
    """Whether the logits are in float32 and go into the softmax as they are."""
    changed = options["HAS_SOFTCAP"] or options["logit_scale"] != 1 or options["inv_t"] != 1
    return tile.dtype == torch.float32 and not changed
