"""Many samples of many prompts, for pass@k up to k = 256: what the engines do one at a time, in large batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from teacher.examples import Problem
from teacher.passk import pass_at_k
from teacher.verifier import Judge


@dataclass(frozen=True)
class Sampled:
    """`right` and `distinct`: (problems,) right completions, and different ones among them; the others are means."""

    samples: int
    greedy: float
    right: NDArray[np.int64]
    distinct: NDArray[np.int64]
    parse_rate: float
    entropy: float
    """Nats per token, of the policy at the tokens that it sampled."""
    tokens: float
    """Per completion, the end token included."""

    def pass_at(self, k: int) -> NDArray[np.float64]:
        """(problems,)"""
        return pass_at_k(self.samples, self.right, k)


@torch.inference_mode()
def sample(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    judge: Judge,
    *,
    samples: int,
    max_tokens: int,
    batch: int,
    seed: int,
) -> Sampled:
    """Sample every problem `samples` times at temperature 1 and once greedily, and judge all of it."""
    model.eval()
    right = np.zeros(len(problems), dtype=np.int64)
    distinct: list[set[str]] = [set() for _ in problems]
    parsed, tokens, entropy, drawn = 0, 0, 0.0, 0
    torch.manual_seed(seed)
    order = [i for i in range(len(problems)) for _ in range(samples)]
    for begin in range(0, len(order), batch):
        rows = order[begin : begin + batch]
        texts, finished, lengths, entropies = _generate(model, tokenizer, [problems[i] for i in rows], max_tokens, True)
        for i, text, done in zip(rows, texts, finished, strict=True):
            verdict = judge(text, problems[i].gold) if done else None
            parsed += verdict is not None
            if verdict:
                right[i] += 1
                distinct[i].add(text)
        tokens += lengths
        entropy += entropies
        drawn += len(rows)
    greedy = 0
    for begin in range(0, len(problems), batch):
        part = problems[begin : begin + batch]
        texts, finished, _, _ = _generate(model, tokenizer, part, max_tokens, False)
        greedy += sum(done and judge(text, p.gold) is True for text, done, p in zip(texts, finished, part, strict=True))
    return Sampled(
        samples,
        greedy / len(problems),
        right,
        np.array([len(found) for found in distinct]),
        parsed / drawn,
        entropy / tokens,
        tokens / drawn,
    )


def _generate(
    model: Any, tokenizer: Any, problems: Sequence[Problem], max_tokens: int, do_sample: bool
) -> tuple[list[str], list[bool], int, float]:
    """Texts, whether each ended, how many tokens in all, and the sum of the entropies at them."""
    inputs = tokenizer([p.prompt for p in problems], return_tensors="pt", padding=True, add_special_tokens=False)
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    made = model.generate(
        **inputs,
        max_new_tokens=max_tokens,
        do_sample=do_sample,
        temperature=1.0 if do_sample else None,
        top_k=0 if do_sample else None,
        top_p=1.0 if do_sample else None,
        output_logits=do_sample,
        return_dict_in_generate=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    ids = made.sequences[:, inputs["input_ids"].size(1) :]
    ended = (ids == tokenizer.eos_token_id).cumsum(dim=1)
    mask = (ended - (ids == tokenizer.eos_token_id).long()) == 0  # up to and with the end token
    entropy = 0.0
    for step, logits in enumerate(made.logits or ()):
        logp = torch.log_softmax(logits.float(), dim=-1)
        entropy += float((-(logp.exp() * logp).sum(dim=-1) * mask[:, step]).sum())
    return (
        tokenizer.batch_decode(ids, skip_special_tokens=True),
        (ended[:, -1] > 0).tolist(),
        int(mask.sum()),
        entropy,
    )
