"""Stacked sweeps by their real commands, on a CPU: grids, studies, kills, and points that go elsewhere."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM

from llama_lab.backend import Adapted, OwnBackend
from llama_lab.choices import Engine
from llama_lab.compose import compose_words
from llama_lab.config import OWN_ADAPTER
from llama_lab.embedded import materialise
from llama_lab.engine import loop
from llama_lab.lock import config_of
from llama_lab.lora import add_adapter
from llama_lab.model import load_base, set_special_tokens
from llama_lab.rundir import RunDir
from llama_lab.runner import run
from llama_lab.stacked.host import BEGUN, MEMORY_FULL, StackSettings
from llama_lab.stacked.hosts import Stacks
from llama_lab.stacked.kind import kind_of
from llama_lab.stacked.places import Left, LonePlace, may_drop
from llama_lab.sweep.child import Order
from llama_lab.sweep.judge import hear
from llama_lab.sweep.processes import fork_server, started

from .conftest import read_json, steps_logged
from .studies import LEAN, RANK, RATE, STUDY, folders, trials
from .wandb_reader import read_offline_run

STACKED = ["hydra/launcher=stacked", "hydra.launcher.rows=4"]
GRID = [*LEAN, "lora.r=4,8", "quant=nf4,none,int8", "trainer.logging_steps=1", "hydra.sweep.dir=grid"]
NUM_TRIALS, NUM_STEPS = 4, 20


@pytest.fixture(scope="module")
def grid(lab, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """A finished grid of two ranks and three ways to store the base, one of which no stack takes."""
    cwd = tmp_path_factory.mktemp("grid")
    done = lab("-m", *GRID, *STACKED, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return cwd / "grid", done


def test_each_point_of_a_grid_is_a_run_of_its_own(grid):
    folder, done = grid
    assert folders(folder) == list(range(6))
    for number in folders(folder):
        run_folder = folder / str(number)
        result, lock = read_json(run_folder / "result.json"), read_json(run_folder / "run.json")
        assert result["status"] == "ok"
        assert (run_folder / ".hydra" / "overrides.yaml").exists()
        assert steps_logged(run_folder)[:4] == [1, 2, 3, 4]
        assert (run_folder / "checkpoints" / "checkpoint-4").is_dir()
        assert lock["config"]["tracking"]["group"] == "grid"
        base = AutoModelForCausalLM.from_pretrained(materialise(config_of(lock).model))
        adapter = PeftModel.from_pretrained(base, str(run_folder / "adapter"))
        assert adapter.peft_config[OWN_ADAPTER].r == lock["config"]["lora"]["r"]
        own = sum(p.numel() for name, p in adapter.named_parameters() if "lora_" in name)
        assert result["num_trainable_params"] == own
    assert done.stdout.count("done: held-out loss") == 6


def test_points_with_one_base_share_a_stack_and_others_go_elsewhere(grid):
    folder, done = grid
    shared = {n: (folder / str(n) / "output.log").read_text() for n in folders(folder)}
    by_quant = {q: [] for q in ("nf4", "none", "int8")}
    for number in folders(folder):
        by_quant[read_json(folder / str(number) / "run.json")["config"]["quant"]["type"]].append(shared[number])
    for quant in ("nf4", "none"):
        assert ["in a stack of up to 2 rows" in text for text in by_quant[quant]] == [True, True]
    assert ["in a stack" in text for text in by_quant["int8"]] == [False, False]
    assert done.stdout.count("Points with quant.type=int8 are trained one by one") == 1
    assert done.stdout.count("Points on tiny, nf4: 2 rows at a time") == 1
    assert {path.name for path in folder.glob("stack-*.log")} == {"stack-1.log", "stack-2.log"}


def test_the_same_grid_again_repeats_nothing_and_another_one_is_refused(grid, lab):
    folder, _ = grid
    results = [folder / str(number) / "result.json" for number in folders(folder)]
    before = [path.stat().st_mtime_ns for path in results]
    done = lab("-m", *GRID, *STACKED, cwd=folder.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("done: held-out loss") == 6
    words = [path.stat().st_mtime_ns for path in sorted(folder.glob("*/.hydra/*"))]
    other = lab("-m", *GRID, *STACKED, "trainer.weight_decay=0.1", cwd=folder.parent)
    assert other.returncode == 2
    assert "trainer.weight_decay: 0.0 then, 0.1 now" in other.stderr
    assert "grid/0 holds another run. Type hydra.sweep.dir=FOLDER with a new one." in other.stderr
    assert [path.stat().st_mtime_ns for path in sorted(folder.glob("*/.hydra/*"))] == words
    assert [path.stat().st_mtime_ns for path in results] == before


def test_a_stack_that_begins_in_the_process_of_another_learns_the_same(grid, lab, tmp_path):
    words = ["quant=nf4,none" if word.startswith("quant=") else word for word in GRID]
    done = lab("-m", *words, *STACKED, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    # the first base is out of memory, or another process would have begun
    assert "Another stack in process" in (tmp_path / "grid" / "stack-2.log").read_text()
    losses = [
        {
            (lock["quant"]["type"], lock["lora"]["r"]): read_json(sweep / str(number) / "result.json")["eval_loss"]
            for number in folders(sweep)
            if (lock := read_json(sweep / str(number) / "run.json")["config"])
        }
        for sweep in (tmp_path / "grid", grid[0])
    ]
    assert len(losses[0]) == 4
    assert losses[0].items() <= losses[1].items()


def kills_itself(channel):
    os.kill(os.getpid(), signal.SIGKILL)


def cannot_begin(channel):
    assert isinstance(channel.recv(), StackSettings)
    raise RuntimeError("The base of the last stack is still in memory")


def runs_out_of_memory(channel):
    assert isinstance(channel.recv(), StackSettings)
    channel.send(BEGUN)
    channel.recv()  # an order
    os._exit(MEMORY_FULL)


@pytest.mark.parametrize("work", [kills_itself, cannot_begin, runs_out_of_memory])
def test_what_a_former_stack_has_left_costs_the_next_one_no_rows(tmp_path, work):
    config, other = (compose_words([*LEAN, f"lora.r={rank}", "quant=none"]) for rank in (4, 8))
    said = []
    stacks = Stacks(wanted=4, configs=[config, other], folder=tmp_path, offline=True, is_queue=True, note=said.append)
    ours, theirs = fork_server().Pipe()
    left = started(work, (theirs,), "stack")
    stacks.left[""] = Left(process=left, channel=ours, env={}, waiting_for=threading.Lock())
    theirs.close()
    order = Order(config=config, folder=tmp_path / "0", overrides=[])
    try:
        assert stacks.run(order, lambda pipe, sentinel: hear(pipe, sentinel, lambda *_: None, lambda *_: None)) == 0
        assert [way.num_rows for way in stacks.ways.values()] == [2]  # as many as points
    finally:
        stacks.close()
    assert read_json(tmp_path / "0" / "result.json")["status"] == "ok"
    assert not stacks.left
    assert not left.is_alive()
    assert len(said) == 1, "nothing but how many rows there are"


def test_a_run_by_itself_begins_when_the_process_of_a_stack_has_ended(tmp_path):
    stack, alone = (compose_words([*LEAN, "lora.r=4", f"quant={quant}"]) for quant in ("none", "int8"))
    stacks = Stacks(wanted=2, configs=[stack, alone], folder=tmp_path, offline=True, is_queue=True)
    ours, theirs = fork_server().Pipe()
    left = started(waits, (theirs,), "stack")
    stacks.left[""] = Left(process=left, channel=ours, env={}, waiting_for=threading.Lock())
    theirs.close()
    order = Order(config=alone, folder=tmp_path / "0", overrides=[])
    assert isinstance(stacks._new(order, kind_of(alone), None), LonePlace)
    assert not left.is_alive()


def waits(channel):
    assert channel.recv() is None


class LoopBackend(OwnBackend):
    """A run that has its base for itself and is trained by the fast loop, on a CPU as well."""

    def adapted(self, config, tokenizer):
        base = load_base(config.model, config.quant)
        set_special_tokens(base, tokenizer)
        model = add_adapter(base, config.lora, seed=config.seed)
        return Adapted(model=model, adapter_name=OWN_ADAPTER, engine=Engine.fast)

    def fit(self, adapted, tokenizer, train, settings, listener, evaluate):
        return loop.fit(adapted.model, tokenizer, train, settings, listener, evaluate)


@pytest.mark.parametrize("number", [0, 3, 4])
def test_a_row_learns_what_the_run_alone_learns(grid, tmp_path, number):
    stacked = grid[0] / str(number)
    lock = read_json(stacked / "run.json")
    torch.set_num_threads(1)
    with (tmp_path / "said").open("w") as said:
        alone = run(config_of(lock), tmp_path / "alone", lock["overrides"], Console(file=said), backend=LoopBackend())
    together = read_json(stacked / "result.json")
    for name in ("eval_loss", "train_loss"):
        assert together[name] == pytest.approx(alone[name], rel=1e-3)
    for name in ("num_trainable_params", "num_params", "num_steps"):
        assert together[name] == alone[name]


def test_a_study_refills_slots_and_a_bad_trial_fails_alone(lab, tmp_path):
    rates = ["1e-2", "1e38", "1e-7", "1e-8"]
    points = f"hydra.sweeper.baselines=[{','.join(f'{{trainer.learning_rate: {rate}}}' for rate in rates)}]"
    words = [*LEAN, "trainer.learning_rate=choice(1e-2,1e38,1e-7,1e-8)", points, "hydra.sweeper.n_trials=6"]
    words += ["hydra/sweeper/pruner=successive_halving", "dataset.max_train_rows=64", "trainer.logging_steps=1"]
    words += ["hydra.sweeper.max_failure_rate=1", "hydra/launcher=stacked", "hydra.launcher.rows=3", "tracking=wandb"]
    done = lab(*STUDY, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    study = tmp_path / "outputs" / "study"
    rows = trials(study)
    assert folders(study) == list(range(6))
    assert [row["state"] for row in rows[:2]] == ["done", "failed"]
    assert "loss is" in rows[1]["error"]
    assert "pruned" in {row["state"] for row in rows}
    assert "hydra.sweeper.n_jobs=3: a trial for each row." in done.stdout
    assert [path.name for path in study.glob("stack-*.log")] == ["stack-1.log"]  # one base for all six
    printed = [(study / str(number) / "output.log").read_text() for number in folders(study)]
    assert [text.count("in a stack of up to 3 rows") for text in printed] == [1] * 6
    for row in rows:
        folder = study / row["trial"]
        run = read_offline_run(next(folder.glob("wandb/offline-run-*/run-*.wandb")))
        assert run.name.startswith(f"#{row['trial']} ")
        assert run.exit_code == (row["state"] == "failed")
        logged = [{key: value for key, value in line.items() if value is not None} for line in metrics_of(folder)]
        kept = [{key: told[key] for key in line} for line, told in zip(logged, run.history, strict=False)]
        assert kept == logged  # what a row tells goes into its own run alone


def test_rows_that_are_measured_together_are_judged_together(lab, tmp_path):
    words = [*LEAN, RATE, "hydra/sweeper/sampler=random", "hydra.sweeper.n_trials=6", "trainer.max_steps=16"]
    words += ["hydra/sweeper/pruner=successive_halving", "hydra.sweeper.pruner.reduction_factor=3"]
    words += ["hydra.sweeper.pruner.min_resource=4", "hydra/launcher=stacked", "hydra.launcher.rows=6"]
    done = lab(*STUDY, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    study = tmp_path / "outputs" / "study"
    ended = sorted((row["state"], metrics_of(study / row["trial"])[-1]["step"]) for row in trials(study))
    # a third of six goes on; one after the other they would be compared with one, two, three others, and more go on
    assert ended == [("done", 16), ("pruned", 4), ("pruned", 4), ("pruned", 4), ("pruned", 4), ("pruned", 12)]


HAS_MEMORY_FOR_TWO = """
import sys
from llama_lab import app
from llama_lab.stacked import host, places

def serve(settings, channel):
    from llama_lab.engine.stack import Stack

    step = Stack.step

    def step_two(self):
        if len(self.live) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return step(self)

    Stack.step = step_two
    host.serve(settings, channel)

if __name__ == "__main__":
    places.serve = serve
    sys.exit(app.launch(["-m", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_a_stack_whose_memory_is_full_goes_on_with_half_of_its_rows(environment, tmp_path):
    (tmp_path / "has_memory_for_two.py").write_text(HAS_MEMORY_FOR_TWO)
    words = [*LEAN, "lora.r=2,4,6,8", "hydra.sweep.dir=grid", *STACKED]
    command = [sys.executable, "has_memory_for_two.py", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "The stack ran out of memory with 4 rows. Its points go on from their checkpoints, 2 at a time." in done.stdout
    )
    results = [read_json(tmp_path / "grid" / str(number) / "result.json") for number in range(4)]
    assert [(result["status"], result["num_steps"]) for result in results] == [("ok", 4)] * 4


@pytest.mark.slow
def test_rows_go_on_from_their_checkpoints_after_kills(lab, tmp_path):
    study = tmp_path / "outputs" / "study"
    words = [*STUDY, *LEAN, RANK, f"hydra.sweeper.n_trials={NUM_TRIALS}", "dataset.max_train_rows=160"]
    words += ["trainer.logging_steps=1", *STACKED]
    process = lab.start(*words, cwd=tmp_path)
    when(process, lambda: len(list(study.glob("*/checkpoints/checkpoint-*"))) >= 4)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    killed_at = {number: max(steps_logged(study / str(number)), default=0) for number in folders(study)}
    assert all(step < NUM_STEPS for step in killed_at.values())
    process = lab.start(*words, cwd=tmp_path)
    when(process, lambda: any(max(steps_logged(study / str(n)), default=0) > killed_at[n] + 2 for n in killed_at))
    os.kill(int((study / "0" / ".lock").read_text()), signal.SIGKILL)  # the process of the stack alone
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert "The stack of 4 rows was killed by SIGKILL. Its points go on from their checkpoints, 2 at a time." in out
    rows = trials(study)
    assert [(row["state"], row["deaths"]) for row in rows] == [("done", "0")] * NUM_TRIALS
    assert folders(study) == list(range(NUM_TRIALS))
    printed = [(study / str(number) / "output.log").read_text() for number in range(NUM_TRIALS)]
    assert any("Going on from the checkpoint" in text for text in printed)
    assert [text.count("Adapter: ") for text in printed] == [1] * NUM_TRIALS  # each has ended once
    for number in range(NUM_TRIALS):
        assert [step for step in steps_logged(study / str(number)) if step] == [*range(1, NUM_STEPS + 1), NUM_STEPS]


@pytest.mark.slow
def test_points_of_a_grid_go_on_when_their_stack_is_told_to_end(lab, tmp_path):
    words = [*LEAN, "lora.r=4,8", "dataset.max_train_rows=160", "trainer.logging_steps=1", "hydra.sweep.dir=grid"]
    process = lab.start("-m", *words, "trainer.save_steps=4", *STACKED, cwd=tmp_path)
    grid = tmp_path / "grid"
    when(process, lambda: len(list(grid.glob("*/checkpoints/checkpoint-*"))) >= 2)
    os.kill(int((grid / "0" / ".lock").read_text()), signal.SIGTERM)  # the process of the stack
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert "The stack of 2 rows was killed by SIGTERM. Its points go on from their checkpoints, one by one." in out
    for number in range(2):
        assert read_json(grid / str(number) / "result.json")["status"] == "ok"
        assert "Going on from the checkpoint" in (grid / str(number) / "output.log").read_text()


def test_a_stack_has_dropout_where_a_point_may_have_it():
    plain, dropping, going_on = (compose_words([*LEAN, f"lora.dropout={share}"]) for share in (0, 0.1, 0))
    going_on.model.adapter = "outputs/run"  # whose dropout is its own
    assert [may_drop(config) for config in (plain, dropping, going_on)] == [False, True, True]


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def when(process: subprocess.Popen, holds: Callable[[], bool]) -> None:
    """Wait until something holds while the process runs."""
    deadline = time.monotonic() + 120
    while process.poll() is None and not holds() and time.monotonic() < deadline:
        time.sleep(0.002)
    assert process.poll() is None, process.communicate()


@pytest.mark.parametrize("rows", ["0", "eight", "2.5", "[2]", "true"])
def test_rows_that_are_no_number_are_one_message(lab, tmp_path, rows):
    for words in ([*STUDY, RANK], ["-m", "lora.r=4,8"]):
        done = lab(*words, "model=tiny", "hydra/launcher=stacked", f"hydra.launcher.rows={rows}", cwd=tmp_path)
        assert done.returncode == 2
        message = [line for line in done.stderr.splitlines() if line.startswith("llama_lab: ")]
        assert len(message) == 1
        assert "hydra.launcher.rows=" in message[0]
        assert "hydra.launcher.rows=auto" in message[0]
    assert not list(tmp_path.iterdir())


def test_one_folder_for_several_points_is_refused(lab, tmp_path):
    words = ["-m", *LEAN, *STACKED, "lora.r=4,8", "hydra.sweep.dir=grid", "hydra.sweep.subdir=here_${hydra:job.name}"]
    done = lab(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert "hydra.sweep.subdir=here_llama_lab is one folder for several points" in done.stderr
    assert not list(tmp_path.glob("grid/*/run.json"))


def test_a_grid_that_runs_already_is_left_alone(lab, tmp_path):
    with RunDir(tmp_path / "grid").held():
        done = lab("-m", *LEAN, *STACKED, "lora.r=4,8", "hydra.sweep.dir=grid", cwd=tmp_path)
    assert done.returncode == 2
    assert f"grid is in use by process {os.getpid()}. Wait for it, or end it." in done.stderr
    assert not list(tmp_path.glob("grid/*/*"))


@pytest.mark.parametrize("words", [[RANK, "search.n_trials=1", *STUDY[1:]], ["lora.r=4,8", *STACKED]])
def test_a_sweep_whose_jobs_are_to_change_the_folder_stays_in_its_own(lab, tmp_path, words):
    done = lab("-m", *LEAN, *words, "trainer.max_steps=2", "hydra.job.chdir=true", "hydra.sweep.dir=here", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.parent.parent.name for path in tmp_path.rglob("result.json")] == ["here"] * (1 + (words[0] != RANK))


def test_points_without_a_finite_held_out_loss_end_a_grid_well(lab, tmp_path):
    """Such as one whose weights left the numbers."""
    words = [*LEAN, "trainer.learning_rate=1e-3,1e30", "trainer.max_steps=2"]
    words += ["hydra/launcher=stacked", "hydra.launcher.rows=2"]
    done = lab("-m", *words, "hydra.sweep.dir=grid", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "done: held-out loss -, " in done.stdout
    assert [read_json(tmp_path / "grid" / n / "result.json")["status"] for n in "01"] == ["ok", "ok"]
