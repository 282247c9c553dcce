"""Thresholds at a wanted precision or recall, and what they do to rows that had no part in choosing them."""

from __future__ import annotations

import numpy as np
import pytest

from data.contracts import ContractError, Grade, GradeScale
from student.decisions import bad_ad_rates, check_decisions, measure_decisions, operating_curves
from student.metrics import Labels
from student.scorer import decision_threshold, event_score, softmax

SCALE = GradeScale(grades=tuple(Grade(name=name, definition=name) for name in ("bad", "fair", "good")), relevant_from=2)


def rows(n, seed, sure=1.5):
    """Grades, calibrated-looking probabilities, and query ids of `n` pairs."""
    rng = np.random.default_rng(seed)
    grade = rng.choice(3, size=n, p=(0.3, 0.3, 0.4))
    return grade, softmax(sure * np.eye(3)[grade] + rng.normal(size=(n, 3))), rng.integers(n // 4, size=n)


def shares(caught, event):
    return {"precision": event[caught].mean(), "recall": caught[event].mean(), "caught": caught.mean()}


@pytest.mark.parametrize(
    ("decision", "event"),
    [
        ("bad:precision=0.8", lambda grade: grade == 0),
        ("1:recall=0.9", lambda grade: grade <= 1),
        ("good:recall=0.5", lambda grade: grade == 2),
        ("precision=0.85", lambda grade: grade == 2),
    ],
)
def test_a_threshold_from_valid_has_about_the_wanted_share_on_test(decision, event):
    grade, probs, _ = rows(4000, 0)
    curves = operating_curves(grade, probs, 2)
    test_grade, test_probs, query = rows(6000, 1)
    found = measure_decisions([decision], SCALE, curves, Labels(test_grade, query, 2, 200), test_probs)[0]
    score = event_score(test_probs, found["grade"], 2)
    expected = shares(score >= found["threshold"], event(test_grade))
    for name, value in expected.items():
        assert found[name]["value"] == pytest.approx(value)
        assert found[name]["low"] < value < found[name]["high"]
    metric, wanted = decision.rpartition(":")[2].split("=")
    assert found[metric]["value"] == pytest.approx(float(wanted), abs=0.03)
    # No better threshold was left out: with a little less wanted precision more is caught, never fewer.
    looser = decision.replace(wanted, str(float(wanted) - 0.1))
    assert (decision_threshold(looser, SCALE.model_dump(), curves) < found["threshold"]) == (metric == "precision")


def test_precision_falls_as_more_is_caught_and_thresholds_lie_between_scores():
    grade, probs, _ = rows(300, 2)
    for k, curve in enumerate(operating_curves(grade, probs, 2)):
        assert np.diff(curve["threshold"]).max() < 0
        assert np.diff(curve["precision"]).max() <= 1e-9
        assert np.diff(curve["recall"]).min() >= 0
        assert curve["recall"][-1] == pytest.approx(1)
        assert not set(curve["threshold"]) & set(event_score(probs, k, 2))
        assert (event_score(probs, k, 2) >= curve["threshold"][0]).sum() >= 10
        assert len(curve["threshold"]) <= 200


def test_a_share_that_no_row_contradicts_has_an_interval_all_the_same():
    grade, probs, query = rows(400, 3, sure=20)
    curves = operating_curves(grade, probs, 2)
    found = measure_decisions(["precision=0.99"], SCALE, curves, Labels(grade, query, 2, 100), probs)[0]
    assert found["precision"]["value"] == 1
    assert 0.9 < found["precision"]["low"] < 0.99


def test_what_cannot_be_decided_is_said():
    grade, probs, query = rows(400, 4, sure=0)
    curves = operating_curves(grade, probs, 2)
    found = measure_decisions(["precision=0.99"], SCALE, curves, Labels(grade, query, 2, 100), probs)[0]
    assert found["threshold"] is None
    assert "no threshold has precision=0.99; the best has 0." in found["fault"]
    nothing = operating_curves(np.zeros(5, int), np.full((5, 3), 1 / 3), 2)
    with pytest.raises(ValueError, match=r"no threshold has recall=0\.5$"):
        decision_threshold("recall=0.5", SCALE.model_dump(), nothing)
    for text in ("precision", "f1=0.5", "precision=2", "precision=nan", "bad:0.5"):
        with pytest.raises(ContractError, match=r"is no decision; write precision=0\.95"):
            check_decisions([text], SCALE)
    with pytest.raises(ContractError, match="no grade '3'; the grades are bad, fair, good"):
        check_decisions(["3:recall=0.5"], SCALE)


def test_the_rate_of_bad_ads_grows_with_the_traffic_kept():
    grade, probs, query = rows(2000, 5)
    found = bad_ad_rates(Labels(grade, query, 2, 100), probs)
    assert [row["kept"] for row in found] == pytest.approx(np.arange(1, 11) / 10)
    score = event_score(probs, 2, 2)
    for row in found:
        kept = score >= row["threshold"]
        assert kept.mean() == pytest.approx(row["kept"], abs=0.002)
        for k, rate in enumerate(row["rates"]):
            assert rate["value"] == pytest.approx((grade[kept] <= k).mean())
            assert rate["low"] < rate["value"] < rate["high"]
    assert np.diff([row["rates"][0]["value"] for row in found]).min() > 0
