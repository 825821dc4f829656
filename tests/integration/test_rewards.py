"""Reward models and trainers that learn from rewards, from the command to result.json."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llama_lab.errors import ModelError

from .conftest import TINY, read_json, steps_logged

WORDS = [*TINY, "tracking=none", "trainer.logging_steps=1"]
PAIRS = [*WORDS, "dataset=sample_preference", "dataset.metrics=[]"]
SAMPLING = [
    *WORDS,
    "dataset=sample_rewards",
    "dataset.metrics=[]",
    "trainer.max_completion_length=16",
    "evaluate.max_new_tokens=16",
]
OF_TRAINER = {
    "kto": [*PAIRS, "trainer=kto"],
    "orpo": [*PAIRS, "trainer=orpo"],
    "reward": [*PAIRS, "trainer=reward"],
    # two passes over the prompts, which TRL mixes anew for each
    "grpo": [*SAMPLING, "trainer=grpo", "trainer.rewards=[length]", "dataset.max_train_rows=5", "trainer.max_steps=10"],
    "rloo": [
        *SAMPLING,
        "trainer=rloo",
        "trainer.rewards=[length]",
        "dataset.max_train_rows=10",
        "trainer.max_steps=10",
    ],
}
ADAPTER = Path("adapter") / "adapter_model.safetensors"


@pytest.fixture(scope="module", params=list(OF_TRAINER))
def undisturbed(request, lab, tmp_path_factory) -> tuple[str, Path]:
    name = request.param
    words = [*OF_TRAINER[name], "trainer.num_train_epochs=2"]
    return name, lab.run(tmp_path_factory.mktemp(name) / "run", *words)


def test_killed_run_ends_bitwise_equal(lab, undisturbed, tmp_path):
    name, wanted = undisturbed
    assert read_json(wanted / "run.json")["config"]["quant"]["type"] == "nf4"
    folder = tmp_path / "run"
    last = read_json(wanted / "result.json")["num_steps"]
    words = [*OF_TRAINER[name], "trainer.num_train_epochs=2"]
    lab.killed(folder, *words, when=lambda: max(steps_logged(folder), default=0) >= last - 2, warm=True)
    assert list((folder / "checkpoints").glob("checkpoint-*"))
    done = lab(f"resume={folder}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one, other = (load_file(path / ADAPTER) for path in (wanted, folder))
    assert [name for name in one if not one[name].equal(other[name])] == []
    assert steps_logged(folder) == steps_logged(wanted)
    before, after = read_json(wanted / "result.json"), read_json(folder / "result.json")
    for key in ("eval_loss", "eval_loss_before", "reward_accuracy", "reward_margin", "reward", "num_steps"):
        assert after.get(key) == before.get(key)


@pytest.fixture(scope="module")
def reward_model(lab, tmp_path_factory) -> Path:
    """The better answer names a colour, the worse one a beast."""
    names = [("red", "cow"), ("blue", "dog"), ("green", "hen"), ("grey", "fox")]
    rows = [{"prompt": f"word {i}", "chosen": names[i % 4][0], "rejected": names[i // 4 % 4][1]} for i in range(128)]
    folder = tmp_path_factory.mktemp("reward")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["dataset=jsonl", f"dataset.path={folder / 'rows.jsonl'}", "dataset.max_train_rows=null"]
    return lab.run(folder / "run", *WORDS, "quant=none", "trainer=reward", *data, "trainer.num_train_epochs=3")


def test_a_reward_model_that_would_be_loaded_by_half_is_refused(reward_model, lab, tmp_path, monkeypatch):
    from llama_lab.reward_model import load_scorer

    monkeypatch.setenv("LLAMA_LAB_CACHE", lab.environment["LLAMA_LAB_CACHE"])
    own = shutil.copytree(reward_model, tmp_path / "run")
    file = own / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(read_json(file) | {"target_modules": ["q_proj"]}))
    with pytest.raises(ModelError, match=r"leaves .* out, and the weights have it"):
        load_scorer(str(own))


def test_reward_model_tells_held_out_pairs_apart(reward_model):
    result = read_json(reward_model / "result.json")
    assert result["reward_accuracy"] == 1.0
    assert result["reward_margin"] > result["reward_margin_before"] + 1
    assert result["eval_loss"] < 0.4 < result["eval_loss_before"]
    assert result["perplexity"] is None


def test_reward_model_loads_with_plain_peft_and_scores_as_here(reward_model, tmp_path):
    import torch
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoTokenizer

    from llama_lab.reward_model import load_scorer

    chat = [{"role": "user", "content": "word 1"}]
    ours = load_scorer(str(reward_model))([chat] * 2, ["green", "hen"])
    assert ours[0] > ours[1] + 0.5
    model = AutoPeftModelForSequenceClassification.from_pretrained(reward_model / "adapter", num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(reward_model / "adapter")
    model.config.pad_token_id = tokenizer.pad_token_id
    for answer, wanted in zip(("green", "hen"), ours, strict=True):
        ids = tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": answer}], return_dict=True)
        with torch.no_grad():
            score = model(input_ids=torch.tensor([ids["input_ids"]])).logits.item()
        assert score == pytest.approx(wanted, abs=0.05)  # a CPU may compute in bf16 here, and in fp32 there


def test_reward_model_begins_with_the_adapter_of_an_sft_run_and_a_new_score(lab, tiny_run, tmp_path):
    words = ["trainer=reward", "lora.r=4", "quant=nf4", "trainer.max_steps=1", "trainer.learning_rate=1e-9"]
    folder = lab.run(tmp_path / "run", *PAIRS, *words, f"model.adapter={tiny_run}")
    before, after = load_file(tiny_run / ADAPTER), load_file(folder / ADAPTER)
    assert [name for name in after if name not in before] == ["base_model.model.score.weight"]
    assert all((after[name] - before[name]).abs().max() < 1e-6 for name in before)
    assert any(value.abs().max() > 0 for name, value in before.items() if "lora_B" in name)  # it had learned
    scored = lab(
        *(f"hydra.run.dir={tmp_path / 'grpo'}", *SAMPLING, "trainer=grpo", "trainer.rewards=[reward_model]"),
        *(f"trainer.reward_model={folder}", "trainer.max_steps=1", "lora.r=4", f"model.adapter={tiny_run}"),
        cwd=tmp_path,
    )
    assert scored.returncode == 0, scored.stderr


def test_reward_model_writes_nothing_and_says_so(lab, reward_model):
    done = lab("generate", str(reward_model), "hello", cwd=reward_model.parent)
    assert done.returncode == 2
    assert "is a reward model: it scores answers and writes none" in done.stderr
    assert "trainer.rewards=[reward_model]" in done.stderr
    assert not (reward_model / "samples.md").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["trainer=grpo", "dataset=sample_rewards", "model.adapter={reward}"],
            "trainer.reward_model={reward} to learn",
        ),
        (
            ["trainer=grpo", "dataset=sample_rewards", "trainer.rewards=[reward_model]", "trainer.reward_model={sft}"],
            "is a run of trainer=sft, whose model scores nothing",
        ),
    ],
)
def test_a_model_of_the_other_kind_is_refused_before_anything_is_written(
    lab, reward_model, tiny_run, tmp_path, words, said
):
    folders = {"reward": reward_model, "sft": tiny_run}
    done = lab("model=tiny", *(word.format(**folders) for word in words), cwd=tmp_path)
    assert done.returncode == 2
    assert said.format(**folders) in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("trainer", ["grpo", "rloo"])
def test_answers_become_worth_more(lab, reward_model, tmp_path, trainer):
    """A function of the user's scores beside the reward model."""
    (tmp_path / "mine.py").write_text(
        "def odd(prompt, completion, answer):\n"
        "    return sum(ord(c) % 2 for c in completion) / max(1, len(completion))\n"
    )
    rewards = ["trainer.rewards=[mine:odd,reward_model]", f"trainer.reward_model={reward_model}"]
    words = ["trainer.reward_weights=[1,0.01]", "trainer.learning_rate=1e-2", "dataset.max_train_rows=64"]
    steps = ["trainer.max_steps=16", "trainer.save_steps=0", "trainer.beta=0.01", "trainer.num_generations=8"]
    steps += ["trainer.temperature=0.1"]  # random weights like all tokens nearly alike
    words = [*SAMPLING, f"trainer={trainer}", *rewards, *words, *steps]
    done = lab(f"hydra.run.dir={tmp_path / 'run'}", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rewards = [row["train/reward_odd"] for row in logged if "train/reward_odd" in row]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.1
    assert all("train/reward_model" in row for row in logged if "train/reward" in row)
    result = read_json(tmp_path / "run" / "result.json")
    assert result["reward_odd"] >= result["reward_odd_before"]


def test_prompts_alone_are_enough_for_a_reward_that_needs_no_answer(lab, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "word {i}"}}\n' for i in range(40)))
    (tmp_path / "mine.py").write_text(
        "def even(prompt, completion, answer):\n"
        "    assert prompt.startswith('word') and answer == ''\n"
        "    return sum(ord(c) % 2 == 0 for c in completion) / max(1, len(completion))\n"
    )
    rows = ["dataset=jsonl", f"dataset.path={tmp_path / 'rows.jsonl'}", "dataset.metrics=[composes]"]
    steps = [
        "trainer.max_steps=4",
        "trainer.max_completion_length=8",
        "evaluate.max_new_tokens=8",
        "trainer.eval_steps=2",
    ]
    words = [*WORDS, "trainer=rloo", *rows, *steps, "objective=reward", "quant=nf4"]
    done = lab(f"hydra.run.dir={tmp_path / 'run'}", *words, "trainer.rewards=[mine:even]", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = read_json(tmp_path / "run" / "result.json")
    assert (result["eval_loss"], result["perplexity"], result["composes"]) == (None, None, 0.0)
    assert result["objective"] == result["reward"] == result["reward_even"] >= 0
    assert "there is no held-out loss" in done.stdout
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("eval/reward" in row for row in logged)
    assert not any("eval/loss" in row for row in logged)
    evaluated = lab("evaluate", str(tmp_path / "run"), cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr


def test_prompts_alone_are_refused_before_anything_is_written_where_the_answer_is_needed(lab, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "word {i}"}}\n' for i in range(40)))
    words = ["model=tiny", "trainer=grpo", "dataset=jsonl", "dataset.path=rows.jsonl"]
    done = lab(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "trainer.rewards=exact_match: needs the answer of a row, and rows.jsonl holds prompts alone" in done.stderr
    search = ["trainer.rewards=[composes]", "-m", "search=lora_quant"]
    done = lab(*words, *search, cwd=tmp_path)
    assert done.returncode == 2
    assert "Type objective=reward hydra/sweeper/pruner=none" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_equal_answers_teach_nothing_and_the_run_says_so(lab, tmp_path):
    words = [*SAMPLING, "trainer=grpo", "trainer.rewards=[exact_match]", "trainer.max_steps=2"]
    done = lab(f"hydra.run.dir={tmp_path / 'run'}", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Nothing was learned" in done.stdout


def test_weights_that_are_no_longer_finite_end_the_run_with_what_to_type(lab, tmp_path):
    words = [*SAMPLING, "trainer=grpo", "trainer.rewards=[length]", "trainer.max_steps=4", "trainer.learning_rate=1e30"]
    done = lab(f"hydra.run.dir={tmp_path / 'run'}", *words, cwd=tmp_path)
    assert done.returncode != 0
    assert "Type a smaller trainer.learning_rate than 1e+30" in done.stderr
    assert "Traceback" not in done.stderr
    assert read_json(tmp_path / "run" / "result.json")["status"] != "ok"
