"""What a stacked sweep decides before it trains: which points go together, how many, and whether that pays."""

import json
import logging
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from llama_lab.choices import Memory
from llama_lab.compose import compose_words
from llama_lab.errors import ConfigError
from llama_lab.memory import estimate_fast
from llama_lab.params import SHAPES
from llama_lab.stacked.gain import FULL, WORTH_IT, predicted_gain, step_ms
from llama_lab.stacked.host import StackSettings
from llama_lab.stacked.hosts import Stacks
from llama_lab.stacked.kind import kind_of
from llama_lab.stacked.places import StackPlace
from llama_lab.stacked.rows import Stacking, check_rows, largest_stack, predicted, stacking
from llama_lab.stacked.turns import Globals, Turn

MEASURED = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "stacked.json"
SHAPE = SHAPES["llama2_7b"]


def test_predictions_are_near_what_was_measured():
    rows = json.loads(MEASURED.read_text())["rows"]
    alone = {row["case"]: row for row in rows if row["system"] == "one after the other"}
    stacks = [row for row in rows if row["system"] == "stack"]
    assert stacks
    for row in stacks:
        num_rows = len(row["ranks"])
        num_tokens = row["tokens_per_step"] / num_rows
        assert step_ms(num_tokens, num_rows) == pytest.approx(row["step_ms"], rel=0.05)
        measured = row["tokens_per_s"] / alone[row["case"]]["tokens_per_s"]
        assert predicted_gain(num_tokens, num_rows) == pytest.approx(measured, rel=0.05)


def test_short_rows_gain_and_full_gpus_do_not():
    assert predicted_gain(256, 1) == 1
    assert predicted_gain(64, 8) > predicted_gain(256, 8) > predicted_gain(256, 4) > predicted_gain(512, 4) > WORTH_IT
    assert predicted_gain(FULL, 4) < WORTH_IT
    assert predicted(FULL, 4).num_rows is None
    assert "one by one" in predicted(FULL, 4).said
    assert predicted(256, 8).num_rows == 8
    assert f"predicted gain {predicted_gain(256, 8):.2f}x" in predicted(256, 8).said


@pytest.mark.parametrize("rows", [0, -1, "eight", 2.5, True, None, [4]])
def test_rows_are_a_number_or_auto(rows):
    with pytest.raises(ConfigError, match=r"hydra\.launcher\.rows=.*hydra\.launcher\.rows=auto"):
        check_rows(rows)
    assert (check_rows(3), check_rows("auto")) == (3, None)


def test_a_cpu_stacks_only_where_it_is_asked_to():
    config = compose_words(["model=tiny"])
    assert stacking(None, config, 8, None).num_rows is None
    assert stacking(4, config, 8, None).num_rows == 4
    assert stacking(4, config, 8, None, num_points=2).num_rows == 2
    assert stacking(4, config, 8, None, num_points=1).num_rows is None
    assert stacking(1, config, 8, None).num_rows is None


def test_the_tokens_of_a_row_are_counted_before_a_gpu_gets_it():
    rows = ["model=tiny", "dataset.max_train_rows=16", "dataset.max_eval_rows=2"]
    short, full = (
        stacking(4, compose_words([*rows, f"trainer.per_device_train_batch_size={size}"]), 8, "0") for size in (1, 16)
    )
    assert short.num_rows == 4
    assert "4 rows at a time, predicted gain" in short.said
    assert float(short.said.split("predicted gain ")[1].split("x")[0]) > 1.1
    assert full.num_rows is None


@pytest.mark.parametrize(
    ("words", "together"),
    [
        (["lora.r=8", "trainer.learning_rate=1e-3", "lora.dropout=0.2", "seed=7"], True),
        (["lora.alpha=64", "trainer.num_train_epochs=2", "trainer.lr_scheduler_type=linear"], True),
        (["trainer.gradient_accumulation_steps=2", "trainer.optim=adamw_torch"], True),
        (["quant=fp4"], False),
        (["model=tiny"], False),
        (["lora=attention"], False),
        (["dataset.max_length=128"], False),
        (["trainer.per_device_train_batch_size=3"], False),
    ],
    ids=str,
)
def test_points_go_together_where_they_share_base_and_data(words, together):
    assert (kind_of(compose_words(words)) == kind_of(compose_words([]))) is together


@pytest.mark.parametrize(
    "word",
    [
        *("quant=int8", "lora=dora", "lora.init=olora", "tracking=mlflow"),
        *("trainer.engine=standard", "trainer.optim=adafactor", "trainer.micro_batch_size=auto"),
    ],
)
def test_what_no_stack_takes_is_named(word):
    alone = kind_of(compose_words(["quant=none", word])).alone
    assert alone is not None
    assert alone.split(".")[0].split("=")[0] in ("quant", "lora", "trainer", "tracking")
    assert kind_of(compose_words(["quant=none"])).alone is None


@pytest.mark.parametrize(
    ("in_stack", "waiting", "is_taken"),
    [
        (1, {"nf4": 1, "fp4": 2, "none": 2}, True),  # the others are more, but in no stack together
        (1, {"nf4": 4, "fp4": 9, "none": 9}, True),
        (4, {"nf4": 1, "fp4": 9}, False),  # the slots are full
        (1, {"nf4": 1, "fp4": 4}, True),
        (1, {"nf4": 1, "fp4": 5}, True),  # a stack has four rows at most
        (0, {"nf4": 1, "fp4": 4}, False),
        (1, {"nf4": 0, "fp4": 4}, False),
        (1, {"nf4": 1, "int8": 9}, True),  # these go one by one in any case
    ],
)
def test_a_stack_is_filled_while_another_would_not_be_twice_as_full(tmp_path, in_stack, waiting, is_taken):
    configs = {quant: compose_words([f"quant={quant}"]) for quant in waiting}
    kinds = {quant: kind_of(config) for quant, config in configs.items()}
    stacks = Stacks(wanted=4, configs=list(configs.values()), folder=tmp_path, offline=True, is_queue=False)
    stacks.ways = {kinds[quant]: Stacking(num_rows=None if quant == "int8" else 4, said="") for quant in waiting}
    settings = StackSettings(num_rows=4, rank=16, dropout=True, log=tmp_path / "log", env={})
    stacks.active["0"] = StackPlace(kind=kinds["nf4"], settings=settings, num_points=in_stack)
    stacks.waiting.update({("0", kinds[quant]): number for quant, number in waiting.items()})
    assert stacks._has_place("0", kinds["nf4"], configs["nf4"], 4) is is_taken
    assert not stacks._has_place("0", kinds["nf4"], configs["nf4"], 4, {"TENSORBOARD_LOGGING_DIR": "of/its/own"})
    assert stacks.num_kinds == len(waiting) - ("int8" in waiting)


def test_a_stack_has_no_more_rows_than_its_study_has_trials(tmp_path):
    config = compose_words(["quant=none"])
    stacks = Stacks(wanted=64, configs=[config], folder=tmp_path, offline=True, is_queue=False, most_points=3)
    assert stacks.num_rows(kind_of(config), config) == 3


@pytest.mark.parametrize(
    ("is_queue", "quants", "ago", "begins"),
    [
        (False, ("nf4", "fp4"), 0.0, False),  # more of the other kind may come
        (False, ("nf4", "fp4"), 60.0, True),
        (False, ("nf4",), 0.0, False),  # more that begin with it, and are judged with it
        (True, ("nf4", "fp4"), 0.0, True),  # a grid ends no point early
    ],
)
def test_a_study_begins_once_its_points_are_there(tmp_path, is_queue, quants, ago, begins):
    configs = [compose_words([f"quant={quant}"]) for quant in quants]
    stacks = Stacks(wanted=4, configs=configs, folder=tmp_path, offline=True, is_queue=is_queue)
    stacks.ways = {kind_of(config): Stacking(num_rows=4, said="") for config in configs}
    stacks.waiting["0", kind_of(configs[0])] += 1
    stacks.came_at = time.monotonic() - ago
    assert stacks._has_place("0", kind_of(configs[0]), configs[0], 4) is begins


def test_a_stack_takes_its_base_once_and_the_rest_for_each_row():
    config = compose_words(["model=llama2_7b", "lora.r=16"])
    one, eight = (estimate_fast(SHAPE, config, Memory.balanced, length=256, num_rows=rows, rank=32) for rows in (1, 8))
    assert eight.base == one.base
    for part in ("adapter", "gradients", "activations"):
        assert getattr(eight, part) == pytest.approx(8 * getattr(one, part))
    # a byte for each number of one adapter, beside the two moments of four bytes: to which rank it belongs
    assert eight.optimizer == pytest.approx(8 * one.optimizer + one.optimizer / 8)
    alone = estimate_fast(SHAPE, config, Memory.balanced, length=256)
    assert one.adapter == pytest.approx(2 * alone.adapter)  # padded from rank 16 to 32


def test_the_memory_of_a_stack_is_what_was_measured():
    for row in json.loads(MEASURED.read_text())["rows"]:
        if row["system"] != "stack":
            continue
        length = int(row["case"].split(" x ")[1].split(",")[0])
        words = ["model=llama2_7b", "lora.r=8", "trainer.per_device_train_batch_size=1"]
        found = estimate_fast(
            SHAPE,
            compose_words(words),
            Memory(row["memory"]),
            length=length,
            num_rows=len(row["ranks"]),
            rank=max(row["ranks"]),
        )
        assert found.total == pytest.approx(row["peak_memory_gib"], rel=0.05)


def test_as_many_rows_as_fit():
    config = compose_words(["model=llama2_7b", "trainer.per_device_train_batch_size=4"])

    def rows(room_gib: float) -> int:
        return largest_stack(SHAPE, config, 16, length=512, room_gib=room_gib, most=8)

    assert [rows(room) for room in (5, 72, 200)] == [1, 8, 8]
    assert 1 < rows(24) < rows(40) < 8  # trainer.memory=balanced
    assert rows(12) > 1  # lean: what two rows need at balanced does not fit


def test_a_run_finds_its_random_numbers_and_its_log_as_it_left_them():
    drawn: dict[str, list[tuple[float, ...]]] = {"one": [], "two": []}
    began = Globals.taken()
    handlers = {name: logging.NullHandler() for name in drawn}

    def work(name: str) -> None:
        torch.manual_seed(1), np.random.seed(1), random.seed(1)
        for _ in range(3):
            assert logging.getLogger().handlers == [handlers[name]]
            drawn[name].append((torch.rand(1).item(), float(np.random.rand()), random.random()))
            turns[name].wait()

    turns = {
        name: Turn(lambda name=name: work(name), Globals(**vars(began) | {"handlers": [handlers[name]]}))
        for name in drawn
    }
    while not all(turn.has_ended for turn in turns.values()):
        for turn in turns.values():
            turn.resume()
            torch.rand(5), np.random.rand(5), random.random()
    assert drawn["one"] == drawn["two"]
    assert len({values[0] for values in drawn["one"]}) == 3
    assert logging.getLogger().handlers == began.handlers


def test_a_run_that_is_stopped_ends_with_what_stops_it():
    seen: list[BaseException] = []

    def work() -> None:
        try:
            turn.wait()
        except SystemExit as stop:
            seen.append(stop)

    turn = Turn(work, Globals.taken())
    turn.resume()
    assert not turn.has_ended
    turn.stop(SystemExit(143))
    assert turn.has_ended
    assert [stop.code for stop in seen] == [143]
