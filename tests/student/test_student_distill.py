from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForSequenceClassification

from data.contracts import ContractError, GradeScale, metric_lines, words
from student import checkpoint, peers
from student import fit as fit_module
from student.baselines import Bm25
from student.config import StudentConfig
from student.dataset import read_examples, tokenize
from student.distill import distill
from student.evaluation import compare_students
from student.model import load_classifier
from student.reader import Reader, predict_logits
from student.scorer import load_tokenizer, softmax
from student.scratch import make_encoder, on_other_side

from .conftest import annotate_pool, make_rows, write_annotations, write_pairs


def test_the_model_folder_is_complete_and_the_metrics_add_up(distilled, tiny):
    model = distilled / "model"
    for name in ("model.safetensors", "tokenizer.json", "scale.json", "student.json", "model_card.md", "metrics.json"):
        assert (model / name).stat().st_size > 0, name
    assert not list(distilled.rglob("*.bin")) + list(distilled.rglob("*.pt")) + list(distilled.rglob("*.pkl"))
    loaded = AutoModelForSequenceClassification.from_pretrained(model)
    assert loaded.config.num_labels == 3
    assert GradeScale.load(model) == GradeScale.load(tiny["pairs"])
    evaluation, card = json.loads((distilled / "evaluation.json").read_text()), (model / "model_card.md").read_text()
    systems = {s["name"]: s for s in evaluation["systems"]}
    assert list(systems) == ["student", "gold_only", "bm25", "bm25_relative", "untrained_cosine"]
    assert "ece" not in systems["bm25"]["metrics"]
    for system in systems.values():
        for name in ("roc_auc", "pr_auc", "ndcg_at_10", "f1"):
            interval = system["metrics"][name]
            assert interval["low"] <= interval["value"] <= interval["high"]
    assert {c["b"] for c in evaluation["comparisons"]} == set(systems) - {"student"}
    assert np.sum(evaluation["confusion"]) == evaluation["n"] == 48
    assert {s["name"] for s in evaluation["slices"]} >= {"source: synthetic", "query words in the ad: none"}
    assert [row["decision"] for row in evaluation["decisions"]] == list(StudentConfig().decisions)
    assert all(f"| `{row['decision']}` | grade " in card for row in evaluation["decisions"])
    assert len(evaluation["bad_ad_rates"]) == 10
    metrics = json.loads((model / "metrics.json").read_text())
    assert metrics["test_roc_auc"] == systems["student"]["metrics"]["roc_auc"]["value"]
    assert metrics["n_gold"] == metrics["n_annotated"] == 48
    curves = json.loads((distilled / "curves.json").read_text())
    assert set(curves) == {"student", "gold_only", "bm25"}
    assert curves["student"]["roc"][0] == {"fpr": 0.0, "tpr": 0.0}
    assert curves["student"]["roc"][-1] == {"fpr": 1.0, "tpr": 1.0}
    phases = {json.loads(line)["phase"] for line in (distilled / "metrics.jsonl").read_text().splitlines()}
    assert phases == {"student", "gold_only", "test"}


def test_the_saved_model_is_the_calibrated_one(distilled, tiny):
    """Its head holds what was fitted on valid: divided by the temperature, its logits are what was measured on test."""
    model, scale = distilled / "model", GradeScale.load(tiny["pairs"])
    card = json.loads((model / "student.json").read_text())
    assert max(map(abs, card["head_shift"])) > 0
    test = read_examples(tiny["pairs"], scale, "test")
    tokens = tokenize(load_tokenizer(model / "tokenizer.json", card["max_length"]), test.queries, test.ads, 0)
    loaded = load_classifier(model, scale, max_length=card["max_length"], seed=0)
    probs = softmax(predict_logits(Reader(loaded, "cpu"), tokens, 32), card["temperature"])
    written = pq.read_table(distilled / "test_predictions.parquet")
    score = dict(zip(written.column("pair_id").to_pylist(), written.column("p_relevant").to_pylist(), strict=True))
    expected = [score[pair_id] for pair_id in test.pair_ids]
    assert probs[:, scale.relevant_from :].sum(axis=1) == pytest.approx(expected, abs=1e-5)


def test_it_learns(tiny, quick, tmp_path):
    figures = distill(quick(epochs=25, patience=25), tiny["base"], tiny["pairs"], tiny["annotations"], tmp_path).figures
    assert figures["valid_roc_auc"] > 0.8


def test_test_labels_change_no_parameter_and_those_of_valid_the_calibration(distilled, tiny, quick, tmp_path):
    config = quick(gold_only_baseline=True, epochs=6)
    for split in ("test", "valid"):
        flipped = [row | ({"grade": 2 - row["grade"]} if row["split"] == split else {}) for row in make_rows()]
        pairs = write_pairs(tmp_path / split / "pairs", flipped)
        distill(config, tiny["base"], pairs, tiny["annotations"], tmp_path / split)
    for name in ("model.safetensors", "student.json", "tokenizer.json"):
        assert (tmp_path / "test" / "model" / name).read_bytes() == (distilled / "model" / name).read_bytes(), name
    before, after = (json.loads((p / "evaluation.json").read_text()) for p in (distilled, tmp_path / "test"))
    assert before["confusion"] != after["confusion"]
    for a, b in zip(before["systems"], after["systems"], strict=True):
        assert a["threshold"] == b["threshold"]
    cards = [json.loads((p / "model" / "student.json").read_text()) for p in (distilled, tmp_path / "valid")]
    assert cards[0]["temperature"] != cards[1]["temperature"]


def test_the_rate_rises_stays_and_falls():
    rates = [fit_module.schedule(step, 100, 0.1, 0.2) for step in range(100)]
    assert 0 < rates[0] < rates[9] < rates[10] == 1
    assert set(rates[10:81]) == {1}
    assert np.diff(rates[80:]) == pytest.approx(-0.05 * np.ones(19))
    assert {fit_module.schedule(step, 10, 0, 0) for step in range(10)} == {1}
    assert 0 < fit_module.schedule(9, 10, 0.9, 1) < 0.2


def test_a_killed_training_ends_as_an_uninterrupted_one(tiny, quick, tmp_path, monkeypatch):
    # With what orders batches, weighs and ranks too.
    ranking = {"margin_weight": 0.5, "listnet_weight": 0.5, "lambda_weight": 0.5, "class_balance": 0.5}
    config = quick(epochs=4, patience=4, distill_temperature=2.0, **ranking)
    arguments = (config, tiny["base"], tiny["pairs"], tiny["annotations"])
    whole = distill(*arguments, tmp_path / "whole")
    real, epochs = checkpoint.save, []

    def killed_after(last: int):
        def save(folder, progress, *state):
            real(folder, progress, *state)
            epochs.append(progress.epoch)
            if progress.epoch == last:
                raise KeyboardInterrupt

        monkeypatch.setattr(checkpoint, "save", save)
        epochs.clear()

    killed_after(2)
    with pytest.raises(KeyboardInterrupt):
        distill(*arguments, tmp_path / "cut")
    killed_after(0)
    resumed = distill(*arguments, tmp_path / "cut")
    assert epochs == [3, 4]
    assert resumed == whole
    lines = [metric_lines(p / "metrics.jsonl") for p in (tmp_path / "whole", tmp_path / "cut")]
    assert [line | {"time": 0} for line in lines[0]] == [line | {"time": 0} for line in lines[1]]
    assert not (tmp_path / "cut" / "checkpoints").exists()
    # Other settings do not go on from a checkpoint that is not theirs.
    killed_after(2)
    with pytest.raises(KeyboardInterrupt):
        distill(*arguments, tmp_path / "other")
    killed_after(0)
    distill(quick(epochs=3, seed=1), *arguments[1:], tmp_path / "other")
    assert epochs == [1, 2, 3]


def test_a_kill_before_the_model_has_its_place_trains_nothing_again(tiny, quick, tmp_path, monkeypatch):
    arguments = (quick(epochs=2), tiny["base"], tiny["pairs"], tiny["annotations"], tmp_path)
    real = Path.rename

    def killed(self, target):
        if self.name == ".model":
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        distill(*arguments)
    monkeypatch.undo()
    epochs, save = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *state: epochs.append(save(*state)))
    distill(*arguments)
    assert not epochs
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_every_epoch_logs_its_loss_however_short_it_is(tiny, quick, tmp_path):
    distill(quick(batch_size=48, epochs=2), tiny["base"], tiny["pairs"], None, tmp_path)
    lines = [line for line in metric_lines(tmp_path / "metrics.jsonl") if line["phase"] == "student"]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]


def test_early_stopping_keeps_the_best_epoch(tiny, quick, tmp_path, monkeypatch):
    scores = iter([0.6, 0.9, 0.7, 0.8, 0.99])
    monkeypatch.setattr(fit_module, "roc_auc", lambda *_: next(scores))
    weights, real = [], checkpoint.save

    def save(folder, progress, model, optimiser):
        weights.append(model.classifier.weight.detach().clone())
        real(folder, progress, model, optimiser)

    monkeypatch.setattr(checkpoint, "save", save)
    distill(quick(epochs=5, patience=2), tiny["base"], tiny["pairs"], tiny["annotations"], tmp_path)
    card = json.loads((tmp_path / "model" / "student.json").read_text())
    assert (card["epochs"], card["best_epoch"]) == (4, 2)
    saved = load_file(tmp_path / "model" / "model.safetensors")
    np.testing.assert_array_equal(saved["classifier.weight"], weights[1].numpy())


def test_reasons_teach_and_are_not_needed_afterwards(tiny, quick, tmp_path):
    rows = make_rows()
    right = [row | {"reasoning": f"It is {row['grade_probs'].index(0.8)}."} for row in annotate_pool(rows)]
    config = quick(contrastive_weight=0.5, ordinal_weight=0.5, epochs=2)

    def weights(name: str, annotations: list[dict], chosen=config) -> dict[str, np.ndarray]:
        folder = write_annotations(tmp_path / f"annotations-{name}", annotations)
        distill(chosen, tiny["base"], tiny["pairs"], folder, tmp_path / name)
        return load_file(tmp_path / name / "model" / "model.safetensors")

    with_reasons = weights("right", right)
    assert set(with_reasons) == set(weights("plain", right, quick(epochs=2)))  # no part that only training used
    again = weights("again", right)
    others = weights("others", [row | {"reasoning": "It is 0."} for row in right])
    assert all((with_reasons[name] == again[name]).all() for name in again)
    assert any((with_reasons[name] != others[name]).any() for name in others)
    card = json.loads((tmp_path / "right" / "model" / "student.json").read_text())
    assert card["objective"] == "soft cross-entropy + 0.5 × squared EMD + 0.5 × reasoning contrast"


def test_reasons_longer_than_the_encoder_reads_are_refused(tiny, quick, tmp_path):
    rows = [row | {"reasoning": "kettle " * 600} for row in annotate_pool(make_rows())]
    annotations = write_annotations(tmp_path / "annotations", rows)
    with pytest.raises(ContractError, match=r"lower student.reason_length"):
        distill(quick(contrastive_weight=1.0, reason_length=512), tiny["base"], tiny["pairs"], annotations, tmp_path)


def test_gold_only_and_annotations_only(tiny, quick, tmp_path, caplog):
    rows = make_rows()
    gold = distill(quick(epochs=2), tiny["base"], tiny["pairs"], None, tmp_path / "gold").figures
    assert (gold["n_gold"], gold["n_annotated"]) == (48, 0)
    config = quick(epochs=1, gold_only_baseline=True)
    both = distill(config, tiny["base"], tiny["pairs"], tiny["annotations"], tmp_path / "both").figures
    # What labels alone give, after as many steps, stands beside what annotations add.
    assert both["gold_only_roc_auc"] == gold["test_roc_auc"]
    # Annotations alone, and a valid of one class, which cannot rank.
    others = {"train": {"grade": None}, "valid": {"grade": 2}}
    pairs = write_pairs(tmp_path / "pairs", [row | others.get(row["split"], {}) for row in rows])
    soft = distill(config, tiny["base"], pairs, tiny["annotations"], tmp_path / "soft").figures
    assert (soft["n_gold"], soft["n_annotated"]) == (0, 48)
    assert {"gold_only_roc_auc", "valid_roc_auc"}.isdisjoint(soft)
    assert "test_roc_auc" in soft
    assert "all 48 human grades of split 'valid' are relevant, so the decision threshold is 0.5" in caplog.text
    assert json.loads((tmp_path / "soft" / "model" / "student.json").read_text())["threshold"] == 0.5


def test_a_student_below_what_costs_no_label_is_said_as_soon_as_it_is_trained(
    tiny, quick, tmp_path, monkeypatch, caplog
):
    cosine = peers.cosine
    monkeypatch.setattr(peers, "cosine", lambda *given: replace(cosine(*given), valid_roc_auc=1.0))
    caplog.set_level("INFO")
    config = quick(epochs=1, gold_only_baseline=True)
    figures = distill(config, tiny["base"], tiny["pairs"], tiny["annotations"], tmp_path).figures
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("student")]
    at = [i for i, line in enumerate(lines) if line.startswith(figures["below_floor"])]
    assert at[0] < next(i for i, line in enumerate(lines) if line.startswith("gold_only:"))


def test_the_teacher_is_measured_where_it_annotated_test_rows(tiny, quick, tmp_path):
    rows = make_rows()
    test_rows = [row | {"split": "pool"} for row in rows if row["split"] == "test"][:20]
    annotations = write_annotations(tmp_path / "annotations", annotate_pool(rows) + annotate_pool(test_rows))
    distill(quick(epochs=1), tiny["base"], tiny["pairs"], annotations, tmp_path / "out")
    evaluation = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    teacher = next(s for s in evaluation["systems"] if s["name"] == "teacher")
    assert teacher["n"] == 20
    assert teacher["metrics"]["accuracy"]["value"] == teacher["metrics"]["quadratic_kappa"]["value"] == 1
    # This teacher's ROC-AUC is 1, ½ above chance.
    (lost,) = [row for row in evaluation["comparisons"] if (row["b"], row["metric"]) == ("teacher", "roc_auc")]
    assert evaluation["teacher_kept"] == {"n": 20, "share": pytest.approx(1 + 2 * lost["difference"])}


@pytest.mark.parametrize("split", ["valid", "test"])
def test_without_grades_to_measure_against_it_says_so(tiny, quick, tmp_path, split):
    rows = [row | ({"grade": None} if row["split"] == split else {}) for row in make_rows()]
    with pytest.raises(ContractError, match=f"split '{split}'"):
        distill(quick(), tiny["base"], write_pairs(tmp_path / "p", rows), tiny["annotations"], tmp_path / "out")


def test_an_encoder_that_is_none_is_refused(tiny, quick, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ContractError, match=r"cannot be loaded as an encoder|holds no usable tokenizer"):
        distill(quick(), tmp_path / "empty", tiny["pairs"], tiny["annotations"], tmp_path / "out")
    shutil.copy(tiny["base"] / "config.json", tmp_path / "empty")  # of such a folder transformers makes a tokenizer
    with pytest.raises(ContractError, match=r"holds no tokenizer; add its tokenizer\.json"):
        distill(quick(), tmp_path / "empty", tiny["pairs"], tiny["annotations"], tmp_path / "out")


def test_a_diverging_training_stops(tiny, quick, tmp_path):
    config = quick(epochs=3, log_every=1).model_copy(update={"learning_rate": 1e30, "max_grad_norm": 1e30})
    with pytest.raises(ContractError, match="learning_rate"):
        distill(config, tiny["base"], tiny["pairs"], tiny["annotations"], tmp_path)


def test_two_students_are_compared_on_shared_rows(distilled, tiny, quick, tmp_path):
    distill(quick(epochs=1, seed=3), tiny["base"], tiny["pairs"], tiny["annotations"], tmp_path)
    found = compare_students(distilled, tmp_path, relevant_from=1, n_boot=100)
    assert found.n == 48
    assert found.low <= found.difference <= found.high
    assert compare_students(distilled, distilled, relevant_from=1, n_boot=100).difference == 0
    with pytest.raises(ContractError, match="not the folder"):
        compare_students(distilled, tmp_path / "nowhere", relevant_from=1)


def test_scratch_encoders_depend_on_the_seed_alone_and_read_no_held_out_text(tiny, tmp_path):
    rows = make_rows()
    marked = [row | ({"ad_title": "zzyzx quux"} if row["split"] in ("valid", "test") else {}) for row in rows]
    pairs = write_pairs(tmp_path / "pairs", marked)
    folders = [make_encoder(pairs, tmp_path / str(i), "tiny", seed, steps=3) for i, seed in enumerate((0, 0, 1))]
    weights = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1] != weights[2]
    assert (folders[0] / "tokenizer.json").read_text().count("zz") == 0
    with pytest.raises(ContractError, match="tiny, small, medium"):
        make_encoder(pairs, tmp_path / "x", "huge", 0)


def test_bm25_by_hand():
    ads = ["red kettle", "blue kettle", "blue tent with a red door", "blue kettle"]  # three distinct, 10 words
    bm25 = Bm25(ads)
    assert bm25.mean_length == pytest.approx(10 / 3)
    idf_red = np.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    norm = 1.2 * (1 - 0.75 + 0.75 * 2 / (10 / 3))
    assert bm25.score("red", "red kettle") == pytest.approx(idf_red * 2.2 / (1 + norm))
    assert bm25.score("sofa", "red kettle") == 0
    assert bm25.score("red", "red kettle") > bm25.score("red", "blue tent with a red door")
    assert words("Größe-42 电水壶!") == ["größe", "42", "电", "水", "壶"]
    assert Bm25([""]).score("a", "") == 0


def test_labels_for_single_words_by_hand():
    ids = torch.tensor([[2, 7, 8, 7, 3, 8, 9, 3]])
    segment = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1]])
    assert on_other_side(ids, segment).tolist() == [[0, 0, 1, 0, 1, 1, 0, 1]]
