"""Studies by their real commands: pruned, with several objectives, confirmed, and checked first."""

import contextlib
import json
import os
import pty
import re
import statistics
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import yaml
from optuna.trial import FrozenTrial, TrialState
from safetensors.torch import load_file

from llama_lab.compose import compose_words
from llama_lab.lock import as_plain
from llama_lab.sweep.confirm import Confirmed, verdict
from llama_lab.sweep.rows import row_of

from .conftest import TINY, read_json
from .studies import LEAN, RANK, STUDY, folders, shown_command, trials
from .wandb_reader import read_offline_run
from .wandb_server import WandbServer


@pytest.fixture(scope="module")
def pruned(lab, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """A finished study of the shipped search space with successive halving, two trials at a time."""
    cwd = tmp_path_factory.mktemp("pruned")
    words = [*TINY, "dataset.max_train_rows=128", "hydra.sweeper.n_trials=8", "hydra.sweeper.n_jobs=2"]
    done = lab.fresh("-m", "search=lora_quant", *words, cwd=cwd)
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
    assert "held-out loss is measured at its rungs, after 1/8 of the steps" in done.stdout
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
    made = lab.fresh(*winner, "search=lora_quant", "tracking=none", "hydra.run.dir=again", cwd=cwd)
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


RATES = (1e-2, 1e-6, 1e-7, 1e-8)
FROM_GOOD_TO_BAD = f"hydra.sweeper.baselines=[{','.join(f'{{trainer.learning_rate: {rate}}}' for rate in RATES)}]"
FOUR = [*LEAN, "dataset.max_train_rows=64", "trainer.learning_rate=interval(1e-8,1e-2)", "hydra.sweeper.n_trials=4"]


def test_hyperband_ends_bad_trials_and_a_limit_makes_one_infeasible(lab, tmp_path):
    words = [*FOUR, FROM_GOOD_TO_BAD, "hydra/sweeper/pruner=hyperband", "+hydra.sweeper.constraints.perplexity=300"]
    done = lab(*STUDY, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = trials(tmp_path / "outputs" / "study")
    # the third is the first of its bracket, so that it is trained to its end
    assert [row["state"] for row in rows] == ["done", "pruned", "infeasible", "pruned"]
    assert float(rows[0]["perplexity"]) < 300 < float(rows[2]["perplexity"])
    assert "perplexity" in rows[2]["error"]
    assert [row["best"] for row in rows] == ["yes", "", "", ""]


def test_a_terminal_shows_a_live_table_and_the_median_ends_bad_trials(lab, tmp_path):
    words = [*FOUR, FROM_GOOD_TO_BAD, "hydra/sweeper/pruner=median", "hydra.sweeper.pruner.n_startup_trials=1"]
    code, shown = in_a_terminal(lab, *STUDY, *words, cwd=tmp_path)
    assert code == 0, shown
    assert [row["state"] for row in trials(tmp_path / "outputs" / "study")] == ["done", "pruned", "pruned", "pruned"]
    while_it_ran = shown[: shown.index("The best trials")]
    for part in ("Study study", "running", "lr=0.01", "1 of 4 trials have ended, best so far: trial 0 with", " left"):
        assert part in while_it_ran
    assert re.search(r"\* 0 .*done.*lr=0\.01", while_it_ran)
    assert re.search(r"1 .*pruned.*lr=1e-06 .* 2 .*5\.79", while_it_ran)  # its step, and the loss at the rung


def in_a_terminal(lab, *words: str, cwd: Path) -> tuple[int, str]:
    """Exit code and output of a command that has a terminal of 160 columns."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (50, 160))
    command = [sys.executable, "-m", "llama_lab", *words]
    env = lab.environment | {"TERM": "xterm"}
    with subprocess.Popen(command, cwd=cwd, env=env, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # how Linux says that nobody writes any more
            while part := os.read(ours, 65536):
                shown += part
    os.close(ours)
    return process.returncode, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode(errors="replace"))


def test_several_objectives_conditions_and_limits(lab, tmp_path):
    points = ["{quant: nf4, quant.double_quant: true}", "{quant: fp4, quant.double_quant: false}", "{quant: int8}"]
    words = [*TINY, "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=2"]
    words += [f"hydra.sweeper.baselines=[{','.join(points)}]"]
    done = lab("-m", "search=pareto", *words, "+hydra.sweeper.constraints.tokens_per_s=1e9", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    study = tmp_path / "outputs" / "pareto"
    rows = trials(study)
    assert {row["state"] for row in rows} == {"done"}
    front = [row for row in rows if row["best"]]
    assert min(rows, key=lambda row: float(row["eval_loss"])) in front
    assert max(rows, key=lambda row: float(row["tokens_per_s"])) in front
    assert [row["quant.double_quant"] for row in rows[:3]] == ["true", "false", ""]
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


@pytest.mark.slow
def test_the_best_are_confirmed_with_other_seeds(lab, tmp_path):
    words = [*LEAN, "search.n_trials=2", "search.confirm=2", "search.confirm_seeds=2", "seed=5"]
    words += ["trainer.learning_rate=choice(1e-6,1e-2)", "hydra.sweeper.n_jobs=2"]
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
        ([RANK, "hydra.sweeper.n_jobs=1,2"], ["have one value each", "Type hydra.sweeper.n_jobs=VALUE"]),
        ([RANK, "hydra.sweeper.storage="], ["Type hydra.sweeper.storage=study.journal"]),
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
