"""Peak memory of `merge` on made-up weights of real shapes, and what merging onto other weights does.

python -m benchmarks.merge llama2_7b --write          # highest resident memory
python -m benchmarks.merge --onto --write             # the embedded default, merged onto each kind of weights
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.machine import commit
from llama_lab.compose import compose_words
from llama_lab.embedded import materialise
from llama_lab.lock import cpu_name, package_versions

RESULTS = Path(__file__).parent / "results" / "merge.json"
SHAPES = {
    "llama2_7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_key_value_heads": 32},
    "llama2_13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_key_value_heads": 40},
}
RANK = 16
PEAK = (
    "import sys; from llama_lab.cli import run_verb; code = run_verb(sys.argv[1:]); "
    "print([line for line in open('/proc/self/status') if 'VmHWM' in line][0].split()[1]); sys.exit(code)"
)
"""A process that merges and then prints its highest resident memory in KiB, pages of mapped files included."""


def make_base(folder: Path, shape: dict[str, int]) -> int:
    """A Llama of this shape with random fp16 weights, one file a layer; the number of its weights."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    heads = hidden // 128
    tiny = materialise(compose_words(["model=tiny"]).model)
    config = json.loads((tiny / "config.json").read_text()) | shape
    config |= {"num_attention_heads": heads, "head_dim": 128, "vocab_size": 32000, "dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny / name).read_bytes())
    outside = {"model.embed_tokens": (32000, hidden), "lm_head": (32000, hidden)}
    save_file(_tensors(outside) | {"model.norm.weight": torch.ones(hidden).half()}, folder / "outside.safetensors")
    num_weights = 2 * 32000 * hidden + hidden
    for i in range(shape["num_hidden_layers"]):
        layer = {f"model.layers.{i}.{name}": size for name, size in _linear(hidden, inner).items()}
        tensors = _tensors(layer)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = torch.ones(hidden).half()
        save_file(tensors, folder / f"layer-{i:03d}.safetensors")
        num_weights += sum(tensor.numel() for tensor in tensors.values())
    return num_weights


def make_adapter(folder: Path, base: Path, shape: dict[str, int]) -> None:
    """A random LoRA on every linear layer."""
    tensors = {}
    linear = _linear(shape["hidden_size"], shape["intermediate_size"])
    for i in range(shape["num_hidden_layers"]):
        for name, (num_out, num_in) in linear.items():
            key = f"base_model.model.model.layers.{i}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, num_in) / num_in**0.5
            tensors[f"{key}.lora_B.weight"] = torch.randn(num_out, RANK) * 1e-3
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    names = [name.rpartition(".")[2] for name in linear]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "target_modules": names}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))


def measure(name: str, shape: dict[str, int]) -> dict[str, Any]:
    """Merge a made-up model in a process of its own."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as work:
        base, adapter = Path(work) / "base", Path(work) / "adapter"
        base.mkdir()
        adapter.mkdir()
        num_weights = make_base(base, shape)
        make_adapter(adapter, base, shape)
        words = ["merge", str(adapter), "--to", f"{work}/merged", "--rows", "2", "--force"]
        words += ["quant=nf4", "model.chat_template=llama2"]
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-c", PEAK, *words], capture_output=True, text=True, check=True)
        merged = json.loads((Path(work) / "merged" / "merge.json").read_text())
        return {
            "case": name,
            "num_layers": shape["num_hidden_layers"],
            "num_weights": num_weights,
            "weights_bf16_gib": num_weights * 2 / 2**30,
            "layer_fp32_gib": sum(a * b for a, b in _linear(*list(shape.values())[:2]).values()) * 4 / 2**30,
            "peak_memory_gib": int(done.stdout.split()[-1]) / 2**20,
            "seconds": time.monotonic() - began,
            "onto": merged["onto"],
            "kl": merged["kl"],
            "kl_original": merged["tried"]["original"]["kl"],
            "card": f"none; {cpu_name()}, {os.cpu_count()} cores",
            "versions": {k: v for k, v in package_versions().items() if k in ("torch", "transformers", "peft")},
            **commit(),
        }


def measure_onto() -> dict[str, Any]:
    """Train the embedded default for a few steps and merge it onto each kind of weights."""
    words = ["trainer.max_steps=40", "dataset.max_eval_rows=16", "tracking=none"]
    with tempfile.TemporaryDirectory() as work:
        lab = [sys.executable, "-m", "llama_lab"]
        subprocess.run([*lab, *words, f"hydra.run.dir={work}/run"], check=True, capture_output=True)
        merged: dict[str, Any] = {}
        tried: dict[str, Any] = {}
        for onto in ("original", "dequantised", "quantised"):
            to = f"{work}/{onto}"
            subprocess.run([*lab, "merge", f"{work}/run", "--to", to, "--onto", onto, "--force"], check=True)
            merged = json.loads((Path(to) / "merge.json").read_text())
            tried |= merged["tried"]
    return merged | {"run": " ".join(words), "tried": tried, "card": f"none; {cpu_name()}", **commit()}


def _linear(hidden: int, inner: int) -> dict[str, tuple[int, int]]:
    attention = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    return attention | {
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def _tensors(sizes: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": torch.empty(size, dtype=torch.float16).normal_(std=0.02) for name, size in sizes.items()}


def main() -> None:
    """Measure the named shapes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"default: llama2_7b; of {', '.join(SHAPES)}")
    parser.add_argument("--layers", type=int, help="fewer layers: the peak is that of a layer")
    parser.add_argument("--onto", action="store_true", help="compare the kinds of weights instead")
    parser.add_argument("--write", action="store_true", help=f"into {RESULTS.parent.name}/")
    args = parser.parse_args()
    if args.onto:
        found = measure_onto()
        print(json.dumps(found))
        if args.write:
            (RESULTS.parent / "merge_onto.json").write_text(json.dumps(found, indent=2) + "\n")
        return
    rows = []
    for name in args.shapes or ["llama2_7b"]:
        shape = SHAPES[name] | ({"num_hidden_layers": args.layers} if args.layers else {})
        rows.append(measure(name, shape))
        print(json.dumps(rows[-1]), flush=True)
    if args.write:
        RESULTS.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
