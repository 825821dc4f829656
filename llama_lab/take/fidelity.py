"""How far the answers of merged weights are from those of the adapter on the base that it was trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from llama_lab.data.batches import Collator
from llama_lab.data.splits import Split
from llama_lab.data.templates import IGNORED

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

BATCH_TOKENS = 1024
"""Of a batch of held-out rows, padding included."""
HEAD_TOKENS = 256
"""Places whose logits are made at once: 256 of Llama-2's 32,000 in fp32 are 31 MiB, and several copies are needed."""


@dataclass(kw_only=True)
class Fidelity:
    """Merged weights against the adapter on its base, over the learned tokens of held-out rows, all answers given."""

    kl: float
    """Mean Kullback-Leibler divergence of the next token's distribution, adapter || merged, nats."""
    greedy_agreement: float
    """Share of places where both find the same token likeliest."""
    max_logit_diff: float
    """Largest absolute difference of two logits."""
    perplexity: float
    """Of the merged model."""
    perplexity_adapter: float
    num_tokens: int
    """Places that were compared."""

    def is_within(self, max_kl: float) -> bool:
        """Whether the merge is faithful; what is not a number is not."""
        return self.kl <= max_kl


@dataclass
class Prompts:
    """Held-out rows in batches, and one stream of hidden states through the layers of each model."""

    batches: list[dict[str, Tensor]]
    """input_ids, attention_mask and targets, each (B, T); targets: the next tokens, IGNORED if not learned."""
    num_rows: int = 0
    hidden: dict[str, list[Tensor]] = field(default_factory=dict)
    """By the name of a model: for each batch (B, T, D), behind the last layer that was run."""

    @property
    def num_tokens(self) -> int:
        """Learned tokens in all."""
        return sum(int((batch["targets"] != IGNORED).sum()) for batch in self.batches)

    def embed(self, name: str, weight: Tensor, dtype: torch.dtype) -> None:
        """Begin a stream."""
        self.hidden[name] = [
            torch.nn.functional.embedding(batch["input_ids"], weight).to(dtype) for batch in self.batches
        ]

    @torch.no_grad()
    def run(self, name: str, model: Any, *, is_last: bool) -> None:
        """Take a stream through the layers of a small model, and through its norm where it is the last."""
        inner = getattr(model, "get_base_model", lambda: model)().model
        if not is_last:
            inner.norm = torch.nn.Identity()
        device = model.device
        behind = []
        for h, batch in zip(self.hidden[name], self.batches, strict=True):
            mask = batch["attention_mask"].to(device)
            out = inner(inputs_embeds=h.to(device), attention_mask=mask, use_cache=False)
            behind.append(out.last_hidden_state.cpu())
        self.hidden[name] = behind


def held_out_prompts(valid: Split, tokenizer: PreTrainedTokenizerBase, num_rows: int) -> Prompts:
    """The first held-out rows, those of like length together."""
    collate = Collator(pad_token_id=tokenizer.pad_token_id)
    rows = [valid.tokens[i] for i in range(min(num_rows, len(valid.tokens)))]
    batches: list[list[dict[str, Any]]] = [[]]
    for row in sorted(rows, key=lambda row: len(row["input_ids"])):
        if batches[-1] and (len(batches[-1]) + 1) * len(row["input_ids"]) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(row)
    collated = [collate(batch) for batch in batches]
    for batch in collated:
        batch["targets"] = torch.nn.functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=IGNORED)
    return Prompts(batches=collated, num_rows=len(rows))


@torch.no_grad()
def compare(prompts: Prompts, name: str, head: Tensor, reference: str, reference_head: Tensor) -> Fidelity:
    """Compare two streams behind their norms.

    Args:
        head: (V, D), of the model `name`; in the type in which it computes, as is `reference_head`.
    """
    kl = nll = nll_reference = agreeing = 0.0
    largest, count = torch.zeros(()), 0
    for hidden, wanted, batch in zip(prompts.hidden[name], prompts.hidden[reference], prompts.batches, strict=True):
        learned = batch["targets"] != IGNORED
        places = zip(*(t.split(HEAD_TOKENS) for t in (hidden[learned], wanted[learned])), strict=True)
        for (h, h_reference), targets in zip(places, batch["targets"][learned].split(HEAD_TOKENS), strict=True):
            logits = torch.nn.functional.linear(h, head).float()
            wanted_logits = torch.nn.functional.linear(h_reference, reference_head).float()
            log_p, log_q = wanted_logits.log_softmax(-1), logits.log_softmax(-1)
            kl += float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
            nll += float(-log_q.gather(-1, targets[:, None]).double().sum())
            nll_reference += float(-log_p.gather(-1, targets[:, None]).double().sum())
            agreeing += int((logits.argmax(-1) == wanted_logits.argmax(-1)).sum())
            largest = torch.maximum(largest, (logits - wanted_logits).abs().max())  # NaN stays NaN
            count += len(targets)
    return Fidelity(
        kl=max(kl / count, 0.0) if math.isfinite(kl) else math.nan,
        greedy_agreement=agreeing / count,
        max_logit_diff=float(largest),
        perplexity=_exp(nll / count),
        perplexity_adapter=_exp(nll_reference / count),
        num_tokens=count,
    )


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0)) if math.isfinite(loss) else math.nan
