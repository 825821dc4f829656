"""`generate` and `chat` on a finished run."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest


def test_generate_answers_with_the_trained_run(lab, tiny_run):
    done = lab("generate", tiny_run, "Train Llama 2 7B in fp4.", "--max-new-tokens", "5", cwd=tiny_run.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    again = lab("generate", tiny_run, "Train Llama 2 7B in fp4.", "--max-new-tokens", "5", cwd=tiny_run.parent)
    assert again.stdout == done.stdout


def test_sampled_answers_follow_the_seed(lab, tiny_run):
    words = ["generate", tiny_run, "Train it.", "--sample", "--temperature", "2", "--max-new-tokens", "12", "--seed"]
    one, same, other = (lab(*words, seed, cwd=tiny_run.parent).stdout for seed in ("1", "1", "2"))
    assert one == same != other


def test_chat_takes_many_turns_and_commands(lab, tiny_run):
    lines = "Train it.\n/system Be short.\nAgain.\n/reset\n/nonsense\nOnce more.\n/exit\nnever read\n"
    done = lab("chat", tiny_run, "--max-new-tokens", "3", cwd=tiny_run.parent, stdin=lines)
    assert done.returncode == 0, done.stderr
    assert "/nonsense is no command" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_help_has_an_example(lab, tmp_path, verb):
    done = lab(verb, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert f"python -m llama_lab {verb} outputs/" in done.stdout


def test_broken_adapter_is_one_message(lab, tiny_run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(tiny_run, copy)
    weights = copy / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    done = lab("generate", copy, "hello", cwd=tmp_path)
    assert done.returncode == 2
    assert "adapter" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_in_a_verb_is_one_line_without_a_run_to_go_on_with(lab, tiny_run):
    process = lab.start("chat", tiny_run, cwd=tiny_run.parent, stdin=subprocess.PIPE)
    while "Type a request" not in (line := process.stderr.readline()):
        assert line, process.wait()
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT)  # a shell shows 130 of both
    assert said.strip() == "llama_lab: interrupted."


def test_a_prompt_longer_than_the_context_is_refused_before_it_is_read(lab, tiny_run, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "short"}\n' + json.dumps({"prompt": "x" * 1_000_000}) + "\n")
    for words, name in [(["--file", file], "--file, prompt 2"), (["x" * 1024], "The request")]:
        done = lab("generate", tiny_run, *words, cwd=tmp_path)
        assert done.returncode == 2
        (message,) = done.stderr.strip().splitlines()
        assert message.startswith(f"llama_lab: {name} has 1,0")
        assert "the model has places for 1,024, its answer included" in message
    done = lab("generate", tiny_run, "x" * 1000, "--max-new-tokens", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_turn_longer_than_the_context_leaves_the_conversation(lab, tiny_run):
    lines = "x" * 2000 + "\nTrain it.\n/exit\n"
    done = lab("chat", tiny_run, "--max-new-tokens", "3", cwd=tiny_run.parent, stdin=lines)
    assert done.returncode == 0, done.stderr
    assert "The conversation has 2,0" in done.stderr
    assert "Type /reset to begin anew" in done.stderr


@pytest.fixture
def own_run(tiny_run, tmp_path):
    return Path(shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("wandb", "checkpoints")))


@pytest.mark.parametrize("verb", ["generate", "merge"])
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"target_modules": ["q_proj"]}, "the weights have 12 layers that it leaves out"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan, and must be a positive number"),
    ],
)
def test_an_adapter_that_would_be_loaded_by_half_is_one_message(lab, own_run, changed, said, verb):
    file = own_run / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    rest = {"generate": ["hello"], "merge": ["--to", "mine"]}[verb]
    done = lab(verb, own_run, *rest, cwd=own_run.parent)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_layer_that_the_weights_lack_is_one_message(lab, own_run):
    from safetensors.numpy import load_file, save_file

    config, weights = (own_run / "adapter" / name for name in ("adapter_config.json", "adapter_model.safetensors"))
    peft, held = json.loads(config.read_text()), load_file(weights)
    names = sorted({name.split(".")[-1] for name in peft["target_modules"]})
    config.write_text(json.dumps(peft | {"target_modules": names}))
    save_file({key: tensor for key, tensor in held.items() if "layers.1.self_attn.q_proj" not in key}, weights)
    done = lab("generate", own_run, "hello", cwd=own_run.parent)
    assert done.returncode == 2
    assert "covers model.layers.1.self_attn.q_proj, and the weights have no such layer" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", b'{"a":', "its tokenizer cannot be read: JSONDecodeError"),
        ("tokenizer.json", b"null", "its tokenizer cannot be read: AttributeError"),
        ("tokenizer_config.json", b"", "tokenizer_config.json cannot be read"),
        ("tokenizer_config.json", b"[]", "its tokenizer cannot be read: AttributeError"),
        ("chat_template.jinja", b"\xff\xfe", "its tokenizer cannot be read: UnicodeDecodeError"),
        ("generation_config.json", b'{"a":', "generation_config.json cannot be read"),
    ],
)
def test_damaged_files_beside_the_adapter_are_one_message(lab, own_run, name, content, said):
    (own_run / "adapter" / name).write_bytes(content)
    done = lab("merge", own_run, "--to", "mine", cwd=own_run.parent)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert os.listdir(own_run.parent) == ["run"]


def test_generate_reads_a_pipe_once(lab, tiny_run):
    words = ["generate", tiny_run, "--file", "/dev/stdin", "--max-new-tokens", "2"]
    done = lab.fresh(*words, cwd=tiny_run.parent, stdin='"Train it."\n{"prompt": "hello", "id": 7}\n')
    assert done.returncode == 0, done.stderr
    assert [json.loads(line).get("id") for line in done.stdout.splitlines()] == [None, 7]


def test_push_shows_a_card_of_a_run_whose_files_hold_odd_values(lab, own_run):
    for name, odd in (
        ("run.json", {"dataset": None, "model": [], "versions": 5}),
        ("result.json", {"eval_loss": "low", "perplexity": [1], "exact_match": {}}),
    ):
        file = own_run / name
        file.write_text(json.dumps(json.loads(file.read_text()) | odd))
    done = lab("push", own_run, "--repo", "me/mine", cwd=own_run.parent)
    assert done.returncode == 0, done.stderr
    assert "| perplexity | - | - |" in done.stdout


def test_repro_reads_the_result_before_it_does_the_run_again(lab, own_run):
    (own_run / "result.json").write_text('{"status": "ok"')
    done = lab("repro", own_run, "--to", "again", cwd=own_run.parent)
    assert done.returncode == 2
    assert "result.json is not whole" in done.stderr
    assert os.listdir(own_run.parent) == ["run"]


def test_merge_reads_what_its_card_says_before_it_begins(lab, own_run):
    (own_run / "result.json").write_text('{"status": "ok"')
    done = lab("merge", own_run, "--to", "mine", cwd=own_run.parent)
    assert done.returncode == 2
    assert "result.json is not whole, so the run cannot be read. Bring it back, or remove it." in done.stderr
    assert done.stdout == ""  # the table of what was measured comes first
    (own_run / "result.json").unlink()
    assert lab("merge", own_run, "--to", "mine", cwd=own_run.parent).returncode == 0
