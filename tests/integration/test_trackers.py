"""TensorBoard, MLflow and Trackio: a grid of one real run each, read back with the tracker's own reader."""

import json
import os
import subprocess
import sys

import pytest

from .conftest import TINY, read_json

NAMES = ("tensorboard", "mlflow", "trackio")


@pytest.fixture(scope="module")
def grid(lab, tmp_path_factory):
    """The folder in which `-m tracking=tensorboard,mlflow,trackio` ran."""
    for name in NAMES:
        pytest.importorskip(name)
    cwd = tmp_path_factory.mktemp("trackers")
    # MLflow's file store takes no seconds to set up, as its database does
    places = {"TRACKIO_DIR": "trackio", "MLFLOW_TRACKING_URI": "file:mlruns", "MLFLOW_ALLOW_FILE_STORE": "true"}
    words = [*TINY, "dataset.metrics=[]", "generation.num_prompts=0", "trainer.logging_steps=2", "lora.r=4"]
    words += ["dataset.max_train_rows=16", "trainer.save_steps=0", "hydra.sweep.dir=grid"]
    done = lab("-m", *words, f"tracking={','.join(NAMES)}", cwd=cwd, **places)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "TensorBoard: tensorboard --logdir" in done.stdout
    assert "MLflow: experiment llama_lab in file:mlruns" in done.stdout
    assert "Trackio: trackio show --project llama_lab" in done.stdout
    assert "* " not in done.stdout  # what Trackio prints by itself
    return cwd


def logged(folder):
    """name -> {step: value} of metrics.jsonl."""
    found = {}
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        for name in line.keys() - {"step"}:
            found.setdefault(name, {})[line["step"]] = pytest.approx(line[name], rel=1e-6)
    return found


def read_by(cwd, script, **env):
    """What a script prints as JSON, in the process of a user who looks at the runs."""
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, cwd=cwd, env=os.environ | env, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_tensorboard_has_every_number_of_every_step(grid):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(grid / "grid" / "0" / "tensorboard")).Reload()
    for name, values in logged(grid / "grid" / "0").items():
        assert {scalar.step: scalar.value for scalar in events.Scalars(name)} == values
    (text,) = (t.tensor_proto.string_val[0] for t in events.Tensors("args/text_summary"))
    assert json.loads(text)["lora.r"] == 4
    assert events.Scalars("eval/perplexity")[-1].value == pytest.approx(
        read_json(grid / "grid" / "0" / "result.json")["perplexity"], rel=1e-6
    )


MLFLOW = """
import json, mlflow
run, = mlflow.search_runs(search_all_experiments=True, output_format="list")
steps = lambda name: [(m.step, m.value) for m in mlflow.MlflowClient().get_metric_history(run.info.run_id, name)]
found = {"loss": steps("loss"), "eval_loss": steps("eval_loss"), "params": run.data.params, "tags": run.data.tags}
print(json.dumps(found | {"status": run.info.status, "name": run.info.run_name}))
"""


def test_mlflow_has_a_run_with_flat_settings_and_curves(grid):
    env = {"MLFLOW_TRACKING_URI": "file:mlruns", "MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}
    found = read_by(grid, MLFLOW, **env)
    assert (found["params"]["lora.r"], found["params"]["quant.type"]) == ("4", "nf4")
    assert (found["tags"]["group"], found["tags"]["nf4"], found["status"]) == ("grid", "", "FINISHED")
    assert found["name"].startswith("model=tiny")
    values = logged(grid / "grid" / "1")
    assert (dict(found["loss"]), dict(found["eval_loss"])) == (values["train/loss"], values["eval/loss"])


TRACKIO = """
import json, trackio
from trackio.sqlite_storage import SQLiteStorage
run, = trackio.Api().runs("llama_lab")
rows = SQLiteStorage.get_logs("llama_lab", run.name, run_id=run.id)
print(json.dumps({"config": run.config, "rows": rows}, default=str))
"""


def test_trackio_has_a_run_with_flat_settings_and_curves(grid):
    found = read_by(grid, TRACKIO, TRACKIO_DIR=str(grid / "trackio"))
    assert found["config"]["lora.r"] == 4
    for name in ("train/loss", "eval/loss"):
        rows = [row for row in found["rows"] if name in row]
        assert {row["train/global_step"]: row[name] for row in rows} == logged(grid / "grid" / "2")[name]


@pytest.mark.parametrize(
    ("name", "package", "words"),
    [
        ("tensorboard", "tensorboard", []),
        ("mlflow", "mlflow-skinny", ["-m", "lora.r=2,4"]),
        ("trackio", "trackio", ["-m", "search=lora_quant"]),
    ],
)
def test_missing_package_is_one_message_before_anything_starts(lab, tmp_path, name, package, words):
    (tmp_path / "without" / "sitecustomize.py").parent.mkdir()
    (tmp_path / "without" / "sitecustomize.py").write_text(f"import sys; sys.modules['{name}'] = None")
    path = f"{tmp_path / 'without'}:{lab.environment['PYTHONPATH']}"
    done = lab("model=tiny", f"tracking={name}", *words, cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"llama_lab: tracking={name} needs the package {package}, which is not installed. Type: "
        f"python -m pip install {package}"
    )
    assert not (tmp_path / "outputs").exists()


AGAIN = """
import os
import trackio.utils
from llama_lab.sweep.child import _forget_what_read
os.environ["TRACKIO_DIR"] = "of_the_trial"
_forget_what_read({"TRACKIO_DIR": "of_the_trial"})
import trackio.utils
print(trackio.utils.TRACKIO_DIR)
"""


def test_a_trial_is_told_where_trackio_writes_although_its_parent_had_read_it():
    pytest.importorskip("trackio")
    done = subprocess.run([sys.executable, "-c", AGAIN], capture_output=True, text=True)
    assert done.stdout.split() == ["of_the_trial"], done.stderr
