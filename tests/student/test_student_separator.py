"""Query and ad stand apart for the student whatever its encoder's tokenizer does, and alike when it is served."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast, Qwen2Tokenizer

from data.contracts import ContractError, GradeScale, read_json
from student.config import ExportConfig
from student.dataset import read_examples, tokenize
from student.distill import distill
from student.export import export_student
from student.model import load_classifier, save_tokenizer
from student.reader import Reader, predict_logits
from student.scorer import Scorer

from .conftest import FAMILIES, make_rows

END, BEGIN = "<|endoftext|>", "<|begin|>"


def bytes_only(special: tuple[str, ...] = (END,)) -> Tokenizer:
    """A tokenizer as Qwen2's: bytes, and nothing between the texts of a pair or around them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet)
    tokenizer.train_from_iterator([row["ad_title"] for row in make_rows()], trainer)
    return tokenizer


def saved(tokenizer: Tokenizer, folder, **special: str):
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("special", [{"eos_token": END, "pad_token": END}, {"eos_token": END}, {"sep_token": END}])
def test_a_tokenizer_that_puts_nothing_between_gets_a_separator(special, tmp_path):
    base = saved(bytes_only(), tmp_path / "base", **special)
    end = Tokenizer.from_file(str(base / "tokenizer.json")).token_to_id(END)
    assert Tokenizer.from_file(str(base / "tokenizer.json")).encode("", "").ids == []
    tokenizer = save_tokenizer(base, tmp_path / "out", 16)
    together, apart = (tokenizer.encode(*texts) for texts in (("redkettle", ""), ("red", "kettle")))
    assert together.ids != apart.ids
    assert apart.ids == [*tokenizer.encode("red").ids, *tokenizer.encode("kettle").ids]
    assert apart.ids[-1] == end
    assert apart.type_ids == [*[0] * len(tokenizer.encode("red")), *[1] * len(tokenizer.encode("kettle"))]
    assert tokenizer.encode("", "").ids == [end, end]
    assert tokenizer.encode("").ids == [end]
    assert tokenizer.encode("red", f"kettle {END}").ids.count(end) == 2  # an ad cannot end its own segment
    long = tokenizer.encode("red kettle " * 40, "blue sofa " * 40).ids
    assert (len(long), long.count(end), long[-1]) == (16, 2, end)
    again = save_tokenizer(tmp_path / "out", tmp_path / "again", 16)
    assert again.encode("red", "kettle").ids == apart.ids


def test_qwen2s_own_class_and_one_that_begins_texts_are_separated_too(tmp_path):
    plain = bytes_only((END, BEGIN))
    plain.save(str(tmp_path / "plain.json"))
    qwen2 = Qwen2Tokenizer(tokenizer_file=str(tmp_path / "plain.json"), eos_token=END, pad_token=END)
    qwen2.save_pretrained(tmp_path / "qwen2")
    number = plain.token_to_id(BEGIN)
    plain.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, number)]
    )
    begins = saved(plain, tmp_path / "begins", bos_token=BEGIN, eos_token=END)
    found = save_tokenizer(tmp_path / "qwen2", tmp_path / "1", 16).encode("a", "b").tokens
    assert found == ["a", END, "b", END]
    begun = save_tokenizer(begins, tmp_path / "2", 16)
    assert begun.encode("a", "b").tokens == [BEGIN, "a", END, "b", END]
    assert begun.encode("a").tokens == [BEGIN, "a", END]


def test_the_padding_token_separates_only_where_there_is_no_other(tmp_path):
    tokenizer = bytes_only((END, BEGIN))
    base = saved(tokenizer, tmp_path / "base", bos_token=BEGIN, eos_token=END, pad_token=END)
    assert save_tokenizer(base, tmp_path / "out", 16).encode("a", "b").tokens == ["a", BEGIN, "b", BEGIN]


@pytest.mark.parametrize("special", [{}, {"pad_token": END}, {"unk_token": END}])
def test_a_tokenizer_without_a_token_to_separate_by_is_refused(special, tmp_path):
    base = saved(bytes_only(), tmp_path / "base", **special)
    with pytest.raises(
        ContractError, match=r'no token between query and ad, .* as "eos_token" in its tokenizer_config'
    ):
        save_tokenizer(base, tmp_path / "out", 16)


def test_a_tokenizer_that_separates_stays_as_it_is(tiny, tmp_path):
    save_tokenizer(tiny["base"], tmp_path, 32)
    written = read_json(tmp_path / "tokenizer.json")
    assert written["post_processor"] == read_json(tiny["base"] / "tokenizer.json")["post_processor"]


def test_what_is_served_reads_the_ids_of_the_training(tiny, quick, tmp_path):
    """A Qwen2 whose padding token is its end token; pairs without a word are scored, and alike in any batch."""
    base = saved(bytes_only(), tmp_path / "base", eos_token=END, pad_token=END)
    config = AutoConfig.for_model("qwen2", vocab_size=300, pad_token_id=0, eos_token_id=0, **FAMILIES["qwen2"])
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(base)
    distill(quick(epochs=1), base, tiny["pairs"], tiny["annotations"], tmp_path / "student")
    limits = ExportConfig(max_int8_auc_loss=1, max_decisions_changed=1, threads=1)
    export_student(limits, tmp_path / "student", tiny["pairs"], tmp_path / "export")
    shutil.copytree(tmp_path / "export", tmp_path / "elsewhere")
    scorer, scale = Scorer(tmp_path / "elsewhere"), GradeScale.load(tiny["pairs"])
    rows = read_examples(tiny["pairs"], scale, "test")
    queries, ads = [*rows.queries, "", "red", ""], [*rows.ads, "", "", "kettle"]
    trained_with = save_tokenizer(base, tmp_path / "again", scorer.card["max_length"])
    tokens = tokenize(trained_with, queries, ads, scorer.card["pad_token_id"])
    served = scorer.tokenizer.encode_batch(list(zip(queries, ads, strict=True)))
    assert [each.ids for each in served] == tokens.ids
    assert min(tokens.lengths) == 2
    model = load_classifier(tmp_path / "student" / "model", scale, max_length=scorer.card["max_length"], seed=0)
    expected = predict_logits(Reader(model, "cpu"), tokens, 7)
    texts = list(zip(queries, ads, strict=True))
    for batch_tokens in (1, 100, 2000):
        np.testing.assert_allclose(scorer.logits(texts, batch_tokens), expected, atol=1e-5)
