"""Which sequences share a beginning, and which are computed together.

The completions of a group follow one prompt, and the prompts of a batch one guideline: a `Group` of groups.
`teacher.shared_prefix` computes each of them with every common beginning once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

# A level more costs a small model a tenth of the training part, as its attention gathers tokens once more (trainer_overhead,
# the demo's decoder): it should save at least as many tokens.
_LEVEL = 0.1


class Group(NamedTuple):
    """Sequences whose first `shared` tokens are the same and are computed once; 0 computes each sequence in full."""

    members: tuple[int | Group, ...]
    """Indices of sequences, and groups that share more than this one."""
    shared: int

    @property
    def rows(self) -> tuple[int, ...]:
        """The indices of all its sequences."""
        return tuple(
            row for member in self.members for row in (member.rows if isinstance(member, Group) else (member,))
        )

    def tokens(self, lengths: Sequence[int]) -> int:
        """Tokens that are computed, given the length of every sequence."""
        return self.shared + sum(_tokens(member, lengths) - self.shared for member in self.members)


def _tokens(member: int | Group, lengths: Sequence[int]) -> int:
    return member.tokens(lengths) if isinstance(member, Group) else lengths[member]


def group_by_prefix(prefixes: Sequence[Sequence[int]]) -> list[Group]:
    """One group for every different prefix, from the prefix of every sequence (for a rollout: its prompt).

    They are members of one group if all prefixes begin alike, as prompts do with their guideline.
    """
    rows: dict[tuple[int, ...], list[int]] = {}
    for row, prefix in enumerate(prefixes):
        rows.setdefault(tuple(prefix), []).append(row)
    groups = [Group(tuple(members), len(prefix)) for prefix, members in rows.items()]
    # A group must have a token of its own.
    root = min(common_prefix([list(prefix) for prefix in rows]), min(map(len, rows)) - 1)
    return [Group(tuple(groups), root)] if root > 0 and len(groups) > 1 else groups


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
        batches.remove(largest)
        parts: Sequence[Group] = largest
        if len(largest) == 1:
            members, shared = largest[0]
            half = (len(members) + 1) // 2
            parts = [_group(members[:half], shared), _group(members[half:], shared)]
        half = (len(parts) + 1) // 2
        batches += [list(parts[:half]), list(parts[half:])]
    return batches


def _cut(group: Group, lengths: Sequence[int], budget: int, hidden_size: int) -> list[Group]:
    """`group` in pieces of nearly equal numbers of members, or whole."""
    members: list[int | Group] = []
    for member in group.members:
        members += _cut(member, lengths, budget, hidden_size) if isinstance(member, Group) else [member]
    # With groups among them the longest come first, as rows of like width need least padding.
    members.sort(key=lambda member: -_tokens(member, lengths) if isinstance(member, Group) else 0)
    branch = sum(_tokens(member, lengths) - group.shared for member in members) / len(members)

    def cost(size: int) -> float:
        # Of a layer, in units of 4·hidden_size operations: 6·hidden_size a token for its weights, and one a pair of tokens.
        tokens = group.shared + size * branch
        return math.ceil(len(members) / size) * tokens * (6 * hidden_size + tokens)

    shared = group.shared
    if any(isinstance(member, Group) for member in members) and shared < _LEVEL * (shared + branch):
        shared = 0
    size = len(members) if shared else 1
    if hidden_size and shared:
        size = min(range(1, len(members) + 1), key=lambda size: (cost(size), -size))
    size = math.ceil(len(members) / math.ceil(len(members) / size))
    pieces: list[Group] = []
    piece: tuple[int | Group, ...] = ()
    for member in members:
        if piece and (len(piece) == size or Group((*piece, member), group.shared).tokens(lengths) > budget):
            pieces.append(_group(piece, group.shared))
            piece = ()
        piece += (member,)
    return [*pieces, _group(piece, group.shared)]


def _group(members: tuple[int | Group, ...], shared: int) -> Group:
    """A group of them; of a single one, that one, which shares nothing if it is a sequence."""
    if len(members) > 1:
        return Group(members, shared)
    (member,) = members
    return member if isinstance(member, Group) else Group(members, 0)
