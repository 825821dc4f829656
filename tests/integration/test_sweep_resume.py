"""A study that is killed at any moment goes on with the same command: same numbers, same folders, same points."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llama_lab.sweep.methods import PrunerSettings, SamplerSettings
from llama_lab.sweep.settings import Direction, SweepSettings
from llama_lab.sweep.space import parse_space
from llama_lab.sweep.storage import open_storage
from llama_lab.sweep.study import open_study

from .conftest import read_json, steps_logged
from .studies import LEAN, RANK, RATE, STUDY, folders, trials

NUM_TRIALS, NUM_STEPS = 4, 20
NUM_KILLS = int(os.environ.get("LLAMA_LAB_TEST_KILLS", "1"))
"""SIGKILLs to the whole group, beside one Ctrl-C and one SIGKILL to the study alone. Moments: LLAMA_LAB_TEST_SEED."""
SLOW_START_S = 8.0
"""So long the start of a study takes on a machine that has other work."""
WORDS = [*LEAN, RANK, RATE, f"hydra.sweeper.n_trials={NUM_TRIALS}", "dataset.max_train_rows=160"]
WORDS += ["trainer.logging_steps=1", "hydra.sweeper.study_name=killed"]


def kill_group(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)


def kill_parent(process: subprocess.Popen) -> None:
    os.kill(process.pid, signal.SIGKILL)


def interrupt(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C does


def expected_points(folder: Path) -> list[dict]:
    """What a study that nobody kills draws; the first trials do not depend on results."""
    settings = SweepSettings(
        sampler=SamplerSettings(name="tpe"), pruner=PrunerSettings(name="none"), n_trials=NUM_TRIALS
    )
    space = parse_space({}, [RANK, RATE])
    storage = open_storage(str(folder / "expected.journal"))
    study = open_study("s", storage, settings, space, directions=[Direction.minimize], n_trials=NUM_TRIALS)
    return [study.claim().point for _ in range(NUM_TRIALS)]


def end(lab, tmp_path: Path, how: Callable, when: Callable[[], bool], *words: str) -> int:
    process = lab.start(*STUDY, *WORDS, *words, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while process.poll() is None and not when() and time.monotonic() < deadline:
        time.sleep(0.002)
    assert process.poll() is None, process.communicate()
    how(process)
    process.communicate(timeout=60)
    return process.returncode


CLAIM = """
import sys
from llama_lab.sweep.methods import PrunerSettings, SamplerSettings
from llama_lab.sweep.settings import Direction, SweepSettings
from llama_lab.sweep.space import parse_space
from llama_lab.sweep.storage import open_storage
from llama_lab.sweep.study import open_study
settings = SweepSettings(sampler=SamplerSettings(name="tpe"), pruner=PrunerSettings(name="none"))
storage = open_storage(sys.argv[1])
space = parse_space({}, sys.argv[2:])
open_study("killed", storage, settings, space, directions=[Direction.minimize], n_trials=1).claim()
"""


def test_killed_between_the_result_and_the_study_is_not_trained_again(lab, tmp_path):
    study = tmp_path / "outputs" / "killed"
    (study / "0").mkdir(parents=True)
    subprocess.run([sys.executable, "-c", CLAIM, study / "study.journal", RANK, RATE], check=True)
    (study / "0" / "result.json").write_text('{"schema": 1, "status": "ok", "eval_loss": 1.25, "num_steps": 20}')
    done = lab(*STUDY, *WORDS, "hydra.sweeper.n_trials=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [(row["state"], row["eval_loss"]) for row in trials(study)] == [("done", "1.25")]
    assert not (study / "0" / "output.log").exists()


@pytest.mark.slow
def test_killed_at_random_moments_loses_nothing_and_repeats_nothing(lab, tmp_path):
    rng = random.Random(os.environ.get("LLAMA_LAB_TEST_SEED", "study"))
    study = tmp_path / "outputs" / "killed"
    kinds = [kill_group] * NUM_KILLS + [interrupt, kill_parent]
    rng.shuffle(kinds)
    moments = sorted(rng.sample(range(1, (NUM_TRIALS - 1) * NUM_STEPS), len(kinds)))
    done: dict[int, int] = {}
    for count, (moment, how) in enumerate(zip(moments, kinds, strict=True)):
        if how is interrupt:  # once it trains: Python itself answers a Ctrl-C in its first moments
            when = both(begun(study, moment), begun(study, steps_of(study) + 1))
        elif count % 2:
            when = both(after(rng.uniform(0, SLOW_START_S)), begun(study, moment, checkpointed=0))
        else:
            when = begun(study, moment)
        code = end(lab, tmp_path, how, when, "hydra.sweeper.n_jobs=2")
        assert code == (130 if how is interrupt else -signal.SIGKILL)
        steps = {n: len(steps_logged(study / str(n))) for n in folders(study)} if study.exists() else {}
        print(f"{count + 1}: {how.__name__} at {moment} steps or later; trials have taken {steps}")
        results = {n: study / str(n) / "result.json" for n in steps}
        ok = {n: path for n, path in results.items() if path.exists() and read_json(path)["status"] == "ok"}
        done |= {n: path.stat().st_mtime_ns for n, path in ok.items() if n not in done}
    last = lab(*STUDY, *WORDS, cwd=tmp_path)
    assert last.returncode == 0, last.stdout + last.stderr
    rows = trials(study)
    assert [row["state"] for row in rows] == ["done"] * NUM_TRIALS
    assert [int(row["trial"]) for row in rows] == folders(study) == list(range(NUM_TRIALS))
    assert {n: (study / str(n) / "result.json").stat().st_mtime_ns for n in done} == done
    drawn = [{"lora.r": int(r["lora.r"]), "trainer.learning_rate": float(r["trainer.learning_rate"])} for r in rows]
    assert drawn == expected_points(tmp_path)
    assert {row["deaths"] for row in rows} == {"0"}
    printed = [(study / str(n) / "output.log").read_text() for n in range(NUM_TRIALS)]
    assert any("Going on from the checkpoint" in text for text in printed)
    assert [text.count("Adapter: ") for text in printed] == [1] * NUM_TRIALS  # each has ended once
    assert all(read_json(study / str(n) / "result.json")["num_steps"] == NUM_STEPS for n in range(NUM_TRIALS))
    print(f"{len(kinds)} times killed; {len(done)} trials had ended before the last start, none was trained again")


def steps_of(study: Path) -> int:
    """Steps that all trials have taken."""
    return sum(len(steps_logged(path)) for path in study.glob("[0-9]*"))


def begun(study: Path, moment: int, checkpointed: int = 3) -> Callable[[], bool]:
    """Whether so many steps have been taken, and a trial is under way that has taken `checkpointed` of them."""

    def holds() -> bool:
        steps = [len(steps_logged(path)) for path in study.glob("[0-9]*")]
        return sum(steps) >= moment and any(checkpointed <= num < NUM_STEPS - 1 for num in steps)

    return holds


def after(seconds: float) -> Callable[[], bool]:
    """Whether so many seconds have gone by: where the steps have been taken before, the moment lies in a start."""
    ends = time.monotonic() + seconds
    return lambda: time.monotonic() >= ends


def both(one: Callable[[], bool], other: Callable[[], bool]) -> Callable[[], bool]:
    return lambda: one() and other()
