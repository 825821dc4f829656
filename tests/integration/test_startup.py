"""What only reads words starts at once: nothing heavy is imported; and the help is a manual of this project."""

import subprocess
import sys

import pytest

from llama_lab import __version__
from llama_lab.cli import VERBS
from llama_lab.paths import CONF_DIR

HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "wandb", "bitsandbytes", "accelerate", "optuna"}


@pytest.mark.parametrize("words", [["--help"], ["--cfg", "job"], ["generate", "--help"], ["chat", "--help"]], ids=str)
def test_nothing_heavy_is_imported(environment, tmp_path, words):
    command = [sys.executable, "-X", "importtime", "-m", "llama_lab", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "import time" in line}
    assert imported.isdisjoint(HEAVY)
    assert not list(tmp_path.iterdir())


def test_quick_help_is_what_hydra_prints(lab, tmp_path):
    quick, hydras = lab("--help", cwd=tmp_path), lab("--help", "seed=0", cwd=tmp_path)
    assert quick.stdout == hydras.stdout == lab("-h", cwd=tmp_path).stdout
    assert quick.returncode == hydras.returncode == 0


def test_version_is_that_of_the_package(lab, tmp_path):
    assert lab("--version", cwd=tmp_path).stdout.startswith(f"llama_lab {__version__} ")


def test_help_names_groups_choices_and_verbs(lab, tmp_path):
    text = lab("--help", cwd=tmp_path).stdout
    groups = [path for path in CONF_DIR.iterdir() if path.is_dir() and path.name != "hydra"]
    assert [group.name for group in groups if f"{group.name}: " not in text] == []
    assert [choice.stem for group in groups for choice in group.glob("*.yaml") if choice.stem not in text] == []
    assert [verb for verb in VERBS if f"python -m llama_lab {verb}" not in text] == []
    assert "owered by Hydra" not in text


def test_the_loop_of_a_gpu_needs_no_trainer_of_trl(environment):
    # a second, before the first step of every run
    code = "import sys; import llama_lab.engine.loop, llama_lab.runner; sys.exit('trl.trainer' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True).returncode == 0
