"""A checkpoint of random weights: BASE of the other benchmarks, where speed and memory depend on shapes alone.

python -m benchmarks.make_base FOLDER                # the shape of Llama-2-7B, 13 GB; 20 seconds on a GPU
python -m benchmarks.make_base FOLDER --shape tiny   # to try a benchmark on a CPU
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 32_000
SHAPES: dict[str, dict[str, Any]] = {
    "llama2_7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
}
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def main() -> int:
    """Write weights, configuration and a tokenizer of words w3 to w31999."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama2_7b")
    args = parser.parse_args()
    config = LlamaConfig(
        **SHAPES[args.shape],
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
    )
    num_params = write_weights(args.folder, config)
    tokenizer().save_pretrained(args.folder)
    print(f"{args.folder}: {num_params / 1e9:.3f} billion parameters")
    return 0


def write_weights(folder: Path, config: LlamaConfig) -> int:
    """Random weights in bf16, and how many they are; on a GPU where there is one, which is faster."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="4GB")
    return sum(param.numel() for param in model.parameters())


def tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token."""
    words = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(3, VOCABULARY))]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    found.chat_template = TEMPLATE
    return found


if __name__ == "__main__":
    raise SystemExit(main())
