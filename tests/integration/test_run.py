"""One run of the real command: its files, its numbers, and its adapter in other hands."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import TINY, read_json
from .wandb_reader import read_offline_run

NUMBERS = (
    "objective",
    "eval_loss_before",
    "eval_loss",
    "perplexity",
    "train_loss",
    "train_runtime_s",
    "tokens_per_s",
    "peak_memory_gib",
    "num_trainable_params",
    "num_params",
    "num_steps",
    "exact_match",
    "composes",
)

LOGITS = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
tokenizer = AutoTokenizer.from_pretrained(adapter)
chat = [{"role": "user", "content": "Train Llama 2 7B in fp4."}]
ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
torch.save(model(**ids).logits.detach(), out)
"""


def test_result_holds_every_number_of_the_contract(tiny_run):
    result = read_json(tiny_run / "result.json")
    assert result["schema"] == 1
    assert result["status"] == "ok"
    assert result["error"] is None
    assert [key for key in NUMBERS if not isinstance(result.get(key), int | float)] == []
    assert result["objective"] == result["eval_loss"]
    assert result["num_steps"] == 4  # 32 rows in batches of 8 = per_device_train_batch_size of TINY
    assert (
        result["num_trainable_params"] == 8192
    )  # 2 layers, r=4, and each layer's inputs and outputs: 2*128 + 2*96 + 3*192


def test_metrics_hold_losses_speed_and_memory_by_step(tiny_run):
    rows = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows]
    assert steps == sorted(steps)
    assert "eval/loss" in rows[0]
    assert {"eval/loss", "eval/exact_match"} <= rows[-1].keys()
    assert any({"train/loss", "train/tokens_per_s", "train/peak_memory_gib"} <= row.keys() for row in rows)
    assert any("eval/loss" in row and row["step"] == 2 for row in rows)
    assert any("eval/loss" in row and row["step"] == 4 for row in rows)


def test_lock_holds_what_is_needed_to_run_again(tiny_run):
    lock = read_json(tiny_run / "run.json")
    assert lock["overrides"] == [*TINY, "trainer.eval_steps=2", "lora.r=4"]
    assert lock["config"]["lora"]["r"] == 4
    assert lock["versions"]["torch"]
    assert len(lock["dataset"]["fingerprint"]) == 16
    assert lock["hardware"]["torch_threads"] == 1
    assert lock["seed"] == 0


def test_samples_show_the_same_prompts_before_and_after(tiny_run):
    text = (tiny_run / "samples.md").read_text()
    assert text.count("Before:") == text.count("After:") == 3


def test_adapter_loads_with_plain_peft_in_a_fresh_process_and_gives_the_same_logits(tiny_run, lab, tmp_path):
    import torch

    from llama_lab.choices import Engine
    from llama_lab.take.load import load_trained, prepare_verb
    from llama_lab.take.source import open_source

    lock = read_json(tiny_run / "run.json")
    base = str(Path(lock["model"]["path"].replace("~", lab.environment["HOME"], 1)))
    words = [sys.executable, "-c", LOGITS, base, str(tiny_run / "adapter"), str(tmp_path / "logits")]
    subprocess.run(words, check=True, env=lab.environment)
    plain_base = ["quant=none", "quant.compute_dtype=float32", f"model.name={base}", "model.source=hub"]
    source = open_source(tiny_run, plain_base)
    prepare_verb(source.config)
    model, tokenizer = load_trained(source)
    source.config.trainer.engine = Engine.standard
    standard, _ = load_trained(source)
    chat = [{"role": "user", "content": "Train Llama 2 7B in fp4."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        ours, by_peft = model(**ids).logits, standard(**ids).logits
    plain = torch.load(tmp_path / "logits")
    assert torch.equal(by_peft, plain)
    torch.testing.assert_close(ours, plain)  # the fast engine adds in another order
    with model.disable_adapter(), torch.no_grad():
        assert not torch.allclose(model(**ids).logits, plain)


def test_a_cache_that_cannot_be_made_is_one_message(lab, tmp_path):
    (tmp_path / "file").write_text("")
    done = lab.fresh(*TINY, "hydra.run.dir=run", cwd=tmp_path, LLAMA_LAB_CACHE=str(tmp_path / "file"))
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
    assert "Set LLAMA_LAB_CACHE to another." in done.stderr


def test_no_file_of_the_adapter_but_pefts_settings_names_this_machine(tiny_run, lab):
    assert not (tiny_run / "adapter" / "README.md").exists()
    named = [
        f.name for f in (tiny_run / "adapter").iterdir() if lab.environment["HOME"] in f.read_text(errors="replace")
    ]
    assert set(named) <= {"adapter_config.json"}


def test_adapter_keeps_template_pad_and_stop_token(tiny_run):
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(tiny_run / "adapter")
    generation = GenerationConfig.from_pretrained(tiny_run / "adapter")
    assert "[INST]" in tokenizer.chat_template
    assert tokenizer.pad_token == "<unk>" != tokenizer.eos_token
    assert generation.eos_token_id == tokenizer.eos_token_id == 2
    assert generation.pad_token_id == tokenizer.pad_token_id == 0


def test_wandb_has_config_curves_and_samples_without_a_network(tiny_run):
    files = list(tiny_run.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 1
    run = read_offline_run(files[0])
    lock = read_json(tiny_run / "run.json")
    assert run.id == lock["id"]
    assert run.name.startswith("model=tiny")
    assert run.config["lora"]["r"] == 4
    assert run.config["quant"]["type"] == "nf4"
    assert run.exit_code == 0
    assert {"train/loss", "eval/loss", "samples.path"} <= {key for row in run.history for key in row}
    assert run.summary["num_steps"] == 4


def test_only_the_console_and_the_folder_are_written(tiny_run):
    beside = {path.name for path in tiny_run.parent.iterdir()}
    assert beside == {"run"}


def test_failed_run_is_recorded(lab, tmp_path):
    done = lab(*TINY, "hydra.run.dir=run", "trainer.learning_rate=1e30", "trainer.logging_steps=1", cwd=tmp_path)
    assert done.returncode == 2
    assert "trainer.learning_rate" in done.stderr
    assert "Traceback" not in done.stderr
    result = read_json(tmp_path / "run" / "result.json")
    assert result["status"] == "failed"
    assert "loss" in result["error"]


def test_grid_gives_every_point_its_own_folder(lab, tmp_path):
    done = lab("-m", *TINY, "lora.r=2,4", "tracking=none", "hydra.sweep.dir=grid", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    params = [read_json(tmp_path / "grid" / n / "result.json")["num_trainable_params"] for n in ("0", "1")]
    assert params == [4096, 8192]
    groups = [read_json(tmp_path / "grid" / n / "run.json")["config"]["tracking"]["group"] for n in ("0", "1")]
    assert groups == ["grid", "grid"]


def test_own_file_own_groups_and_own_config_dir(lab, tmp_path):
    rows = [{"question": f"What is {i} plus {i}?", "answer": str(2 * i)} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    group = tmp_path / "mine" / "dataset"
    group.mkdir(parents=True)
    (group / "sums.yaml").write_text(
        "path: rows.jsonl\ncolumns: {prompt: question, completion: answer}\nmetrics: [exact_match]\n"
    )
    words = ["--config-dir", "mine", "model=tiny", "dataset=sums", "quant=none", "tracking=none", "hydra.run.dir=run"]
    done = lab(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lock = read_json(tmp_path / "run" / "run.json")
    assert lock["dataset"] | {"fingerprint": ""} == {
        "fingerprint": "",
        "format": "prompt_completion",
        "num_train_rows": 19,
        "num_valid_rows": 1,
    }
    assert "exact_match" in read_json(tmp_path / "run" / "result.json")


@pytest.mark.parametrize("quant", ["fp4", "int8", "none"])
def test_every_quant_type_trains(lab, tmp_path: Path, quant):
    folder = lab.run(tmp_path / "run", *TINY, f"quant={quant}", "tracking=none", "trainer.max_steps=2")
    result = read_json(folder / "result.json")
    assert result["status"] == "ok"
    assert result["eval_loss"] != result["eval_loss_before"]


def test_a_run_on_texts_is_measured_evaluated_and_compared(lab, tmp_path):
    """A text has no question and no answer: there is its loss, and no samples."""
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "some text number {i}"}}\n' for i in range(40)))
    data = ["dataset=jsonl", f"dataset.path={tmp_path / 'rows.jsonl'}", "trainer.max_steps=2", "tracking=none"]
    folder = lab.run(tmp_path / "run", *TINY, *data)
    result = read_json(folder / "result.json")
    assert result["eval_loss"] < result["eval_loss_before"]
    assert result["objective"] == result["eval_loss"]
    for verb in (["evaluate", str(folder), "--base"], ["generate", str(folder), "hello"], ["compare", str(folder)]):
        done = lab(*verb, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    evaluated = read_json(folder / "evaluation.json")
    assert json.dumps(result["eval_loss"])[:6] in json.dumps(evaluated)
