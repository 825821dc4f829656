"""benchmarks/stages.py: the requests by which it measures are ones that no run reads."""

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
