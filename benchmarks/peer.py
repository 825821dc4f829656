"""How fast TRL alone, or Unsloth, trains a Llama with QLoRA, set up as their own documentation does.

    python -m benchmarks.peer trl BASE bs=4 targets=all r=16 dropout=0.05 gc=0
    python -m benchmarks.peer unsloth BASE bs=4 targets=all r=16          # its fast kernels need dropout 0

BASE is a folder of a checkpoint. Rows are random words whose lengths are spread as those of chats; they are padded to
the longest of a batch, and only real tokens count. Prints `RESULT` and one JSON object. Settings, each with what it has
where it is not typed: bs=4 (rows of a step), steps=24 and warm=8 (steps, and those before the clock starts), r=8,
dropout=0.1 (Unsloth: 0), targets=qv|all, gc=1 (gradient checkpointing), packing=0, liger=0 (Liger's loss), dq=0 (double
quantisation).
"""

# Unsloth changes transformers as it is imported, so it comes first and all imports are late.

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

from benchmarks.speed_cases import chat_length

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
LENGTH = 1024
"""The longest row in tokens."""
VOCABULARY = 32_000
MODULES = {
    "qv": ["q_proj", "v_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


@dataclass(kw_only=True)
class Settings:
    """As above, in the order of the docstring."""

    bs: int = 4
    steps: int = 24
    warm: int = 8
    r: int = 8
    dropout: float | None = None
    targets: str = "qv"
    gc: int = 1
    packing: int = 0
    liger: int = 0
    dq: int = 0


def main() -> int:
    """Train and print."""
    system, base = sys.argv[1:3]
    typed = dict(word.split("=", 1) for word in sys.argv[3:])
    values: dict[str, Any] = {key: word if key == "targets" else json.loads(word) for key, word in typed.items()}
    settings = Settings(**values)
    if system == "unsloth":
        import unsloth  # noqa: F401
    rows = chats(2 * settings.bs * (settings.steps + 4))
    model, tokenizer, lora = (unsloth_model if system == "unsloth" else trl_model)(base, settings)
    found = measured(model, tokenizer, lora, rows, settings)
    print("RESULT", json.dumps({"mode": system, "settings": sys.argv[3:], **found}), flush=True)
    return 0


def chats(num_rows: int) -> list[list[int]]:
    """Rows of random tokens, about 290 each (log-normal)."""
    rng, rows = random.Random(0), []
    for _ in range(num_rows):
        length = chat_length(rng, LENGTH)
        rows.append([1, *(rng.randrange(3, VOCABULARY) for _ in range(length - 2)), 2])
    return rows


def trl_model(base: str, settings: Settings) -> tuple[Any, Any, Any]:
    """NF4 by bitsandbytes, LoRA by PEFT."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    quant = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=bool(settings.dq),
    )
    place = {"": 0} if torch.cuda.is_available() else None
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=quant, device_map=place, attn_implementation="sdpa", dtype=torch.bfloat16
    )
    model.config.use_cache = False
    lora = LoraConfig(
        r=settings.r,
        lora_alpha=16,
        lora_dropout=0.1 if settings.dropout is None else settings.dropout,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=MODULES[settings.targets],
    )
    return model, AutoTokenizer.from_pretrained(base), lora


def unsloth_model(base: str, settings: Settings) -> tuple[Any, Any, None]:
    """Unsloth's own loading and LoRA."""
    import torch
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        base, max_seq_length=LENGTH, load_in_4bit=True, dtype=torch.bfloat16
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=settings.r,
        lora_alpha=16,
        lora_dropout=settings.dropout or 0,
        target_modules=MODULES[settings.targets],
        bias="none",
        use_gradient_checkpointing="unsloth" if settings.gc else False,
    )
    return model, tokenizer, None


def measured(model: Any, tokenizer: Any, lora: Any, rows: list[list[int]], settings: Settings) -> dict[str, Any]:
    """Whole steps of TRL's trainer after the first ones, and the memory they took."""
    import torch
    import transformers
    from datasets import Dataset
    from trl import SFTTrainer

    times: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.monotonic())

    columns = {"input_ids": rows} if lora is None else {"input_ids": rows, "labels": rows}
    trainer = SFTTrainer(
        model=model,
        args=_arguments(settings),
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[Clock()],
    )
    counts, collate = [], trainer.data_collator

    def counted(features: Any) -> Any:
        batch = collate(features)
        counts.append(int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel())
        return batch

    trainer.data_collator = counted
    trainer.train()
    seconds, used = times[-1] - times[settings.warm - 1], counts[settings.warm : len(times)]
    return {
        "tok_step": round(sum(used) / len(used)),
        "tok_s": round(sum(used) / seconds),
        "step_ms": round(1000 * seconds / len(used), 1),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else 0.0,
    }


def _arguments(settings: Settings) -> Any:
    """TRL's arguments; what the installed version does not have yet, or any more, is left out."""
    from inspect import signature

    import torch
    from trl import SFTConfig

    on_gpu, known = torch.cuda.is_available(), signature(SFTConfig.__init__).parameters
    own: dict[str, Any] = {"packing": True} if settings.packing else {"dataset_kwargs": {"skip_prepare_dataset": True}}
    if settings.liger:
        own["use_liger_kernel"] = True
    if not settings.packing:
        grouping = "train_sampling_strategy" in known
        own |= {"train_sampling_strategy": "group_by_length"} if grouping else {"group_by_length": True}
    return SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=settings.bs,
        optim="paged_adamw_32bit" if on_gpu else "adamw_torch",
        learning_rate=2e-4,
        weight_decay=0.001,
        max_grad_norm=0.3,
        max_steps=settings.steps,
        lr_scheduler_type="constant",
        logging_steps=1000,
        save_strategy="no",
        report_to="none",
        max_length=LENGTH,
        gradient_checkpointing=bool(settings.gc),
        bf16=on_gpu,
        use_cpu=not on_gpu,
        **own,
    )


if __name__ == "__main__":
    sys.exit(main())
