"""A reward model: the base with one score instead of its words, as trainer=reward trains it and grpo and rloo ask it.

Nothing here imports torch until a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llama_lab.choices import LossOn, TrainerName
from llama_lab.data.files import expanded
from llama_lab.errors import ConfigError, LlamaLabError, ModelError
from llama_lab.rundir import RunDir

if TYPE_CHECKING:
    import torch

HEAD = "score"
"""The module of the score, as transformers calls it; PEFT saves it with the adapter."""
REWARD_MODULES = ("classifier", HEAD)
"""What PEFT adds to lora.modules_to_save of a model that scores."""
SCORED_AT_ONCE = 8


def check_reward_model(name: str | None) -> None:
    """Refuse a folder that is no finished run of trainer=reward.

    Raises:
        ConfigError: says what the folder is, and what to type.
    """
    if name is None:
        return
    run_dir = RunDir(expanded(name))
    how = "Train one: python -m llama_lab trainer=reward dataset=sample_preference"
    if not run_dir.lock.is_file():
        what = "holds no run" if run_dir.path.exists() else "is not there"
        raise ConfigError(f"trainer.reward_model={name} {what}. Name the folder of a run of trainer=reward. {how}")
    try:
        trainer = run_dir.read_lock()["config"]["trainer"]["name"]
    except (LlamaLabError, KeyError, TypeError) as error:
        raise ConfigError(f"trainer.reward_model={name}: {str(error).rstrip('.')}. {how}") from None
    if trainer != TrainerName.reward:
        raise ConfigError(
            f"trainer.reward_model={name} is a run of trainer={trainer}, whose model scores nothing. {how}"
        )
    if not (run_dir.adapter / "adapter_model.safetensors").is_file():
        raise ConfigError(f"trainer.reward_model={name} {run_dir.lacks_adapter()}")


def prepare_head(base: Any, seed: int) -> None:
    """Give the score its start, from the seed alone, and its inputs its own type.

    The start is normal with deviation 1/sqrt(D + 1), D the width of the model: arXiv 2009.01325, appendix B.
    """
    import torch

    head = getattr(base, HEAD)
    head.to(torch.float32)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(head.weight.shape, generator=generator) / (head.in_features + 1) ** 0.5
    head.weight.data.copy_(start)
    # the copy of it that PEFT trains keeps this hook, and is fp32 where the blocks may compute in bf16
    head.register_forward_pre_hook(_in_own_type)


def _in_own_type(head: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (args[0].to(head.weight.dtype), *args[1:])


def scores(model: Any, tokenizer: Any, encoded: list[list[int]], batch_size: int) -> torch.Tensor:
    """The score of each text, (N,); it is read at the last token."""
    import torch

    from llama_lab.data.batches import Collator

    collate, found = Collator(pad_token_id=tokenizer.pad_token_id), []
    with torch.no_grad():
        for start in range(0, len(encoded), batch_size):
            rows = [{"input_ids": ids, "labels": ids} for ids in encoded[start : start + batch_size]]
            batch = {key: value.to(model.device) for key, value in collate(rows).items() if key != "labels"}
            found.append(model(**batch, use_cache=False).logits[:, 0].float().cpu())
    return torch.cat(found)


def load_scorer(name: str) -> Callable[[list[list[dict[str, str]]], list[str]], list[float]]:
    """The scorer of a finished run of trainer=reward: conversations that end with a question, and answers, to scores.

    Raises:
        ModelError: its base or its adapter cannot be loaded, or only a part of the adapter.
    """
    from peft import PeftModel

    from llama_lab.data.templates import encode
    from llama_lab.lock import config_of
    from llama_lab.model import load_base, load_tokenizer
    from llama_lab.take.fits import check_loaded

    run_dir = RunDir(expanded(name))
    config = config_of(run_dir.read_lock())
    tokenizer = load_tokenizer(config.model)
    base = load_base(config.model, config.quant, scores=True)
    base.config.pad_token_id = tokenizer.pad_token_id
    prepare_head(base, config.seed)
    try:
        model = PeftModel.from_pretrained(base, str(run_dir.adapter)).eval()
    except Exception as error:
        raise ModelError(f"trainer.reward_model={name} does not load: {' '.join(str(error).split())[:300]}") from error
    check_loaded(model, run_dir.adapter)

    def score(prompts: list[list[dict[str, str]]], answers: list[str]) -> list[float]:
        # an answer that is empty still ends with its EOS, where the score is read
        chats = [
            [*p, {"role": "assistant", "content": a.strip() or " "}] for p, a in zip(prompts, answers, strict=True)
        ]
        encoded = [encode({"messages": chat}, tokenizer, LossOn.completion)["input_ids"] for chat in chats]
        longest = config.dataset.max_length
        return scores(model, tokenizer, [ids[:longest] for ids in encoded], SCORED_AT_ONCE).tolist()

    return score


def is_reward_adapter(peft: dict[str, Any]) -> bool:
    """Whether an adapter_config.json is that of a reward model."""
    return peft.get("task_type") == "SEQ_CLS"
