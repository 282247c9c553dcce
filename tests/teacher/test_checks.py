"""What is wrong with a model is said before it is trained."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from data.contracts import ContractError
from teacher.checks import check_decoder, check_tokenizer
from tests.teacher.families import FAMILIES, make_family, make_tokenizer

TARGETS = [f"The ad covers led, bulbs; it lacks light. <answer>{grade}</answer>" for grade in range(4)]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_families_pass_but_for_prompts_longer_than_their_positions(name, tmp_path):
    folder = make_family(name, tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    check_tokenizer(tokenizer, TARGETS)
    check_decoder(model, tokenizer, longest=1024)
    with pytest.raises(ContractError, match=r"1025 tokens, and .* 1024 positions; lower prompt\.max_text_chars"):
        check_decoder(model, tokenizer, longest=1025)


def test_a_tokenizer_that_only_folds_case_passes(decoder):
    check_tokenizer(AutoTokenizer.from_pretrained(decoder), TARGETS)


def word_pieces():
    words = ["[UNK]", "the", "ad", "covers", "led", "bulbs", "it", "lacks", "light", "answer", *",;.<>/0123"]
    core = Tokenizer(models.WordPiece(vocab={word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    return core


def letters(without):
    alphabet = [letter for letter in sorted(pre_tokenizers.ByteLevel.alphabet()) if letter not in without]
    core = Tokenizer(
        models.BPE(vocab={letter: i for i, letter in enumerate(["[UNK]", *alphabet])}, merges=[], unk_token="[UNK]")
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return core


def spaces_dropped():
    core = letters(without="")
    core.pre_tokenizer = pre_tokenizers.Whitespace()  # as a byte-level vocabulary under the wrong class
    return core


@pytest.mark.parametrize("core", [word_pieces(), letters(without="<"), letters(without="Ġ"), spaces_dropped()])
def test_a_tokenizer_that_cannot_write_the_answer_is_refused(core):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
    with pytest.raises(ContractError, match=r"cannot write the answers: .*<answer>0</answer>' comes back as"):
        check_tokenizer(tokenizer, TARGETS)


def test_an_answer_tag_that_is_a_special_token_is_lost():
    tokenizer = make_tokenizer(FAMILIES["qwen3"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>", "</answer>"]})
    with pytest.raises(ContractError, match=r"comes back as .*lacks light\. 0"):
        check_tokenizer(tokenizer, TARGETS)


def test_an_odd_character_in_a_reason_is_no_reason_to_refuse_a_model():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters(without="~"), unk_token="[UNK]")
    check_tokenizer(tokenizer, ["~ <answer>0</answer>", *TARGETS * 10])
    with pytest.raises(ContractError, match="comes back as"):
        check_tokenizer(tokenizer, ["~ <answer>0</answer>", *TARGETS])


@pytest.mark.parametrize("kind", ["padding", "the chat template", "ordinary text"])
def test_a_token_outside_the_embedding_is_said(tmp_path, kind):
    folder = make_family("qwen3", tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if kind == "padding":
        tokenizer.add_special_tokens({"pad_token": "<new pad>"})
    elif kind == "the chat template":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
        tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<|turn|>")
    else:
        model.resize_token_embeddings(100)
    rows = model.get_input_embeddings().weight.shape[0]
    with pytest.raises(ContractError, match=f"for {kind}, and the model's embedding has {rows} rows"):
        check_decoder(model, tokenizer, longest=10)
