from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

from student.config import StudentConfig
from student.losses import (
    blended_target,
    class_weights,
    lambda_loss,
    listnet,
    margin_mse,
    mixed_cross_entropy,
    reasoning_contrast,
    squared_emd,
)


def _rows(n: int = 6, k: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(n, k), torch.randint(k, (n,)), torch.rand(n, k).softmax(dim=1)


def test_gold_alone_is_cross_entropy():
    logits, grade, soft = _rows()
    gold = one_hot(grade, 3).float()
    loss = mixed_cross_entropy(logits, gold, soft * 0, torch.ones(6), torch.ones(6), temperature=3)
    assert loss == pytest.approx(float(cross_entropy(logits, grade)), rel=1e-5)
    between = torch.rand(6, 3).softmax(dim=1)
    loss = mixed_cross_entropy(logits, between, soft * 0, torch.ones(6), torch.ones(6))
    assert loss == pytest.approx(float(cross_entropy(logits, between)), rel=1e-5)


def test_teacher_alone_is_soft_cross_entropy_and_grade_is_ignored():
    logits, grade, soft = _rows()
    zeros, gold = torch.zeros(6), one_hot(grade, 3).float()
    loss = mixed_cross_entropy(logits, gold, soft, zeros, torch.ones(6))
    assert loss == pytest.approx(float(cross_entropy(logits, soft)), rel=1e-5)
    assert loss == mixed_cross_entropy(logits, gold * 0, soft, zeros, torch.ones(6))


def test_the_gradient_vanishes_where_the_student_equals_the_teacher_at_any_temperature():
    logits, _, _ = _rows()
    for temperature in (0.5, 1.0, 4.0):
        student = logits.clone().requires_grad_()
        none = torch.zeros(6, 3)
        loss = mixed_cross_entropy(
            student, none, logits.softmax(dim=1), torch.zeros(6), torch.ones(6), temperature=temperature
        )
        loss.backward()
        assert student.grad.abs().max() < 1e-5


def test_weights_are_relative_and_a_row_of_weight_zero_teaches_nothing():
    logits, grade, soft = _rows()
    gold = one_hot(grade, 3).float()
    mix = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0, 0.5])
    weight = torch.tensor([1.0, 2.0, 0.0, 0.5, 1.0, 3.0])
    loss = mixed_cross_entropy(logits, gold, soft, mix, weight)
    assert loss == pytest.approx(float(mixed_cross_entropy(logits, gold, soft, mix, weight * 7)), rel=1e-5)
    changed = logits.clone()
    changed[2] += torch.randn(3)
    assert loss == mixed_cross_entropy(changed, gold, soft, mix, weight)


def test_margin_mse_by_hand_and_within_queries_only():
    logits = torch.tensor([[9.0, -9.0], [-9.0, 9.0], [9.0, -9.0], [-9.0, 9.0]])  # expected grades 0, 1, 0, 1
    target = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0], [0.0, 1.0]])  # expected grades 0, 0.5, 1, 1
    query, ones = torch.tensor([0, 0, 1, 1]), torch.ones(4)
    # margins: query 0: student −1, teacher −0.5; query 1: student −1, teacher 0
    assert float(margin_mse(logits, target, query, ones)) == pytest.approx((0.25 + 1.0) / 2, abs=1e-4)
    assert float(margin_mse(logits, target, torch.arange(4), ones)) == 0
    # A shift of all scores of a query changes no margin.
    both_wrong = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    same_shift = torch.tensor([[-9.0, 9.0], [-9.0, 9.0]])
    assert float(margin_mse(same_shift, both_wrong, torch.zeros(2), torch.ones(2))) == pytest.approx(0, abs=1e-6)


def test_listnet_by_hand_and_at_the_target():
    target = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])  # expected grades 0, 1 and, alone in its query, 1
    query, ones = torch.tensor([0, 0, 1]), torch.ones(3)
    flat = torch.zeros(3, 2, requires_grad=True)
    # The student's shares are ½ and ½, whatever the target's.
    loss = listnet(flat, target, query, ones)
    assert float(loss) == pytest.approx(math.log(2), rel=1e-5)
    loss.backward()
    assert (flat.grad[:, 1] < 0).tolist() == [False, True, False]
    assert flat.grad[2].abs().sum() == 0
    right = (target + 1e-6).log().requires_grad_()
    listnet(right, target, query, ones).backward()
    assert right.grad.abs().max() < 1e-5
    assert float(listnet(flat, target, torch.arange(3), ones)) == 0


def test_lambda_loss_by_hand_and_within_queries_only():
    target = one_hot(torch.tensor([0, 2, 1, 2]), 3).float()  # the last one is alone in its query
    logits = torch.tensor([[9.0, 0, 0], [0, 0, 9.0], [9.0, 0, 0], [9.0, 0, 0]])
    query, ones = torch.tensor([0, 0, 0, 1]), torch.ones(4)
    grades = logits.softmax(dim=1) @ torch.arange(3.0)
    # Ranks 2, 1, 3; gains 0, 3, 1; the best order has DCG 3 + 1 / log2(3), by which all weights are divided.
    discount = {1: 1 - 1 / math.log2(3), 2: 1 / math.log2(3) - 1 / 2}
    weights = {(1, 0): 3 * discount[1], (2, 0): 1 * discount[1], (1, 2): 2 * discount[2]}
    costs = {(i, j): math.log1p(math.exp(float(grades[j] - grades[i]))) for i, j in weights}
    expected = sum(weights[pair] * costs[pair] for pair in weights) / sum(weights.values())
    assert float(lambda_loss(logits, target, query, ones)) == pytest.approx(expected, rel=1e-4)
    assert float(lambda_loss(logits, target, torch.arange(4), ones)) == 0
    flat = torch.zeros(4, 3, requires_grad=True)
    lambda_loss(flat, target, query, ones).backward()
    assert flat.grad[0, 2] > 0 > flat.grad[1, 2]
    assert flat.grad[3].abs().sum() == 0


def test_class_weights_level_the_classes():
    gold = one_hot(torch.tensor([0, 0, 0, 1]), 3).float()
    target = blended_target(gold, torch.zeros(4, 3), torch.ones(4))
    assert class_weights(target, torch.ones(4), 0) is None
    weights = class_weights(target, torch.ones(4), 1)
    assert weights.tolist() == pytest.approx([2 / 3, 2.0, 0.0])
    softer = class_weights(target, torch.ones(4), 0.5)
    assert 1 < float(softer[1] / softer[0]) < 3


def test_squared_emd_by_hand_and_by_distance():
    logits = torch.tensor([[0.5, 0.25, 0.25], [1.0, 1.0, 2.0]]).log()  # (.5, .25, .25) and (.25, .25, .5)
    target = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    # first row: (−.5)² + (−.25)² + 0; second: .25² + .5² + 0
    assert squared_emd(logits, target, torch.tensor([1.0, 0.0])) == pytest.approx(0.3125)
    assert squared_emd(logits, target, torch.tensor([1.0, 3.0])) == pytest.approx(0.3125)
    sure = torch.tensor([[20.0, 0.0, 0.0]])
    near, far = torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[0.0, 0.0, 1.0]])
    one = torch.ones(1)
    assert squared_emd(sure, near, one) == pytest.approx(1, rel=1e-4)
    assert squared_emd(sure, far, one) == pytest.approx(2, rel=1e-4)


def test_reasoning_contrast_by_hand():
    plain = torch.tensor([[2.0, 0.0], [0.0, 3.0]], requires_grad=True)
    reasoned = torch.tensor([[1.0, 0.0], [1.0, 1.0]], requires_grad=True)
    # cosines: row 0 (1, 1/√2), row 1 (0, 1/√2); temperature ½ doubles them
    e = torch.tensor([[2.0, 2**0.5], [0.0, 2**0.5]]).exp()
    rows = -torch.log(torch.tensor([e[0, 0] / e[0].sum(), e[1, 1] / e[1].sum()]))
    loss = reasoning_contrast(plain, reasoned, torch.tensor([1.0, 3.0]), 0.5)
    assert loss.item() == pytest.approx(float((rows[0] + 3 * rows[1]) / 4), rel=1e-5)
    loss.backward()
    assert reasoned.grad is None  # the reasoned side teaches
    assert plain.grad.abs().sum() > 0
    one = torch.ones(1, 4, requires_grad=True)
    assert reasoning_contrast(one, torch.ones(1, 4), torch.ones(1), 0.1) == 0  # it needs two rows


@pytest.mark.parametrize("temperature", [1.0, 0.2, 0.05, 0.02, 0.005])
def test_a_low_temperature_teaches_the_likeliest_grade_and_not_nothing(temperature):
    """Powers of probabilities that are all small used to vanish against the sum that they were divided by."""
    soft = torch.tensor([[0.4, 0.35, 0.25], [0.2, 0.2, 0.6], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    logits = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    mix, weight = torch.tensor([0.0, 0.0, 0.0, 1.0]), torch.ones(4)
    mixed_cross_entropy(logits, torch.zeros(4, 3), soft, mix, weight, temperature=temperature).backward()
    expected = torch.softmax(soft[:3].double().log() / temperature, dim=1)
    torch.testing.assert_close(logits.grad[:3], temperature * (1 / 3 - expected) / 4, atol=1e-6, rtol=1e-4)
    assert (logits.grad[3] == 0).all()


@pytest.mark.parametrize("temperature", [0.0, 0.02, 21.0, float("nan")])
def test_a_temperature_that_teaches_nothing_is_refused(temperature):
    with pytest.raises(ValueError, match=r"distill_temperature"):
        StudentConfig(distill_temperature=temperature)
