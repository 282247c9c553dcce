"""Drawing the next token, and attention of grouped heads: the same as the plain way, with less memory moved."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from teacher import grouped_attention
from teacher.decoding import draw, sample_completions
from tests.teacher.test_shared_prefix import model_of


@settings(deadline=None)
@given(
    outcomes=st.sampled_from([1, 2, 511, 512, 513, 1024, 1300]),
    numbers=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=5),
    seed=st.integers(0, 9),
    zeros=st.floats(0, 0.99),
)
def test_a_draw_is_that_of_the_running_sum(outcomes, numbers, seed, zeros):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(len(numbers), outcomes, generator=generator)
    weights[torch.rand(weights.shape, generator=generator) < zeros] = 0.0
    weights[:, seed % outcomes] += 0.1
    probabilities = weights / weights.sum(-1, keepdim=True)
    drawn = draw(probabilities, torch.tensor(numbers, dtype=torch.float64))
    cumulative = probabilities.double().cumsum(-1) / probabilities.double().sum(-1, keepdim=True)
    for row, (number, outcome) in enumerate(zip(numbers, drawn.tolist(), strict=True)):
        assert probabilities[row, outcome] > 0
        before = cumulative[row, outcome - 1].item() if outcome else 0.0
        assert before - 1e-6 <= number <= cumulative[row, outcome].item() + 1e-6


@pytest.mark.parametrize("outcomes", [5, 512, 600])
def test_where_nothing_can_be_drawn_the_place_is_still_an_outcome(outcomes):
    drawn = draw(torch.full((2, outcomes), torch.nan), torch.tensor([0.0, 0.9], dtype=torch.float64))
    assert ((drawn >= 0) & (drawn < outcomes)).all()


def test_draws_have_the_frequencies_of_the_distribution():
    probabilities = torch.softmax(2 * torch.randn(1, 1300, generator=torch.Generator().manual_seed(0)), -1)
    count = 100_000
    numbers = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = torch.bincount(draw(probabilities.expand(count, -1), numbers), minlength=1300) / count
    chi_square = ((found - probabilities[0]) ** 2 / probabilities[0]).sum().item() * count
    assert abs(chi_square - 1299) < 5 * (2 * 1299) ** 0.5


@pytest.mark.parametrize("group", [1, 3, 7])
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_heads_of_a_group_attend_as_if_keys_and_values_were_copied(group, tokens, masked):
    module = torch.nn.Module()
    module.num_key_value_groups = group
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, heads, length, 8) for heads, length in ((2 * group, tokens), (2, 9), (2, 9)))
    mask = torch.rand(3, 1, tokens, 9) < 0.6 if masked else None
    if masked:
        mask[..., 0] = True
    ours, _ = grouped_attention.attention(
        module, query, key, value, mask, 0.0, 0.3, is_causal=tokens > 1 and not masked
    )
    stock, _ = sdpa_attention_forward(module, query, key, value, mask, 0.0, 0.3, is_causal=tokens > 1 and not masked)
    assert ours.shape == stock.shape
    torch.testing.assert_close(ours, stock)


def test_masks_of_single_heads_are_left_to_transformers():
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    mask = torch.rand(1, 4, 1, 5) < 0.6
    mask[..., 0] = True
    for given_mask, more in ((mask, {}), (mask[:, :1], {"position_bias": torch.randn(1, 4, 1, 5)})):
        ours, _ = grouped_attention.attention(module, query, key, value, given_mask, 0.0, None, **more)
        torch.testing.assert_close(
            ours, sdpa_attention_forward(module, query, key, value, given_mask, 0.0, None, **more)[0]
        )


def test_decoding_calls_it_for_models_with_grouped_heads(monkeypatch):
    calls = []

    def counted(module, query, *arguments, **more):
        calls.append(query.size(2))
        return grouped_attention.attention(module, query, *arguments, **more)

    model = model_of("llama")
    sample_completions(model, [[5, 6, 7]], max_tokens=2, ends={2}, temperature=1.0, pad=0)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", counted)
    sample_completions(model, [[5, 6, 7], [5, 8]], max_tokens=3, ends=set(), temperature=1.0, pad=0)
    assert 1 in calls


def test_another_attention_is_left_in_its_place(monkeypatch):
    other = lambda *arguments, **more: None  # noqa: E731
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", other)
    grouped_attention.install()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is other
