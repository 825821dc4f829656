"""W&B's real client against a server on this machine: a network that dies, the upload after it, and a report."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.compare_runs import make_run

from .conftest import TINY, read_json
from .wandb_server import WandbServer

KEY = {"WANDB_API_KEY": "a" * 40}


def test_network_that_dies_in_a_run_costs_it_nothing_but_the_upload(lab, tmp_path):
    words = [*TINY, "trainer.save_steps=0", "trainer.logging_steps=1", "dataset.metrics=[]", "generation.num_prompts=0"]
    with WandbServer() as server:
        server.down_after = "UpsertBucket"
        done = lab(*words, "hydra.run.dir=run", cwd=tmp_path, **server.environment, WANDB_FINISH_TIMEOUT="1")
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""  # W&B's words at a login, and the libraries' warnings
        lock = read_json(tmp_path / "run" / "run.json")
        assert read_json(tmp_path / "run" / "result.json")["status"] == "ok"
        assert list(server.runs) == [lock["id"]]
        assert server.runs[lock["id"]].history == []
        told = re.search(r"W&B did not get everything \(.*\)\. Upload it with: (wandb sync .*)$", done.stdout, re.M)
        server.down_after, server.is_down = None, False
        command = [str(Path(sys.executable).parent / "wandb"), *shlex.split(told[1])[1:]]
        subprocess.run(command, check=True, capture_output=True, env=lab.environment | server.environment)
    run = server.runs[lock["id"]]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 6  # four steps, before and after
    assert [{key: row[key] for key in line} for row, line in zip(run.history, lines, strict=False)] == lines
    # a dict in a dict: W&B shows its columns as lora.r and quant.type
    assert (run.config["lora"]["r"], run.config["quant"]["type"]) == (16, "nf4")
    assert run.tags == ["tiny", "nf4", "lora", "sft"]
    assert run.job_type == "train"
    assert run.summary["num_steps"] == 4


@pytest.fixture
def study(tmp_path):
    for number, r in enumerate((4, 8, 16)):
        settings = {"lora__r": r, "tracking__group": "mine"}
        make_run(tmp_path / "study" / str(number), 1 + r / 10, lock={"id": f"run{number}"}, **settings)
    return tmp_path / "study"


def test_report_has_the_runs_the_table_and_panels(lab, study):
    with WandbServer() as server:
        done = lab("compare", "study", "--wandb-report", cwd=study.parent, **server.environment)
    assert done.returncode == 0, done.stderr
    assert f"A report of 3 runs on W&B: {server.address}/me/llama_lab/reports/mine" in done.stdout
    (view,) = server.views
    assert (view["entityName"], view["projectName"], view["type"]) == ("me", "llama_lab", "runs")
    blocks = json.loads(view["spec"])["blocks"]
    grids = [block["metadata"] for block in blocks if block["type"] == "panel-grid"]
    panels = [panel["viewType"] for panel in grids[0]["panelBankSectionConfig"]["panels"]]
    for kind in ("Run History Line Plot", "Parallel Coordinates Plot", "Scatter Plot", "Parameter Importance"):
        assert kind in panels
    spec = view["spec"]
    assert "config:lora.value.r" in spec.replace('\\"', '"')
    assert all(f"run{number}" in json.dumps(grids[0]["runSets"]) for number in range(3))
    assert "| run | status |" in spec


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({}, "needs a W&B account, and no key is set"),
        (KEY | {"WANDB_MODE": "offline"}, "WANDB_MODE is offline"),
        (KEY | {"WANDB_BASE_URL": "http://127.0.0.1:9"}, "http://127.0.0.1:9 cannot be reached"),
        (KEY | {"WITHOUT": "wandb_workspaces"}, "Type: python -m pip install wandb-workspaces"),
    ],
    ids=["account", "offline", "network", "package"],
)
def test_report_that_cannot_be_made_is_one_message(lab, study, env, message):
    text = "import os, sys\nif os.environ.get('WITHOUT'): sys.modules[os.environ['WITHOUT']] = None\n"
    (study.parent / "sitecustomize.py").write_text(text)
    path = f"{study.parent}:{lab.environment['PYTHONPATH']}"
    done = lab("compare", "study", "--wandb-report", cwd=study.parent, PYTHONPATH=path, **env)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
