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


class Layout(NamedTuple):
    """Where prefixes and branches are in the rows of a batch, of shape (rows, width)."""

    prefix_mask: Tensor
    """(rows, 1, width, longest prefix): what is added to a token's scores, −inf for tokens of the prefix that it does not
    see."""
    places: Tensor
    """(branches, longest branch): the places of a branch's tokens in the batch, as row · width + column."""
    valid: Tensor
    """(branches, longest branch) bool: False where a branch is shorter."""
    rows: Tensor
    """The rows of all valid places."""
    columns: Tensor
    """The columns of all valid places."""


def lay_out(rows: Sequence[tuple[int, Sequence[int]]], width: int) -> Layout:
    """Of each row the length of its prefix (≥ 1) and of its branches, which follow it one after the other."""
    prefixes = torch.tensor([prefix for prefix, _ in rows])
    column, key = torch.arange(width)[:, None], torch.arange(int(prefixes.max()))
    hidden = (key > column) | (key >= prefixes[:, None, None])
    starts, counts = [], []
    for row, (prefix, lengths) in enumerate(rows):
        begin = row * width + prefix
        for length in filter(None, lengths):
            starts.append(begin)
            counts.append(length)
            begin += length
    step = torch.arange(max(counts, default=0))
    valid = step < torch.tensor(counts, dtype=torch.long)[:, None]
    places = torch.where(valid, torch.tensor(starts, dtype=torch.long)[:, None] + step, 0)
    prefix_mask = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None]
    return Layout(prefix_mask, places, valid, places[valid] // width, places[valid] % width)


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
    if layout is None or not layout.places.numel() or dropout or more.get("position_bias") is not None:
        return grouped_attention.attention(module, query, key, value, attention_mask, dropout, scaling, **more)
    # With autocast positions are put into query and key in float32, and values come as they were multiplied.
    query, key = query.to(value.dtype), key.to(value.dtype)
    groups = getattr(module, "num_key_value_groups", 1)
    output = _SharedAttention.apply(query, repeat_kv(key, groups), repeat_kv(value, groups), layout, scaling)
    return output.transpose(1, 2).contiguous(), None


class _SharedAttention(torch.autograd.Function):
    """Query, key and value are (rows, heads, width, size).

    With a mask alone every pair of tokens of a row is computed, and most of them are of two branches. Here all tokens attend
    to the prefix, and then each branch to itself; the two are joined by their log-sum-exp, as the blocks of Ring Attention
    are (arXiv 2310.01889).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float | None) -> Tensor:
        prefix = layout.prefix_mask.size(3)
        mask = layout.prefix_mask.to(query.dtype)
        output, logsumexp = _forward(query, key[:, :, :prefix], value[:, :, :prefix], attn_mask=mask, scale=scale)
        branches = [_gather(states, layout) for states in (query, key, value)]
        own_output, own_logsumexp = _forward(*branches, is_causal=True, scale=scale)
        prefix_logsumexp = _gather(logsumexp[..., None], layout)
        joined = torch.logaddexp(prefix_logsumexp, own_logsumexp[..., None])
        branch_output = _gather(output, layout) * (prefix_logsumexp - joined).exp()
        branch_output += own_output * (own_logsumexp[..., None] - joined).exp()
        _scatter(output, branch_output.to(output.dtype), layout)
        _scatter(logsumexp[..., None], joined, layout)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.layout, ctx.scale = layout, scale
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # With the output and the log-sum-exp over all keys, the kernels' gradients for a part of the keys are exact.
        # In float32, as the kernel for bfloat16 takes several times as long.
        dtype = grad.dtype
        grad, query, key, value, output, logsumexp = (states.float() for states in (grad, *ctx.saved_tensors))
        layout, scale = ctx.layout, ctx.scale
        prefix = layout.prefix_mask.size(3)
        grad_query, grad_prefix_key, grad_prefix_value = _backward(
            *(grad, query, key[:, :, :prefix], value[:, :, :prefix], output, logsumexp, 0.0, False),
            attn_mask=layout.prefix_mask,
            scale=scale,
        )
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        grad_key[:, :, :prefix], grad_value[:, :, :prefix] = grad_prefix_key, grad_prefix_value
        own = [_gather(states, layout) for states in (grad, query, key, value, output)]
        own[0] = own[0] * layout.valid[:, None, :, None]
        branch_logsumexp = _gather(logsumexp[..., None], layout)[..., 0]
        of_branches = _backward(*own, branch_logsumexp, 0.0, True, scale=scale)
        for total, part in zip((grad_query, grad_key, grad_value), of_branches, strict=True):
            _scatter(total, part, layout, add=True)
        return grad_query.to(dtype), grad_key.to(dtype), grad_value.to(dtype), None, None


def _gather(states: Tensor, layout: Layout) -> Tensor:
    """(branches, heads, longest branch, size) from (rows, heads, width, size)."""
    return states.transpose(1, 2).flatten(0, 1)[layout.places].transpose(1, 2)


def _scatter(states: Tensor, branches: Tensor, layout: Layout, add: bool = False) -> None:
    """Put the branches' values into `states`, in place, or add them; the reverse of `_gather`."""
    values = branches.transpose(1, 2)[layout.valid]
    states.transpose(1, 2).index_put_((layout.rows, layout.columns), values, accumulate=add)


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
