"""`generate` and `chat` on a finished run."""

import json
import os
import signal
import subprocess

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
    import shutil

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
    assert process.returncode == 130
    assert said.strip() == "llama_lab: interrupted."


def test_a_prompt_longer_than_the_context_is_refused_before_it_is_read(lab, tiny_run, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "short"}\n' + json.dumps({"prompt": "x" * 1_000_000}) + "\n")
    for words, name in [(["--file", file], f"--file {file}, prompt 2"), (["x" * 1024], "The request")]:
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
