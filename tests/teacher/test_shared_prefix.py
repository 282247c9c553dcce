"""Sharing a prompt among its completions changes nothing but the cost."""

import itertools
import json
import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from data.contracts import ContractError, MetricsLog
from teacher.config import WarmStartConfig
from teacher.cpu_kernels import Part, _SharedAttention, lay_out
from teacher.decoding import decode, sample_completions
from teacher.examples import Example
from teacher.model import load_model
from teacher.prefix_groups import Group, group_by_prefix
from teacher.shared_prefix import can_share, token_log_probs
from teacher.train import train_teacher
from teacher.trainer import AGPOTrainer
from teacher.warm_start import warm_start

from .test_trainer import TINY, trl_arguments

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}
MORE = {"intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16}


def model_of(family, **changed):
    sizes = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0} | SIZES
    config = AutoConfig.for_model(family, **sizes | ({} if family == "gpt2" else MORE) | changed)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)  # so that attention matters
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    return model.eval()


GUIDELINE = 30


def rollouts():
    """Three groups, a prompt ten times as long as the first; completions of many lengths, one of them empty. The last two
    prompts begin alike."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count):
        return torch.randint(2, 300, (count,), generator=generator).tolist()

    prompts = [tokens(10), tokens(100)]
    prompts.append([*prompts[1][:GUIDELINE], *tokens(5)])
    rows = [(prompt, [*prompt, *tokens(count)]) for prompt in prompts for count in (40, 3, 0, 20)]
    return [sequence for _, sequence in rows], [len(prompt) for prompt, _ in rows]


def outcome(model, compute):
    """Log probabilities, entropies, and the gradient of a weighted sum of both."""
    model.zero_grad()
    log_probs, entropies = compute()
    (log_probs * torch.linspace(-1, 1, len(log_probs)) + entropies).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return log_probs.detach(), entropies.detach(), gradient


def plain(model, sequences, starts):
    """A forward pass of each sequence by itself, without anything of ours."""
    log_probs, entropies = [], []
    for ids, start in zip(sequences, starts, strict=True):
        logits = model(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
        log_probs.append(logits.gather(1, torch.tensor(ids[start:], dtype=torch.long)[:, None])[:, 0])
        entropies.append(-(logits.exp() * logits).sum(dim=1))
    return torch.cat(log_probs), torch.cat(entropies)


def in_order(values, groups, sequences, starts):
    """What `token_log_probs` gives, in the order of the sequences."""
    rows = [row for group in groups for row in group.rows]
    counts = [len(sequences[row]) - starts[row] for row in rows]
    return [
        torch.cat([v for _, v in sorted(zip(rows, each.split(counts), strict=True), key=lambda pair: pair[0])])
        for each in values
    ]


def lora(model):
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return adapted.eval()


def checkpointing(model):
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    return model.train()


def masked(model):
    """Attention by a mask, as on a GPU."""
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize(
    ("family", "change"),
    [
        *((family, lambda model: model) for family in ("qwen2", "qwen3", "llama", "gemma", "gemma2", "gpt2")),
        ("qwen2", lora),
        ("llama", checkpointing),
        ("llama", masked),
    ],
)
def test_log_probabilities_entropies_and_gradients_are_those_of_plain_passes(family, change):
    model = change(model_of(family))
    sequences, starts = rollouts()
    # The last group's longest two begin alike in what was sampled too.
    sequences[11][35:38] = sequences[8][35:38]
    expected = outcome(model, lambda: plain(model, sequences, starts))
    alone = [Group((row,), 0) for row in range(len(sequences))]
    shared = group_by_prefix([ids[:start] for ids, start in zip(sequences, starts, strict=True)])
    assert [len(group.rows) for group in shared] == [4, 4, 4]
    first, *last_two = shared
    tree = [Group(tuple(last_two), GUIDELINE), first]
    # Four levels, and sequences beside groups.
    deep = [Group((Group((Group((8, 11), 38), 9, 10), 35), last_two[0]), GUIDELINE), Group((0, 3), 10), Group((1,), 0)]
    for groups in (alone, shared, tree, deep):
        found = outcome(
            model,
            lambda groups=groups: in_order(
                token_log_probs(model, sequences, starts, groups, 0), groups, sequences, starts
            ),
        )
        assert (expected[0] - found[0]).abs().max() <= 1e-5
        assert (expected[1] - found[1]).abs().max() <= 1e-5
        assert (expected[2] - found[2]).norm() / expected[2].norm() <= 1e-5


@pytest.mark.parametrize(
    ("family", "changed", "word"),
    [
        ("mistral", {"sliding_window": 32}, "log probabilities differ"),
        ("mamba", {}, "four-dimensional attention mask"),
        ("mistral", {"sliding_window": None}, None),
        ("qwen2", {"attn_implementation": "eager"}, None),
    ],
)
def test_models_that_cannot_share_are_recognised(family, changed, word, caplog):
    with caplog.at_level(logging.WARNING):
        assert can_share(model_of(family, **changed), [[5, 6], list(range(2, 60))], 20, 0) == (word is None)
    assert word is None or word in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1, 30])
def test_what_a_model_rounds_is_not_taken_for_a_fault_and_does_not_hide_one(dtype, scale, caplog):
    """Scale 30 gives logits of tens, which are up to 0.25 apart in bfloat16."""
    prompts = [list(range(2, 60))]
    for family, changed in (("qwen2", {}), ("gemma2", {}), ("gpt2", {}), ("mistral", {"sliding_window": None})):
        model = model_of(family, tie_word_embeddings=False, **changed).to(dtype)
        model.lm_head.weight.data *= scale
        assert can_share(model, prompts, 8, 0), caplog.text
        assert can_share(lora(model), prompts, 8, 0), caplog.text
        with torch.autocast("cpu", dtype):
            assert can_share(model.float(), prompts, 8, 0), caplog.text
    model = model_of("mistral", tie_word_embeddings=False, sliding_window=32).to(dtype)
    model.lm_head.weight.data *= scale
    assert not can_share(model, prompts, 8, 0)


def trained(decoder, out, steps=20, **options):
    """The weights after a few steps at a high learning rate, and the trainer."""
    model, tokenizer = load_model(decoder, TINY)
    model = options.pop("model", model)
    model.generation_config.eos_token_id = list(range(1, 60))  # so that an untrained model ends some completions
    # Where a gradient is nothing but rounding, Adam must not make a step of it.
    options = {"learning_rate": 1e-3 if steps < 10 else 1e-4, "adam_epsilon": 1e-5, **options}
    settings = {
        name: options.pop(name) for name in ("shared_prefix", "micro_batch_tokens", "sft_weight") if name in options
    }
    prompts = ["<|user|>a<|end|><|assistant|>", f"<|user|>{'b ' * 60}<|end|><|assistant|>"]
    trainer = AGPOTrainer(
        model=model,
        args=trl_arguments(out, per_device_train_batch_size=8, max_completion_length=12, max_steps=steps, **options),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": prompt, "target": f"it is {prompt[8]}"} for prompt in prompts] * 4),
        reward_funcs=lambda completions, **_: [1.0 if len(text) % 2 else -1.0 for text in completions],
        advantages=lambda rewards: rewards - rewards.mean(dim=1, keepdim=True),
        **settings,
    )
    trainer.train()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]), trainer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_type": "dr_grpo", "beta": 0.1, "steps_per_generation": 2},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "mask_truncated_completions": True},
        {"loss_type": "cispo", "epsilon_high": 1.3, "entropy_coef": 0.01},
        {"loss_type": "dr_grpo", "entropy_coef": 0.3},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "entropy_coef": 0.3},
        {"sft_weight": 0.5, "logging_steps": 1},
    ],
    ids=[
        "dapo",
        "dr_grpo with kl",
        "gspo without truncated",
        "cispo with entropy",
        "dr_grpo with entropy",
        "gspo with entropy",
        "with an anchor",
    ],
)
def test_a_training_is_the_same_shared_or_repeated_in_one_pass_or_many(decoder, tmp_path, options):
    steps = 4 if options else 20
    repeated, _ = trained(decoder, tmp_path, steps, shared_prefix=False, micro_batch_tokens=10**6, **options)
    shared, trainer = trained(decoder, tmp_path, steps, shared_prefix=True, micro_batch_tokens=10**6, **options)
    assert trainer.shared_prefix
    assert (repeated - shared).abs().max() <= 1e-4
    pieces, _ = trained(decoder, tmp_path, steps, micro_batch_tokens=100, **options)
    assert (shared - pieces).abs().max() <= 1e-4
    start = torch.cat([p.flatten() for p in load_model(decoder, TINY)[0].parameters()])
    assert (shared - start).abs().max() >= 5e-4  # more than rounding
    if "sft_weight" in options:
        first, *_, last = [line["sft_loss"] for line in trainer.state.log_history if "sft_loss" in line]
        assert last < first


def test_an_anchor_is_the_loss_of_supervised_learning_at_any_temperature(decoder, tmp_path):
    losses = {}
    for temperature in (1.0, 2.0):
        options = {"sft_weight": 0.5, "logging_steps": 1, "temperature": temperature}
        _, trainer = trained(decoder, tmp_path, 1, **options)
        losses[temperature] = next(line["sft_loss"] for line in trainer.state.log_history if "sft_loss" in line)
    assert losses[2.0] == pytest.approx(losses[1.0], abs=1e-5)


def test_training_falls_back_to_the_repeated_form_and_says_why(decoder, tmp_path, caplog):
    """For a model whose layers attend to the last few tokens only."""
    _, tokenizer = load_model(decoder, TINY)
    model = model_of("mistral", sliding_window=8, vocab_size=len(tokenizer))
    with caplog.at_level(logging.WARNING):
        _, trainer = trained(decoder, tmp_path, steps=2, model=model)
    assert not trainer.shared_prefix
    assert "its own prompt, as this model cannot share it" in caplog.text


@pytest.mark.e2e
def test_two_processes_with_unequal_micro_batches_train_one_teacher(decoder, pairs, tmp_path):
    """Through accelerate, on the CPU (gloo) as on several GPUs (NCCL). Each forward pass gathers metrics from all
    processes, so that all need as many."""
    logged = []
    for out, shared in ((tmp_path / "shared", True), (tmp_path / "repeated", False)):
        agpo = TINY.agpo.model_copy(update={"steps": 2, "micro_batch_tokens": 100, "shared_prefix": shared})
        result = train_teacher(TINY.model_copy(update={"processes": 2, "agpo": agpo}), decoder, pairs, out)
        assert json.loads((out / "model" / "teacher.json").read_text())["fingerprint"] == result.fingerprint
        assert {"warm_start/accuracy", "agpo/accuracy"} <= set(result.figures)
        lines = MetricsLog(out / "metrics.jsonl").read("agpo")
        assert [line["step"] for line in lines] == [1, 2]  # by one process, not by each
        # a step is still 8 completions of 2 prompts, of which each process made one
        assert lines[0]["sampled_tokens"] == 8 * lines[0]["completions/mean_length"]
        assert not (out / "launch.json").exists()
        logged.append([line[name] for line in lines for name in ("loss", "grad_norm", "entropy", "sampled_tokens")])
    assert logged[0] == pytest.approx(logged[1], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("family", "changed"), [("llama", {}), ("gpt2", {}), ("mistral", {"sliding_window": 8}), ("mamba", {})]
)
def test_completions_are_those_of_generate(family, changed):
    """For the same random state: what is read once and what leaves the batch changes no completion."""
    model, ends = model_of(family, **changed), list(range(1, 40))
    tokens = torch.randint(2, 300, (90,), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [tokens[:30] + tokens[30 : 30 + own] for own in (20, 3, 60, 0) for _ in range(4)]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {
        "max_new_tokens": 16,
        "temperature": 0.7,
        "top_k": 0,
        "top_p": 1.0,
        "eos_token_id": ends,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    rows = model.generate(ids, attention_mask=mask, do_sample=True, **options)[:, width:]
    expected = []
    for row in rows.tolist():
        end = next((t for t, token in enumerate(row) if token in ends), len(row) - 1)
        expected.append(row[: end + 1])

    def choose(logits, rows):  # as `generate` draws: an outcome's probability over exponential noise (Gumbel-max)
        noise = torch.empty(len(prompts), logits.size(-1)).exponential_()
        return (torch.softmax(logits.float() / 0.7, dim=-1) / noise[rows]).argmax(dim=-1)

    torch.manual_seed(0)
    assert decode(model, prompts, [16] * len(prompts), ends=ends, pad=0, choose=choose) == expected
    assert len({len(completion) for completion in expected}) > 3


@pytest.mark.parametrize("prompts", [[[5, 6, 7]], [[5, 6, 7], [5, 6, 8, 9]], [[5] * 30, [6] * 3]])
def test_the_head_never_multiplies_what_is_not_in_one_piece(decoder, prompts):
    model, _ = load_model(decoder, TINY)
    pieces = []
    model.lm_head.register_forward_pre_hook(
        lambda _, inputs: pieces.append((inputs[0].shape[1], inputs[0].is_contiguous()))
    )
    sample_completions(model, prompts, max_tokens=4, ends={2}, temperature=1.0, pad=0)
    assert (1, True) in pieces
    assert (1, False) not in pieces


def test_gradients_in_bfloat16_are_those_of_float32_as_far_as_it_can_tell(decoder):
    gradients = []
    for autocast in (False, True):
        model, _ = load_model(decoder, TINY)
        add_fused_lm_head(model)
        sequences = [[5, 6, 7, 8, *rest] for rest in ([9, 10], [11, 12, 13], [14])]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            log_probs, _ = token_log_probs(model, sequences, [4] * 3, [Group((0, 1, 2), 4)], 0)
            log_probs.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.999


@pytest.mark.parametrize("spread", [1, 30])
def test_attention_of_unequal_branches_has_gradients_at_any_spread_of_scores(spread):
    """Where scores are hundreds apart, the exponential of what only fills up a shorter branch would be infinite."""
    torch.manual_seed(0)
    ends = torch.tensor([12, 12, 12, 8, 8, 8, 8, 8, 10, 10, 12, 12])  # three tokens, then branches of 5, 2 and 1 + 1
    column = torch.arange(12)
    seen = (column <= column[:, None]) & (column[:, None] < ends)
    parts = [Part(0, 0, 0, 3, 12), Part(1, 0, 3, 5, 5), Part(1, 0, 8, 2, 2), Part(1, 0, 10, 1, 2), Part(2, 0, 11, 1, 1)]
    states = [spread * torch.randn(1, 2, 12, 16) for _ in range(3)]
    found, expected = (
        [each.clone().requires_grad_() for each in states],
        [each.clone().requires_grad_() for each in states],
    )
    ours = _SharedAttention.apply(*found, lay_out(parts, 12), None)
    theirs = torch.nn.functional.scaled_dot_product_attention(*expected, attn_mask=seen)
    weights = torch.randn_like(ours)
    for output in (ours, theirs):
        (output * weights).sum().backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.grad, right.grad, rtol=1e-4, atol=1e-3 * spread)


def test_a_warm_start_is_the_same_with_a_shared_guideline(decoder, tmp_path):
    weights = []
    for shared in (True, False):
        model, tokenizer = load_model(decoder, TINY)
        guideline = "<|system|>" + "grade this ad by the words of its query " * 10
        examples = [
            Example(f"{guideline}{word}<|assistant|>", 0, f"it is {word}") for word in ("red", "blue", "green", "big")
        ]
        warm = WarmStartConfig(examples=4, epochs=4, batch_size=4, learning_rate=1e-3)
        agpo = TINY.agpo.model_copy(update={"shared_prefix": shared})
        config = TINY.model_copy(update={"warm_start": warm, "agpo": agpo})
        log = MetricsLog(tmp_path / f"{shared}.jsonl")
        warm_start(config, model, tokenizer, examples, tmp_path / str(shared), log)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert (weights[0] - weights[1]).abs().max() <= 1e-4
    start = torch.cat([parameter.flatten() for parameter in load_model(decoder, TINY)[0].parameters()])
    assert (weights[0] - start).abs().max() >= 1e-3


@pytest.mark.parametrize("bad", [{2}, {2, 3}, set(range(20))])
def test_a_step_without_a_finite_gradient_is_left_out_and_many_end_the_training(bad, decoder, tmp_path, caplog):
    model, tokenizer = load_model(decoder, TINY)
    calls = itertools.count(1)
    weight = next(model.parameters())
    weight.register_hook(lambda gradient: gradient * float("nan") if next(calls) in bad else gradient)
    examples = [Example(f"grade {word}<|assistant|>", 0, f"it is {word}") for word in ("red", "blue", "green", "big")]
    warm = WarmStartConfig(examples=4, epochs=8, batch_size=4, learning_rate=1e-3)
    config = TINY.model_copy(update={"warm_start": warm})
    log = MetricsLog(tmp_path / "metrics.jsonl")
    if len(bad) > 4:
        with pytest.raises(ContractError, match="not finite in 5 steps in a row, the last of them step 5; lower"):
            warm_start(config, model, tokenizer, examples, tmp_path / "out", log)
    else:
        warm_start(config, model, tokenizer, examples, tmp_path / "out", log)
        assert caplog.text.count("is left out, as its gradient is not finite") == len(bad)
        assert log.read("warm_start")[-1]["loss"] < log.read("warm_start")[0]["loss"]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("width", [63, 64, 65, 128, 192])
def test_no_pass_has_a_width_at_which_gradients_become_nan_on_a_gpu(width, shared):
    # cuDNN's attention in torch 2.11 at 64 more than a multiple of 128: pytorch issue 196678.
    model, generator = model_of("qwen2"), torch.Generator().manual_seed(0)
    lengths = (10, width - 30) if shared else (10, width - 20)  # beyond a prompt of 20
    prompt = torch.randint(2, 300, (20,), generator=generator).tolist()
    sequences = [prompt + torch.randint(2, 300, (n,), generator=generator).tolist() for n in lengths]
    widths = []
    handle = model.register_forward_pre_hook(
        lambda module, arguments, inputs: widths.append(inputs["input_ids"].size(1)), with_kwargs=True
    )
    groups = [Group((0, 1), 20)] if shared else [Group((0,), 0), Group((1,), 0)]
    together, _ = token_log_probs(model, sequences, [20, 20], groups, 0)
    handle.remove()
    assert widths == [width + (width % 128 == 64)]
    alone = [token_log_probs(model, [ids], [20], [Group((0,), 0)], 0)[0] for ids in sequences]
    assert (together - torch.cat(alone)).abs().max() <= 1e-5
