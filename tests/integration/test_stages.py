"""Several stages as one command: each goes on with the adapter before it, and a killed one is not begun again."""

import json

import pytest
from safetensors.torch import load_file

from .conftest import read_json, steps_logged

TINY = ["model=tiny", "dataset.max_train_rows=16", "dataset.max_eval_rows=4", "dataset.metrics=[]"]
WORDS = [*TINY, "trainer.per_device_train_batch_size=8", "trainer.save_steps=1", "trainer.logging_steps=1"]
SHORT_ANSWERS = "stages.grpo=['trainer=grpo','dataset=sample_rewards','trainer.max_completion_length=8']"

DPO = "'trainer=dpo','dataset=sample_preference'"


@pytest.fixture(scope="module")
def done(lab, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages") / "all"
    return lab.run(folder, *WORDS, "experiment=sft_then_dpo", "tracking=none")


def test_each_stage_is_a_run_that_goes_on_with_the_one_before(done):
    first, second = done / "1_sft", done / "2_dpo"
    locks = [read_json(folder / "run.json") for folder in (first, second)]
    assert [read_json(folder / "result.json")["status"] for folder in (first, second)] == ["ok", "ok"]
    assert [lock["config"]["trainer"]["name"] for lock in locks] == ["sft", "dpo"]
    assert [lock["config"]["model"]["adapter"] for lock in locks] == [None, str(first)]
    # the reference of DPO is the adapter that SFT left
    assert read_json(second / "result.json")["reward_margin_before"] == 0.0
    file = "adapter/adapter_model.safetensors"
    before, after = load_file(first / file), load_file(second / file)
    assert before.keys() == after.keys()
    assert all((after[name] - before[name]).abs().max() < 0.05 for name in before)
    assert any(not after[name].equal(before[name]) for name in before)


def test_stages_are_one_group_and_rows_of_one_table(lab, done):
    groups = {read_json(done / stage / "run.json")["config"]["tracking"]["group"] for stage in ("1_sft", "2_dpo")}
    assert groups == {"sft_then_dpo_all"}
    table = lab("compare", str(done), "--format", "json", cwd=done.parent)
    found = json.loads(table.stdout)
    assert [row["run"] for row in found["rows"]] == ["1_sft", "2_dpo"]
    assert found["ranked_by"] is None  # of two trainers, and nothing was measured of their answers
    assert "losses and rewards of trainers dpo, sft do not compare" in found["verdict"][0]


def test_a_stage_is_taken_away_and_done_again_like_any_run(lab, done, tmp_path):
    merged = lab("merge", str(done / "2_dpo"), "--to", str(tmp_path / "model"), cwd=tmp_path)
    assert merged.returncode == 0, merged.stderr
    again = lab("repro", str(done / "2_dpo"), "--check", cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr


def test_other_settings_are_refused_and_the_old_ones_kept(lab, done):
    kept = (done / "stages.json").read_bytes()
    words = [f"hydra.run.dir={done}", *WORDS, "experiment=sft_then_dpo", "tracking=none", "trainer.learning_rate=1"]
    again = lab(*words, cwd=done.parent)
    assert again.returncode == 2
    assert "stage sft: A resumed run keeps its settings, and these differ: trainer.learning_rate" in again.stderr
    assert (done / "stages.json").read_bytes() == kept
    assert lab(f"resume={done}", cwd=done.parent).returncode == 0


def test_stage_that_has_ended_is_not_done_again_after_a_kill(lab, tmp_path):
    folder = tmp_path / "run"
    words = [*WORDS, "experiment=sft_then_grpo", SHORT_ANSWERS, "tracking=none"]
    lab.killed(folder, *words, when=lambda: max(steps_logged(folder / "2_grpo"), default=0) >= 2, warm=True)
    first = (folder / "1_sft" / "result.json").stat().st_mtime_ns
    assert not (folder / "2_grpo" / "result.json").exists()
    again = lab(f"resume={folder}", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "has ended already" in again.stdout
    assert (folder / "1_sft" / "result.json").stat().st_mtime_ns == first
    result = read_json(folder / "2_grpo" / "result.json")
    assert result["status"] == "ok"
    assert steps_logged(folder / "2_grpo").count(result["num_steps"]) <= 2  # its last step, and what it measured then


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trainer=dpo"], "\"stages.dpo=['trainer=dpo','dataset=sample_preference'"),
        (["stages.dpo=[trainer=dpo]"], "Type \"stages.dpo=['trainer=dpo']\""),
        (["stages.dpo=['trainer=dop']"], "stage dpo: trainer=dop is no choice. Did you mean trainer=dpo?"),
        (["stages.dpo=trainer=dpo"], "Type \"stages.dpo=['trainer=dpo']\""),
        (["stages.dpo='trainer=dpo'"], "a stage is a list of words. Type \"stages.dpo=['trainer=dpo']\""),
        (["stages.dop=['trainer=dpo']"], "stages.dop is no stage of the experiment. Did you mean stages.dpo?"),
        (["stages={a:['trainer=dpo']}"], "stages.a is no stage of the experiment. Did you mean stages.sft?"),
        ([f"stages.dpo=[{DPO},'lora.r=4']"], "has lora.r=4. Type lora.r=16 for both"),
        (["stages.sft=['trainer=reward','dataset=sample_preference']"], "would go on with a reward model"),
        ([f"stages.dpo=[{DPO},'model.adapter=x']"], "stages.dpo: model.adapter=x, and a stage goes on with"),
        ([f"stages.dpo=[{DPO},'hydra.run.dir=x']"], "hydra.run.dir=x is nothing that a stage chooses"),
        ([f"stages.dpo=[{DPO},'resume=x']"], "resume=x is nothing that a stage chooses"),
        (["trainer.beta=0.2"], "trainer.beta=0.2 is no setting of trainer=sft"),
        (["-m", "search=lora_quant"], "A study searches one run"),
        (["-m", "seed=0,1", "hydra/launcher=stacked"], "Leave hydra/launcher=stacked out"),
    ],
)
def test_what_cannot_work_ends_before_anything_is_written(lab, tmp_path, words, said):
    done = lab("experiment=sft_then_dpo", "model=tiny", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
