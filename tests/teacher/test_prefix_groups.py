"""Every sequence is computed once, with what really begins alike, within the budget."""

from hypothesis import given
from hypothesis import strategies as st

from teacher.prefix_groups import Group, common_prefix, group_by_prefix, micro_batches


def test_prompts_that_begin_alike_are_members_of_one_group():
    guideline = [5, 6, 7]
    prompts = [[*guideline, 8], [*guideline, 9, 10], [*guideline, 8]]
    assert group_by_prefix(prompts) == [Group((Group((0, 2), 4), Group((1,), 5)), 3)]
    # A prompt that is the beginning of the other keeps a token of its own.
    assert group_by_prefix([guideline, [*guideline, 8]]) == [Group((Group((0,), 3), Group((1,), 4)), 2)]
    assert group_by_prefix([[5], [5, 6]]) == [Group((0,), 1), Group((1,), 2)]
    assert group_by_prefix([guideline, guideline]) == [Group((0, 1), 3)]


def test_micro_batches_keep_to_the_budget_and_hold_every_sequence_once():
    lengths = [100 + 10 * row for row in range(8)] + [60] * 8 + [900]
    groups = [Group(tuple(range(8)), 50), Group(tuple(range(8, 16)), 50), Group((16,), 50)]
    for budget in (200, 400, 1000, 10_000):
        batches = micro_batches(groups, lengths, budget, hidden_size=512)
        assert sorted(row for batch in batches for group in batch for row in group.rows) == list(range(17))
        for batch in batches:
            width = max(group.tokens(lengths) for group in batch)
            assert len(batch) * width <= budget or (len(batch) == 1 and len(batch[0].rows) == 1)
    # Nothing is gained by one long row where its own attention costs more than the prompt
    assert len(micro_batches([Group(tuple(range(16)), 50)], [2050] * 16, 10**9, hidden_size=64)[0]) > 1
    assert len(micro_batches(groups, lengths, 10_000, hidden_size=512, at_least=17)) == 17


@given(data=st.data(), budget=st.integers(1, 400), hidden_size=st.sampled_from([0, 8, 512]))
def test_micro_batches_of_any_prompts_share_what_is_the_same_and_no_more(data, budget, hidden_size):
    tokens = st.lists(st.integers(0, 2), min_size=1, max_size=30)
    guideline = data.draw(st.lists(st.integers(0, 2), max_size=30))
    prompts = [guideline + own for own in data.draw(st.lists(tokens, min_size=1, max_size=4))]
    rows = [(prompt, own) for prompt in prompts for own in data.draw(st.lists(tokens, min_size=1, max_size=4))]
    sequences = [prompt + own for prompt, own in rows]
    groups = group_by_prefix([prompt for prompt, _ in rows])
    at_least = data.draw(st.integers(1, len(rows)))
    batches = micro_batches(groups, [len(ids) for ids in sequences], budget, hidden_size, at_least)
    assert sorted(row for batch in batches for group in batch for row in group.rows) == list(range(len(rows)))
    assert len(batches) >= at_least

    def check(group, known):
        assert len({tuple(sequences[row][: group.shared]) for row in group.rows}) == 1
        assert group.shared > known or len(group.members) == 1
        for member in group.members:
            if isinstance(member, Group):
                check(member, group.shared)

    for batch in batches:
        for group in batch:
            check(group, 0)
        widths = [group.tokens([len(ids) for ids in sequences]) for group in batch]
        assert len(batch) * max(widths) <= budget or len(batch) == len(batch[0].rows) == 1


def test_sixteen_prompts_with_their_completions_are_one_row():
    guideline, prompts, group, tokens = 190, 16, 8, 29
    lengths = [guideline + 37 + tokens] * (prompts * group)
    groups = tuple(Group(tuple(range(begin, begin + group)), guideline + 37) for begin in range(0, len(lengths), group))
    (batch,) = micro_batches([Group(groups, guideline)], lengths, 10_000, hidden_size=0)
    assert batch[0].tokens(lengths) == guideline + prompts * (37 + group * tokens)
    # On a GPU, where what a mask hides is computed, only as many as save more than that costs.
    per_row = [
        len(group.members)
        for batch in micro_batches([Group(groups, guideline)], lengths, 10_000, 1536)
        for group in batch
    ]
    assert set(per_row) == {4}
    # What three words save is less than a level costs.
    short = [length - guideline + 3 for length in lengths]
    groups = tuple(Group(own.members, 3 + 37) for own in groups)
    (batch,) = micro_batches([Group(groups, 3)], short, 10_000, hidden_size=0)
    assert batch == list(groups)


def test_common_prefix_of_a_batch():
    assert common_prefix([[1, 2, 3], [1, 2], [1, 2, 4]]) == 2
    assert common_prefix([[1], [2]]) == 0
    assert common_prefix([[1, 2]]) == 2
