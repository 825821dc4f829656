"""What became of a trial, how tables rank it, and whether a winner is one."""

import random

import pytest
from scipy import stats

from llama_lab.sweep.confirm import Confirmed, verdict
from llama_lab.sweep.outcome import MEMORY, State, missing_gib, outcome_of
from llama_lab.sweep.rows import Row, pareto_front, ranked, settings_line, short_names
from llama_lab.sweep.settings import Direction
from llama_lab.sweep.welch import welch_p

OK = {"status": "ok", "eval_loss": 1.5, "peak_memory_gib": 3.0, "num_steps": 20, "error": None}
MIN, MAX = Direction.minimize, Direction.maximize


def row(number, *values, state="done"):
    return Row(
        number=number,
        state=state,
        point={},
        values=values,
        step=None,
        loss=None,
        numbers={},
        error="",
        deaths=0,
        seconds=0,
    )


@pytest.mark.parametrize(
    ("result", "exit_code", "limits", "state", "said"),
    [
        (OK, 0, {}, State.done, ""),
        (OK, 0, {"peak_memory_gib": 4}, State.done, ""),
        (OK, 0, {"peak_memory_gib": 2}, State.infeasible, "peak_memory_gib 3 > 2"),
        (OK | {"eval_loss": None}, 0, {}, State.failed, "eval_loss is not a finite number"),
        ({"status": "pruned", "num_steps": 3}, 0, {}, State.pruned, ""),
        ({"status": "failed", "error": "RunError: nan"}, 2, {}, State.failed, "RunError: nan"),
        ({"status": "infeasible", "error": "CUDA out of memory"}, 1, {}, State.infeasible, "CUDA"),
        ({"status": "failed", "error": "RuntimeError: CUDA error: out of memory"}, 1, {}, State.infeasible, "CUDA"),
        (None, 255, {}, State.killed, "forked from"),
        (None, -9, {}, State.killed, "SIGKILL"),
        (None, 143, {}, State.killed, "SIGTERM"),
        (None, 1, {}, State.failed, "exit code 1"),
    ],
)
def test_outcome(result, exit_code, limits, state, said):
    outcome = outcome_of(result, ["eval_loss"], limits, exit_code)
    assert outcome.state is state
    assert said in outcome.error


def test_full_memory_is_a_constraint_and_no_loss():
    said = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total of 79 GiB of which 512.00 MiB is free."
    outcome = outcome_of({"status": "infeasible", "error": said}, ["eval_loss"], {})
    assert outcome.values == ()
    assert outcome.constraints == {MEMORY: 2.0}
    assert missing_gib("out of memory") == 1.0


def test_ranking_and_pareto_front():
    rows = [row(0, 2.0), row(1, 1.0), row(2, 3.0), row(3, 0.5, state="infeasible"), row(4, state="failed")]
    assert [r.number for r in ranked(rows, [MIN])] == [1, 0, 2]
    assert [r.number for r in ranked(rows, [MAX])] == [2, 0, 1]
    several = [row(0, 1.0, 10.0), row(1, 2.0, 20.0), row(2, 3.0, 15.0), row(3, 1.0, 10.0)]
    assert [r.number for r in pareto_front(several, [MIN, MAX])] == [0, 1, 3]
    assert [r.number for r in ranked(several, [MIN, MAX])] == [0, 3, 1, 2]


def test_names_are_short_where_they_stay_clear():
    names = short_names(["lora.r", "trainer.learning_rate", "lora.alpha/lora.r", "model.name", "dataset.name"])
    assert names == {
        "lora.r": "r",
        "trainer.learning_rate": "lr",
        "lora.alpha/lora.r": "alpha/r",
        "model.name": "model.name",
        "dataset.name": "dataset.name",
    }
    assert settings_line({"lora.r": 8, "trainer.learning_rate": 0.00012346}, names) == "r=8 lr=0.0001235"


def test_welch_agrees_with_scipy():
    rng = random.Random(0)
    for n, m, shift in [(3, 3, 0.0), (3, 5, 1.0), (10, 4, 3.0), (2, 2, 0.5), (5, 5, 8.0)]:
        one, other = [rng.gauss(0, 1) for _ in range(n)], [rng.gauss(shift, 2) for _ in range(m)]
        assert welch_p(one, other) == pytest.approx(stats.ttest_ind(one, other, equal_var=False).pvalue, rel=1e-9)


def test_verdict_says_noise_where_it_is_noise():
    first, second = Confirmed(row=row(3), values=(1.0, 1.1, 0.9)), Confirmed(row=row(7), values=(1.05, 1.15, 0.95))
    assert "trial 7 are within noise" in verdict(first, second)
    worse = Confirmed(row=row(7), values=(2.0, 2.1, 1.9))
    assert "Trial 3 is better than trial 7" in verdict(first, worse)
    assert "Too few" in verdict(first, Confirmed(row=row(7), values=(2.0,)))
    assert welch_p([1.0, 1.0], [1.0, 1.0]) == 1.0
    assert welch_p([1.0, 1.0], [2.0, 2.0]) == 0.0
