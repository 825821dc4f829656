"""Preference trainers, from the command to result.json: they learn what is better, and a killed run goes on."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from .conftest import TINY, read_json, steps_logged

WORDS = [*TINY, "tracking=none", "trainer.logging_steps=1", "dataset.max_eval_rows=8"]
EMBEDDED = [*WORDS, "dataset=sample_preference", "dataset.max_train_rows=96", "dataset.metrics=[]"]
NUM_STEPS = 12


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> Path:
    """The better answer names a colour, the worse one a beast; which of them says nothing of the prompt."""
    names = [("red", "cow"), ("blue", "dog"), ("green", "hen"), ("grey", "fox")]
    rows = [{"prompt": f"word {i}", "chosen": names[i % 4][0], "rejected": names[i // 4 % 4][1]} for i in range(128)]
    file = tmp_path_factory.mktemp("colours") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def undisturbed(lab, tmp_path_factory) -> Path:
    return lab.run(tmp_path_factory.mktemp("undisturbed") / "run", *EMBEDDED, "trainer=dpo")


def test_a_run_on_the_embedded_pairs_says_all_that_it_measured(undisturbed):
    result = read_json(undisturbed / "result.json")
    assert result["status"] == "ok"
    assert result["num_steps"] == NUM_STEPS
    assert read_json(undisturbed / "run.json")["config"]["quant"]["type"] == "nf4"
    assert result["eval_loss_before"] == pytest.approx(0.6931, abs=1e-3)  # log 2: no answer is liked more yet
    assert (result["reward_accuracy_before"], result["reward_margin_before"]) == (0.0, 0.0)
    assert result["perplexity"] is None
    assert {"reward_accuracy", "reward_margin"} <= result.keys()
    assert sorted(path.name for path in (undisturbed / "adapter").iterdir() if path.is_dir()) == []


def test_killed_run_ends_bitwise_equal(lab, undisturbed, tmp_path):
    folder = tmp_path / "run"
    lab.killed(folder, *EMBEDDED, "trainer=dpo", when=lambda: max(steps_logged(folder), default=0) >= 5, warm=True)
    assert list((folder / "checkpoints").glob("checkpoint-*"))
    done = lab(f"resume={folder}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one, other = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (undisturbed, folder))
    assert [name for name in one if not one[name].equal(other[name])] == []
    assert steps_logged(folder) == steps_logged(undisturbed)
    result, wanted = read_json(folder / "result.json"), read_json(undisturbed / "result.json")
    for key in ("eval_loss", "reward_accuracy", "reward_margin", "eval_loss_before"):
        assert result[key] == wanted[key]


# ORPO's reward is a mean over tokens and so smaller
@pytest.mark.parametrize(("trainer", "margin"), [("dpo", 0.1), ("kto", 0.1), ("orpo", 0.02)])
def test_what_is_better_is_learned(lab, colours, tmp_path, trainer, margin):
    words = ["trainer.num_train_epochs=2", "dataset.max_train_rows=null", "trainer.eval_steps=10"]
    data = ["dataset=jsonl", f"dataset.path={colours}"]
    folder = lab.run(tmp_path / "run", *WORDS, f"trainer={trainer}", *data, *words)
    result = read_json(folder / "result.json")
    assert result["reward_accuracy"] == 1.0
    assert result["reward_margin"] > result["reward_margin_before"] + margin
    assert result["eval_loss"] < result["eval_loss_before"] - 0.05
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any("eval/reward_margin" in row for row in logged)
    assert any("train/reward_margin" in row for row in logged)


def test_dpo_goes_on_with_an_adapter_that_is_its_reference(lab, tiny_run, tmp_path):
    words = [*EMBEDDED, "trainer=dpo", f"model.adapter={tiny_run}", "lora.r=4", "dataset.max_train_rows=80"]
    folder, killed = lab.run(tmp_path / "run", *words), tmp_path / "killed"
    result = read_json(folder / "result.json")
    # the reference is the adapter to the bit: nothing is liked more than before
    assert (result["reward_accuracy_before"], result["reward_margin_before"]) == (0.0, 0.0)
    assert result["num_trainable_params"] == read_json(tiny_run / "result.json")["num_trainable_params"]
    assert result["num_params"] == read_json(tiny_run / "result.json")["num_params"]
    lab.killed(killed, *words, when=lambda: max(steps_logged(killed), default=0) >= 5, warm=True)
    done = lab(f"resume={killed}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    file = Path("adapter") / "adapter_model.safetensors"
    before, one, other = (load_file(path / file) for path in (tiny_run, folder, killed))
    assert before.keys() == one.keys()
    assert all((one[name] - before[name]).abs().max() < 0.1 for name in one)  # it went on, and did not begin anew
    assert [name for name in one if not one[name].equal(other[name])] == []
