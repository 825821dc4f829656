"""Several processes that train one run together do what one process does with all of their rows."""

import subprocess
import sys

import pytest
from safetensors.torch import load_file

from tests.integration.conftest import read_json

LEAN = [
    *("model=tiny", "quant=none", "quant.compute_dtype=float32", "lora.dropout=0", "trainer.max_steps=6"),
    *("trainer.save_steps=3", "trainer.logging_steps=1", "tracking=none", "dataset.max_eval_rows=4"),
    *("dataset.metrics=[]", "generation.num_prompts=0"),
]


@pytest.fixture
def launched(environment, tmp_path):
    """`torchrun` with two processes, which is what accelerate launch starts too."""

    def launch(*words):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "llama_lab", *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)

    return launch


@pytest.mark.slow
def test_two_processes_train_what_one_does_with_twice_the_rows(launched, lab, tmp_path):
    done = launched(*LEAN, "trainer.per_device_train_batch_size=2", "hydra.run.dir=two")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "does not compute several processes" in done.stdout
    assert done.stdout.count("Measuring the trained model") == 1
    two = tmp_path / "two"
    one = lab.run(tmp_path / "one", *LEAN, "trainer.per_device_train_batch_size=4", "trainer.engine=standard")
    adapters = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (two, one)]
    assert max((adapters[0][name] - adapters[1][name]).abs().max().item() for name in adapters[0]) < 2e-6
    results = [read_json(folder / "result.json") for folder in (two, one)]
    assert results[0]["eval_loss"] == pytest.approx(results[1]["eval_loss"], abs=1e-5)
    assert sorted(path.name for path in (two / "checkpoints").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}


@pytest.mark.slow
def test_stages_and_preferences_are_trained_by_two_processes(launched, tmp_path):
    words = ["experiment=sft_then_dpo", "model=tiny", "trainer.max_steps=3", "tracking=none", "dataset.max_eval_rows=4"]
    done = launched(*words, "dataset.metrics=[]", "generation.num_prompts=0", "hydra.run.dir=two")
    assert done.returncode == 0, done.stdout + done.stderr
    results = [read_json(tmp_path / "two" / stage / "result.json") for stage in ("1_sft", "2_dpo")]
    assert [result["status"] for result in results] == ["ok", "ok"]
    assert "reward_margin" in results[1]


def test_a_sweep_by_several_processes_is_refused(lab, tmp_path):
    done = lab("-m", "model=tiny", "seed=0,1", cwd=tmp_path, WORLD_SIZE="2", RANK="0")
    assert done.returncode == 2
    assert "Leave one of the two out" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "variables",
    [{"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, {"WORLD_SIZE": "1"}, {"LOCAL_RANK": "-1"}],
    ids=str,
)
def test_one_process_of_a_launcher_is_a_run_by_itself(lab, tmp_path, variables):
    words = ["model=tiny", "trainer.max_steps=1", "tracking=none", "dataset.max_eval_rows=2", "dataset.metrics=[]"]
    done = lab(*words, "generation.num_prompts=0", "hydra.run.dir=one", cwd=tmp_path, **variables)
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "one" / "result.json")["status"] == "ok"
