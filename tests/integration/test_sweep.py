"""Studies by their real commands: pruned, side by side, with failures, several objectives, and checked first."""

import csv
import functools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from optuna.trial import FrozenTrial, TrialState
from safetensors.torch import load_file

from llama_lab.compose import compose_words
from llama_lab.lock import as_plain
from llama_lab.sweep.confirm import Confirmed, verdict
from llama_lab.sweep.rows import row_of

from .conftest import LAUNCHERS, TINY, read_json
from .wandb_reader import read_offline_run
from .wandb_server import WandbServer

LEAN = [*TINY, "tracking=none", "evaluate.before=false", "generation.num_prompts=0", "dataset.metrics=[]"]
STUDY = ["-m", "hydra/sweeper=optuna"]
RANK = "lora.r=choice(4,8)"
RATE = "trainer.learning_rate=tag(log,interval(1e-4,1e-2))"


def trials(study: Path) -> list[dict[str, str]]:
    with (study / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def folders(study: Path) -> list[int]:
    return sorted(int(path.name) for path in study.iterdir() if path.name.isdecimal())


def shown_command(stdout: str, label: str) -> list[str]:
    """The words after `python -m llama_lab` of a command that a study has printed."""
    return shlex.split(re.search(rf"^{label}:\s+python -m llama_lab (.*)$", stdout, flags=re.M)[1])


@pytest.fixture(scope="module")
def pruned(lab, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """A finished study of the shipped search space with successive halving, two trials at a time."""
    cwd = tmp_path_factory.mktemp("pruned")
    words = [*TINY, "dataset.max_train_rows=128", "hydra.sweeper.n_trials=8", "hydra.sweeper.n_jobs=2"]
    done = lab("-m", "search=lora_quant", *words, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return cwd / "outputs" / "lora_quant", done


def test_bad_trials_end_early_and_say_at_which_step(pruned):
    study, done = pruned
    rows = trials(study)
    assert [int(row["trial"]) for row in rows] == folders(study) == list(range(8))
    ended = {row["trial"]: row for row in rows if row["state"] == "pruned"}
    assert ended
    assert {row["state"] for row in rows} == {"done", "pruned"}
    for number, row in ended.items():
        result = read_json(study / number / "result.json")
        assert result["status"] == "pruned"
        assert 0 < result["num_steps"] == int(float(row["num_steps"])) < 16
        assert row["eval_loss"] == ""
    assert "held-out loss is measured 4 times" in done.stdout
    baseline = read_json(study / "0" / "run.json")["config"]
    assert (baseline["lora"]["r"], baseline["lora"]["alpha"], baseline["quant"]["type"]) == (16, 16.0, "nf4")


def test_the_best_is_the_best_and_both_commands_train_it_again(pruned, lab):
    study, done = pruned
    cwd = study.parents[1]
    best = min((r for r in trials(study) if r["state"] == "done"), key=lambda r: float(r["eval_loss"]))
    assert best["best"] == "yes"
    wanted = read_json(study / best["trial"] / "run.json")["config"]
    winner, in_words = (shown_command(done.stdout, label) for label in ("The winner", "In words"))
    composed = yaml.safe_load(lab(*winner, "--cfg", "job", "--resolve", cwd=cwd).stdout)
    for config in (composed, as_plain(compose_words(in_words))):
        for group in ("model", "quant", "lora", "seed"):
            assert config[group] == wanted[group]
        assert {key for key in wanted["trainer"] if config["trainer"][key] != wanted["trainer"][key]} == {"resume"}
        assert config["dataset"]["metrics"]  # a single run measures all it can
    # with search= it is still one run, which measures less
    made = lab(*winner, "search=lora_quant", "tracking=none", "hydra.run.dir=again", cwd=cwd)
    assert made.returncode == 0, made.stderr
    assert "this is one run" in made.stderr
    a, b = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (cwd / "again", study / best["trial"]))
    assert all(a[name].equal(b[name]) for name in b)  # a forked process trains to the bit what a fresh one does


def test_wandb_has_a_group_a_study_and_a_run_a_trial(pruned):
    study, _ = pruned
    for row in trials(study):
        run = read_offline_run(next((study / row["trial"]).glob("wandb/offline-run-*/run-*.wandb")))
        assert run.name.startswith(f"#{row['trial']} r={row['lora.r']} alpha={row['lora.alpha']} ")
        assert (run.config["tracking"]["group"], run.config["tracking"]["job_type"]) == ("lora_quant", "trial")
        assert run.exit_code == 0  # pruned is not failed


def test_wandb_has_a_run_of_the_study_with_plots_table_and_winner(pruned):
    study, done = pruned
    rows = trials(study)
    (file,) = study.glob("wandb/offline-run-*/run-*.wandb")
    run = read_offline_run(file)
    assert (run.name, run.group, run.job_type, run.exit_code) == ("lora_quant", "lora_quant", "study", 0)
    assert f"find {study} -name 'offline-run-*' -exec wandb sync {{}} +".replace(f"{study}", "outputs/lora_quant") in (
        done.stdout
    )
    logged = {key.removesuffix(".path"): row[key] for row in run.history for key in row if key.endswith(".path")}
    assert logged.keys() == {"history", "parallel_coordinates", "pareto_front", "trials"}  # 8 trials: no importance
    files = {name: json.loads((file.parent / "files" / path).read_text()) for name, path in logged.items()}
    kinds = {name: {trace["type"] for trace in found["data"]} for name, found in files.items() if name != "trials"}
    assert kinds == {"history": {"scatter"}, "parallel_coordinates": {"scatter"}, "pareto_front": {"scatter"}}
    assert files["trials"]["columns"] == list(rows[0])
    assert [[str(cell) for cell in line[:2]] for line in files["trials"]["data"]] == [
        [row["trial"], row["state"]] for row in rows
    ]
    ended = [row for row in rows if row["state"] == "done"]
    curve = {row["trial"]: row["trial/eval_loss"] for row in run.history if "trial/eval_loss" in row}
    assert curve == {int(row["trial"]): float(row["eval_loss"]) for row in ended}
    best = min(ended, key=lambda row: float(row["eval_loss"]))
    assert run.summary["best/trial"] == int(best["trial"])
    assert run.summary["best/lora.r"] == int(best["lora.r"])
    assert run.config["settings"]["model.name"] == read_json(study / "0" / "run.json")["config"]["model"]["name"]


def test_the_printed_command_uploads_the_study_and_its_trials(pruned, environment):
    study, done = pruned
    command = re.search(r"Upload the study and its trials with: (.*)$", done.stdout, flags=re.M)[1]
    with WandbServer() as server:
        path = f"{Path(sys.executable).parent}:{environment['PATH']}"
        env = environment | server.environment | {"PATH": path}
        told = subprocess.run(command, shell=True, cwd=study.parents[1], env=env, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout + told.stderr
    assert sorted(run.job_type for run in server.runs.values()) == ["study", *["trial"] * 8]
    assert {run.group for run in server.runs.values()} == {"lora_quant"}
    assert {run.exit_code for run in server.runs.values()} == {0}
    for number in folders(study):
        run = server.runs[read_json(study / str(number) / "run.json")["id"]]
        lines = [json.loads(line) for line in (study / str(number) / "metrics.jsonl").read_text().splitlines()]
        sent = [{key: row[key] for key in lines[n]} for n, row in enumerate(run.history[: len(lines)])]
        assert sent == lines
        assert run.config["lora"]["r"] == read_json(study / str(number) / "run.json")["config"]["lora"]["r"]
    (whole,) = (run for run in server.runs.values() if run.job_type == "study")
    assert {"history", "parallel_coordinates", "pareto_front"} <= whole.summary.keys()
    assert len([name for name in whole.files if name.startswith("media/plotly/")]) == 3
    assert whole.summary["best/trial"] in folders(study)


def test_finished_study_goes_on_to_more_trials_over_a_torn_journal(pruned, lab):
    study, _ = pruned
    before = {number: (study / str(number) / "result.json").stat().st_mtime_ns for number in folders(study)}
    journal = study / "study.journal"
    journal.write_bytes(journal.read_bytes() + b'{"op_code":8,"worker_id":"x')
    words = [*TINY, "dataset.max_train_rows=128", "hydra.sweeper.n_trials=9", "tracking=none"]
    done = lab("-m", "search=lora_quant", *words, cwd=study.parents[1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "9 trials, 8 of them have ended" in done.stdout
    assert folders(study) == list(range(9))
    assert {n: (study / str(n) / "result.json").stat().st_mtime_ns for n in before} == before
    other = lab("-m", "search=lora_quant", *words, "lora.bias=all", cwd=study.parents[1])
    assert other.returncode == 2
    assert "lora.bias: none then, all now" in other.stderr


@pytest.mark.slow
def test_trials_that_fail_are_recorded_and_the_rest_goes_on(lab, tmp_path):
    points = [
        "{trainer.learning_rate: 1e38, dataset.max_length: 256, lora: all_linear, quant: nf4}",
        "{trainer.learning_rate: 1e-3, dataset.max_length: 12, lora: all_linear, quant: nf4}",
        "{trainer.learning_rate: 1e-3, dataset.max_length: 256, lora: dora, quant: int8}",
        "{trainer.learning_rate: 1e-3, dataset.max_length: 256, lora: all_linear, quant: none}",
    ]
    words = [*LEAN, "trainer.logging_steps=1", "trainer.num_train_epochs=8", "hydra.sweeper.n_trials=4"]
    words += ["hydra.sweeper.max_failure_rate=1"]
    space = ["trainer.learning_rate=choice(1e-3,1e38)", "dataset.max_length=choice(256,12)"]
    space += ["lora=choice(dora,all_linear)", "quant=choice(none,int8,nf4)"]
    process = lab.start(*STUDY, *words, *space, f"hydra.sweeper.baselines=[{','.join(points)}]", cwd=tmp_path)
    study = tmp_path / "outputs" / "study"
    killed: list[int] = []
    threading.Thread(target=kill_twice, args=(study / "3", killed, process), daemon=True).start()
    out, err = process.communicate(timeout=120)
    rows = trials(study)
    assert [row["state"] for row in rows] == ["failed", "failed", "infeasible", "failed"], out + err
    for row, said in zip(rows, ["loss is nan", "dataset.max_length=12", "dora", "SIGKILL"], strict=True):
        assert said in row["error"]
    assert len(set(killed)) == 2
    assert rows[3]["deaths"] == "2"
    assert read_json(study / "2" / "result.json")["status"] == "infeasible"
    assert process.returncode == 2
    assert "None of the 4 trials ended well" in err
    assert "trial 0: RunError: The training loss is nan" in err


def kill_twice(folder: Path, killed: list[int], study: subprocess.Popen) -> None:
    """What the system does to a process when memory is short, to a trial and to its second start."""
    while len(killed) < 2 and study.poll() is None:
        trained = (folder / "metrics.jsonl").exists()
        pid = (folder / ".lock").read_text().strip() if (folder / ".lock").exists() else ""
        if trained and pid and int(pid) not in killed:
            killed.append(int(pid))
            os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.01)


def test_hopeless_study_stops_with_the_first_error(lab, tmp_path):
    words = [*LEAN, "hydra.sweeper.n_trials=20", "trainer.learning_rate=choice(1e37,1e38)"]
    done = lab(*STUDY, *words, "hydra.sweeper.max_failure_rate=0", cwd=tmp_path)
    assert done.returncode == 2
    assert "1 of the 1 trials of this start failed" in done.stderr
    assert "loss is nan" in done.stderr
    assert folders(tmp_path / "outputs" / "study") == [0]


def test_several_objectives_conditions_and_limits(lab, tmp_path):
    words = [*TINY, "hydra.sweeper.n_trials=6", "hydra.sweeper.n_jobs=2"]
    done = lab("-m", "search=pareto", *words, "+hydra.sweeper.constraints.tokens_per_s=1e9", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    study = tmp_path / "outputs" / "pareto"
    rows = trials(study)
    assert {row["state"] for row in rows} == {"done"}
    front = [row for row in rows if row["best"]]
    assert min(rows, key=lambda row: float(row["eval_loss"])) in front
    assert max(rows, key=lambda row: float(row["tokens_per_s"])) in front
    for row in rows:
        config = read_json(study / row["trial"] / "run.json")["config"]
        assert (row["quant.double_quant"] != "") == (config["quant"]["type"] in ("nf4", "fp4"))
        if row["quant.double_quant"]:
            assert config["quant"]["double_quant"] is json.loads(row["quant.double_quant"])
    assert "Pareto front" in done.stdout
    run = read_offline_run(next(study.glob("wandb/offline-run-*/run-*.wandb")))
    logged = {key.removesuffix(".path") for row in run.history for key in row if key.endswith(".path")}
    each = {f"{name}/{key}" for name in ("history", "parallel_coordinates") for key in ("eval_loss", "tokens_per_s")}
    assert logged >= {*each, "pareto_front", "trials"}


SAYS_ITS_GPU = """
import functools, json, os, sys, time
from llama_lab import app
from llama_lab.rundir import RunDir
from llama_lab.sweep import child, driver

def work(order, pipe):
    child._prepare(order)
    time.sleep(0.5)
    known = [name for name in ("torch", "bitsandbytes") if name in sys.modules]
    result = {"status": "ok", "eval_loss": 1.0, "gpu": os.environ["CUDA_VISIBLE_DEVICES"], "imported": known}
    RunDir(order.folder).result.write_text(json.dumps(result))

if __name__ == "__main__":
    driver.TrialTask = functools.partial(driver.TrialTask, work=work)
    app.launch(["-m", *sys.argv[1:]])
"""


def test_each_slot_has_a_gpu_of_its_own(environment, tmp_path):
    (tmp_path / "says_its_gpu.py").write_text(SAYS_ITS_GPU)
    words = [*STUDY[1:], "model=tiny", RANK, "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=2"]
    command = [sys.executable, "says_its_gpu.py", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment | {"CUDA_VISIBLE_DEVICES": "3,7"}, check=True)
    results = [read_json(tmp_path / "outputs" / "study" / str(n) / "result.json") for n in range(4)]
    assert done.returncode == 0
    assert sorted(result["gpu"] for result in results) in (
        ["3", "3", "7", "7"],
        ["3", "3", "3", "7"],
        ["3", "7", "7", "7"],
    )
    assert all(result["imported"] == ["torch"] for result in results)  # bitsandbytes would begin CUDA before the fork


@pytest.mark.slow
def test_the_best_are_confirmed_with_other_seeds(lab, tmp_path):
    words = [*LEAN, "search.n_trials=2", "search.confirm=2", "search.confirm_seeds=2", "seed=5"]
    words += ["trainer.learning_rate=choice(1e-6,1e-2)", "hydra.sweeper.n_jobs=2", "dataset.max_train_rows=64"]
    points = "[{trainer.learning_rate: 1e-6},{trainer.learning_rate: 1e-2}]"
    done = lab(*STUDY, *words, f"hydra.sweeper.baselines={points}", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    again = sorted((tmp_path / "outputs" / "study" / "confirm").iterdir())
    assert {read_json(f / "run.json")["config"]["tracking"]["job_type"] for f in again} == {"confirm"}
    found = [read_json(path / "run.json")["config"] for path in again]
    pairs = [(config["trainer"]["learning_rate"], config["seed"]) for config in found]
    assert sorted(pairs) == [(1e-6, 6), (1e-6, 7), (1e-2, 6), (1e-2, 7)]
    losses = [read_json(path / "result.json")["eval_loss"] for path in again]
    slow, fast = ([loss for (r, _), loss in zip(pairs, losses, strict=True) if r == rate] for rate in (1e-6, 1e-2))
    assert statistics.fmean(fast) < statistics.fmean(slow)
    assert verdict(confirmed(1, fast), confirmed(0, slow)) in done.stdout


def confirmed(number: int, values: list[float]) -> Confirmed:
    trial = FrozenTrial(number, TrialState.COMPLETE, 0.0, None, None, {}, {}, {}, {}, {}, number)
    return Confirmed(row=row_of(trial), values=tuple(values))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lora.rr=choice(8,16)"], ["lora.rr", "Did you mean lora.r?"]),
        (["quant=choice(nf4,nf5)"], ["quant=nf5", "Did you mean quant=nf4?"]),
        (["lora.dropout=interval(0,1)"], ["lora.dropout=1"]),
        ([RANK, "hydra.sweeper.n_trails=3"], ["hydra.sweeper.n_trails", "hydra.sweeper.n_trials"]),
        ([RANK, "hydra.sweeper.sampler=random"], ["Type hydra/sweeper/sampler=random"]),
        ([RANK, "hydra/sweeper/pruner=medain"], ["hydra/sweeper/pruner=median"]),
        ([RANK, "tracking.mode=online"], ["WANDB_API_KEY"]),
        ([], ["nothing to choose"]),
    ],
    ids=str,
)
def test_typo_ends_before_the_first_trial(environment, tmp_path, words, said):
    command = [sys.executable, "-X", "importtime", "-m", "llama_lab", *STUDY, "model=tiny", *words]
    began = time.monotonic()
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert time.monotonic() - began < 10  # 1 s on a quiet machine; the bound is for loaded ones
    message = [line for line in done.stderr.splitlines() if line.startswith("llama_lab: ")]
    assert done.returncode == 2
    assert len(message) == 1
    assert [part for part in said if part not in message[0]] == []
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "import time" in line}
    assert imported.isdisjoint({"torch", "transformers", "optuna"})
    assert not list(tmp_path.iterdir())


@pytest.fixture
def postgres(tmp_path) -> Iterator[str]:
    """Address of a PostgreSQL of the test's own, from the programs of Debian's package."""
    if not (LAUNCHERS / "psycopg").exists():
        pytest.skip("psycopg is not installed")
    programs = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    user = "postgres" if os.geteuid() == 0 else None  # it does not run as root
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        free.close()
        if user:
            shutil.chown(folder, user)
        data = ["-D", f"{folder}/data"]
        options = ["-o", f"-p {port} -k {folder}", "-l", f"{folder}/log", "-w"]
        run = functools.partial(subprocess.run, check=True, user=user, cwd="/", capture_output=True)
        run([programs / "initdb", *data, "-U", "lab", "--auth=trust"])
        run([programs / "pg_ctl", *data, *options, "start"])
        yield f"postgresql://lab@127.0.0.1:{port}/postgres"
        run([programs / "pg_ctl", *data, "-m", "immediate", "stop"])


def work_together(lab, cwd: Path, *words: str, **env: str) -> None:
    words = (*LEAN, RANK, RATE, "hydra.sweeper.n_trials=5", *words)
    both = [lab.start(*STUDY, *words, cwd=cwd, **env) for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, out + err
        assert "5 trials: 5 done" in out
    study = cwd / "outputs" / "study"
    assert folders(study) == list(range(5))
    assert all((study / str(n) / "output.log").read_text().count("Adapter: ") == 1 for n in range(5))  # none twice


def test_two_machines_work_on_one_journal(lab, tmp_path):
    work_together(lab, tmp_path)


@pytest.mark.slow
def test_two_machines_work_on_one_database(lab, tmp_path, postgres):
    work_together(lab, tmp_path, f"hydra.sweeper.storage={postgres}", **with_launchers(lab))


PROXY = """
import sys
from optuna.storages import run_grpc_proxy_server
from llama_lab.sweep.storage import open_storage
run_grpc_proxy_server(open_storage(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]))
"""


@pytest.mark.slow
def test_two_machines_work_through_one_grpc_proxy(lab, tmp_path):
    if not (LAUNCHERS / "grpc").exists():
        pytest.skip("grpcio is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = lab.environment | with_launchers(lab)
    server = subprocess.Popen([sys.executable, "-c", PROXY, str(tmp_path / "study.journal"), port], env=env)
    try:
        work_together(lab, tmp_path, f"hydra.sweeper.storage=grpc://127.0.0.1:{port}", **with_launchers(lab))
    finally:
        server.kill()
        server.wait()


def with_launchers(lab) -> dict[str, str]:
    return {"PYTHONPATH": f"{lab.environment['PYTHONPATH']}{os.pathsep}{LAUNCHERS}"}


ON_RAY = [f"hydra.launcher.ray.remote.{key}" for key in ("num_gpus=0", "num_cpus=1", "memory=1_000_000_000")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "package", "words"),
    [("joblib", "joblib", []), ("submitit_local", "submitit", []), ("ray", "ray", ON_RAY)],
)
def test_trials_run_through_any_launcher(lab, tmp_path, launcher, package, words):
    if not (LAUNCHERS / "hydra_plugins" / f"hydra_{package}_launcher").exists():
        pytest.skip(f"hydra-{package}-launcher is not installed")
    words = [*LEAN, RANK, f"hydra/launcher={launcher}", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=2", *words]
    done = lab(*STUDY, *words, cwd=tmp_path, **with_launchers(lab))
    assert done.returncode == 0, done.stdout + done.stderr
    assert folders(tmp_path / "outputs" / "study") == [0, 1, 2]
    assert "3 trials: 3 done" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("sweep", [["lora.r=4,8"], ["hydra/sweeper=optuna", "lora.r=choice(4,8)"]])
def test_ray_without_what_a_trial_asks_for_ends_at_once(lab, tmp_path, sweep):
    words = ["-m", "model=tiny", "hydra/launcher=ray", "hydra.launcher.ray.remote.num_gpus=99", *sweep]
    done = lab(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert "pip install hydra-ray-launcher" in done.stderr
    if (LAUNCHERS / "ray").exists():
        done = lab(*words, cwd=tmp_path, **with_launchers(lab))
        assert done.returncode == 2
        assert "hydra.launcher.ray.remote.num_gpus=" in done.stderr
