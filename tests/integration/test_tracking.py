"""W&B never asks, never hangs, and never stops a run."""

import re
import shlex
import time
from pathlib import Path

from .conftest import TINY, read_json
from .wandb_reader import read_offline_run

SHORT = [*TINY, "trainer.max_steps=1", "generation.num_prompts=0", "dataset.metrics=[]"]


def test_online_without_a_key_is_refused_before_anything_is_loaded(lab, tmp_path):
    done = lab(*SHORT, "tracking.mode=online", cwd=tmp_path)
    assert done.returncode == 2
    assert "WANDB_API_KEY" in done.stderr
    assert not (tmp_path / "outputs").exists()


def test_key_without_a_network_goes_offline_and_says_how_to_upload(lab, tmp_path):
    key = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}  # nobody listens on the discard port
    began = time.monotonic()
    done = lab(*SHORT, "tracking.mode=online", "hydra.run.dir=run", cwd=tmp_path, **key)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 150
    assert "wandb sync" in done.stdout
    assert read_json(tmp_path / "run" / "result.json")["status"] == "ok"


def test_commands_that_a_run_prints_may_be_typed_as_they_are(lab, tmp_path):
    done = lab(*SHORT, "tracking.mode=offline", 'hydra.run.dir="my run"', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    upload = re.search(r"Upload with: (.*)$", done.stdout, re.M)
    ask = re.search(r"Try it: +(.*)$", done.stdout, re.M)
    assert Path(shlex.split(upload[1])[-1]).is_dir()
    assert shlex.split(ask[1])[3:] == ["generate", str(tmp_path / "my run"), "your request"]


def test_names_groups_tags_and_notes_are_settings(lab, tmp_path):
    words = ["tracking.name=mine", "tracking.group=g", "tracking.tags=[a,b]", "tracking.notes='a note'"]
    folder = lab.run(tmp_path / "run", *SHORT, *words, "tracking.project=p", "tracking.entity=e")
    run = read_offline_run(next(folder.glob("wandb/offline-run-*/run-*.wandb")))
    assert (run.name, run.group, run.job_type, run.tags) == ("mine", "g", "train", ["a", "b"])
    assert run.config["tracking"]["group"] == "g"
    assert [artifact for artifact in run.artifacts if artifact.type == "model"] == []


def test_adapter_is_an_artifact_where_it_is_asked_for(lab, tmp_path):
    folder = lab.run(
        tmp_path / "run", *SHORT, "tracking.log_adapter=true", "tracking.group=g", "lora=rslora", "lora.r=4"
    )
    run = read_offline_run(next(folder.glob("wandb/offline-run-*/run-*.wandb")))
    assert run.tags == ["tiny", "nf4", "rslora", "sft"]
    (adapter,) = (artifact for artifact in run.artifacts if artifact.type == "model")
    assert {"final", "g"} <= set(adapter.aliases)
    assert "adapter_model.safetensors" in {entry.path for entry in adapter.manifest.contents}


def test_disabled_and_none_write_nothing_of_wandb(lab, tmp_path):
    for word in ("tracking.mode=disabled", "tracking=none"):
        folder = lab.run(tmp_path / word.replace("=", "-"), *SHORT, word)
        assert not (folder / "wandb").exists()
        assert (folder / "metrics.jsonl").exists()


def test_secrets_reach_no_file_of_the_run(lab, tmp_path):
    secret = {"HF_TOKEN": "hf_thisisasecretofthetest", "WANDB_API_KEY": "5ec2e7" * 6 + "abcd"}
    folder = lab.run(tmp_path / "run", *SHORT, "tracking.mode=offline", **secret)
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(value.encode() in content for value in secret.values()), path
