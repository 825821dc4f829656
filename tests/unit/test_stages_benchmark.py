"""benchmarks/stages.py: the requests by which it measures are ones that no run reads, and its table."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.stages import compared, fresh_rows
from llama_lab.data import sample, sample_rewards
from llama_lab.rewards import composes


def test_fresh_requests_are_in_no_data_set_and_have_a_right_and_a_wrong_command():
    rows = fresh_rows(300)
    known = {row["prompt"].lower() for rows in sample.build().values() for row in rows}
    known |= {row["prompt"].lower() for rows in sample_rewards.build_prompts().values() for row in rows}
    assert not known & {row["prompt"].lower() for row in rows}
    assert len({row["prompt"].lower() for row in rows}) == 300
    assert rows[:40] == fresh_rows(40)
    assert all(row["chosen"] != row["rejected"] for row in rows)
    assert all(composes("", row[name], "") for row in rows[:20] for name in ("chosen", "rejected"))


def test_second_stage_says_what_it_gained_and_what_it_lost():
    before = {"exact_match": [1.0, 1.0, 0.0, 0.0], "composes": [1.0] * 4}
    before |= {"chosen": torch.tensor([-1.0] * 4), "rejected": torch.tensor([-2.0] * 4)}
    after = {"exact_match": [1.0, 0.0, 1.0, 1.0], "composes": [1.0] * 4}
    after |= {"chosen": torch.tensor([-1.0] * 4), "rejected": torch.tensor([-4.0, -4.0, -4.0, -1.0])}
    assert compared(before, None) == {"num_rows": 4, "exact_match": 0.5, "composes": 1.0}
    found = compared(after, before)
    assert (found["exact_match"], found["exact_match_gained"], found["exact_match_lost"]) == (0.75, 2, 1)
    assert (found["reward_accuracy"], found["reward_margin"]) == (0.75, 1.25)


@pytest.fixture
def stages_table(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "docs")
    from render_stages import stages_table

    return stages_table


def row(seed: int, stage: str, fresh: dict, *more: str) -> dict:
    numbers = {"num_steps": 48, "stage_s": 30 + seed, "peak_memory_gib": 1.25, "at_once": 4, "commit": "0123456789"}
    told = {"card": "a card", "versions": {"torch": "2"}, "command": "python -m benchmarks.stages", "fresh": fresh}
    return {"case": ", ".join(["sft_then_dpo", f"seed {seed}", "nf4", "gpu", *more]), "system": stage} | numbers | told


def test_table_has_a_line_a_stage_over_its_seeds_and_leaves_out_what_was_tried(stages_table, tmp_path):
    shares = {"num_rows": 256, "composes": 0.75}
    gains = {"exact_match_gained": 9, "exact_match_lost": 4, "reward_accuracy": 0.9}
    rows = [
        row(1, "dpo", shares | gains | {"exact_match": 0.5}),
        row(0, "sft", shares | {"exact_match": 0.4}),
        row(1, "sft", shares | {"exact_match": 0.5}),
        row(0, "sft", shares | {"exact_match": 0.9}, "trainer.max_steps=2"),
    ]
    file = tmp_path / "stages.json"
    file.write_text(json.dumps({"schema": 1, "rows": rows}))
    lines = [line for line in stages_table(file).splitlines() if line.startswith("| `")]
    assert lines == [
        "| `sft_then_dpo`, nf4, gpu | sft | 2 | 45% (40% to 50%) |  | 75% |  | 48 | 30 (30 to 31) | 1.2 |",
        "| `sft_then_dpo`, nf4, gpu | dpo | 1 | 50% | 9, 4 | 75% | 90% | 48 | 31 | 1.2 |",
    ]


def test_table_is_empty_where_nothing_has_been_measured(stages_table, tmp_path):
    assert stages_table(tmp_path / "stages.json") == ""
