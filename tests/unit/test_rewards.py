"""Rewards: what they are worth, how they are found, and what is refused before anything is loaded."""

import json
import sys

import pytest

from llama_lab.choices import DataFormat, TrainerName
from llama_lab.compose import compose_words
from llama_lab.data import sample, sample_rewards
from llama_lab.errors import LlamaLabError
from llama_lab.rewards import COMMAND, REWARDS, find_reward, import_rewards

GRPO = ["model=tiny", "trainer=grpo", "dataset=sample_rewards"]


@pytest.mark.parametrize(
    ("name", "completion", "worth"),
    [
        ("composes", f"{COMMAND} lora.r=8", 1),
        ("composes", f"  {COMMAND} lora.r=8\n", 1),
        ("composes", f"{COMMAND} lora.r=eight", 0),
        ("composes", f"{COMMAND} dataset=jsonl dataset.path={'a' * 400}.jsonl", 0),
        ("composes", f"{COMMAND} 'lora.r=8", 0),
        ("composes", "lora.r=8", 0),
        ("composes", "", 0),
        ("exact_match", " the answer ", 1),
        ("exact_match", "The answer", 0),
        ("length", "ten signs.", 1),
        ("length", "five!", 0.5),
        ("length", "twenty signs and so.", 0.5),
        ("length", "", 0),
    ],
)
def test_answers_are_worth_what_their_reward_says(name, completion, worth):
    assert REWARDS[name]("a prompt", completion, "the answer") == worth


@pytest.mark.parametrize("split", ["train", "valid"])
def test_shipped_file_is_what_build_gives(split):
    built = sample.to_jsonl(sample_rewards.build_prompts()[split])
    assert sample_rewards.path_of(split).read_bytes() == built.encode()


def test_no_prompt_is_one_that_sample_trains_on():
    asked = {row["prompt"].lower() for row in sample.build()["train"]}
    rows = [json.loads(line) for line in sample_rewards.path_of("train").read_text().splitlines()]
    assert len(rows) > 500
    assert not asked & {row["prompt"].lower() for row in rows}
    assert all(REWARDS["composes"]("", row["answer"], "") for row in rows[:40])


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's, which says on standard output that it is imported."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "rewards.py").write_text(
        "print('imported')\ndef short(prompt, completion, answer): return 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_function_of_the_users_is_found_without_an_import(mine, capsys):
    compose_words([*GRPO, "trainer.rewards=[length,mine.rewards:short]"])
    assert "mine.rewards" not in sys.modules
    assert capsys.readouterr().out == ""
    assert find_reward("mine.rewards:short")("a", "b", "c") == 1


def test_functions_that_a_module_defines_under_a_condition_are_found(mine):
    (mine / "more.py").write_text(
        "try:\n    import nothing\n    def one(p, c, a): return 1\n"
        "except ImportError:\n    def two(p, c, a): return 2\n"
        "if True:\n    from math import *\n    three: object = two\n"
    )
    for name in ("one", "two", "three", "sqrt"):
        compose_words([*GRPO, f"trainer.rewards=[more:{name}]"])


@pytest.mark.parametrize("failing", ["raise SystemExit(3)", "raise ValueError('a\\nb')", "return [1, 2]"])
def test_a_function_that_fails_is_one_message(mine, failing):
    (mine / "wrong.py").write_text(f"def one(prompt, completion, answer):\n    {failing}\n")
    from llama_lab.policy_trainer import worth_of

    worth = worth_of("wrong:one", compose_words([*GRPO, "trainer.rewards=[wrong:one]"]).trainer)
    with pytest.raises(
        LlamaLabError, match=r"wrong:one failed on the answer 'b': .* \(prompt, completion, answer\)"
    ) as e:
        worth([[{"role": "user", "content": "a"}]], ["b"], [""])
    assert "\n" not in str(e.value)
    sys.modules.pop("wrong")


def test_a_module_that_ends_the_process_is_one_message(mine):
    (mine / "ends.py").write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(LlamaLabError, match="ends cannot be imported: SystemExit: 3"):
        import_rewards(["length", "reward_model", "ends:one"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trainer.rewards=[compose]"], "Did you mean composes?"),
        (["trainer.rewards=[]"], "Type trainer.rewards=[length]"),
        (["trainer.rewards=null"], "Type trainer=grpo, whose file"),
        (["trainer.rewards=[length,length]"], "trainer.rewards names length twice"),
        (["trainer.rewards=[length]", "trainer.reward_weights=[1,2]"], "Type one number for each"),
        (["trainer.rewards=[mine.rewards:shrt]"], "Did you mean mine.rewards:short?"),
        (["trainer.rewards=[mine.reward:short]"], "there is no module mine.reward"),
        (["trainer.rewards=[reward_model]"], "Type trainer.reward_model=FOLDER"),
        (["trainer.reward_model=nowhere"], "Type trainer.rewards=[reward_model]"),
        (["trainer.rewards=[reward_model]", "trainer.reward_model=nowhere"], "nowhere is not there"),
        (["trainer.rewards=[length]", "trainer.reward_weights=[nan]"], "type a finite number for each reward"),
        (["trainer.rewards=[length]", "trainer.reward_weights=[a]"], "not a list of numbers"),
        (["trainer.rewards=[length,mine.rewards:length]"], "would both be reward_length in result.json"),
        (["trainer.num_generations=1"], "type at least 2"),
        (["trainer.num_generations=3"], "Type trainer.per_device_train_batch_size=3, or trainer.num_generations=2|4|8"),
        (["trainer.max_completion_length=0"], "type at least 1"),
        (["trainer.temperature=0"], "type a positive number"),
        (["trainer.beta=-1"], "type 0, or a positive number"),
        (["trainer.loss_type=sigmoid"], "It has: grpo, bnpo, dr_grpo, dapo"),
        (["trainer.group_by_length=true"], "Type trainer.group_by_length=false"),
        (["trainer.beta=0.1", "quant=none", "lora=pissa"], "Type lora.init=default"),
        (["dataset=sample_preference"], "Type trainer=dpo, or dataset=sample_rewards"),
        (["trainer.normalize_advantages=true"], "Type trainer=rloo as well"),
        (["objective=reward_margin"], "Type trainer=dpo|kto|orpo|reward"),
    ],
)
def test_what_cannot_work_says_what_to_type(mine, words, said):
    with pytest.raises(LlamaLabError) as caught:
        compose_words([*GRPO, *words])
    assert said in str(caught.value)


def test_rows_without_a_prompt_are_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n' * 3)
    with pytest.raises(LlamaLabError, match="Type dataset=sample_rewards"):
        compose_words(["trainer=grpo", "dataset=jsonl", f"dataset.path={tmp_path / 'rows.jsonl'}"])


# prompts alone


@pytest.fixture
def prompts(tmp_path):
    """Words that read a file of prompts without answers."""

    def write(**more):
        rows = [{"prompt": f"word {i}", **more} for i in range(20)]
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return ["model=tiny", "trainer=grpo", "dataset=jsonl", f"dataset.path={tmp_path / 'prompts.jsonl'}"]

    return write


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            [],
            "trainer.rewards=exact_match: needs the answer of a row, and {file} holds prompts alone, without a column "
            "completion. Type trainer.rewards=[composes], or dataset.columns.completion=COLUMN",
        ),
        (["trainer.rewards=[length,exact_match]"], "trainer.rewards=length,exact_match: needs the answer"),
        (["trainer.rewards=[length]"], "Type trainer.rewards=[package.module:function], or"),
        (
            ["trainer.rewards=[length,composes]", "trainer.reward_weights=[1,2]"],
            "Type trainer.rewards=[composes] trainer.reward_weights=[2], or",
        ),
        (
            ["trainer.rewards=[composes]", "dataset.metrics=[exact_match,composes]"],
            "dataset.metrics=exact_match: needs the answer of a row, and {file} holds prompts alone",
        ),
        (["trainer.rewards=[composes]", "objective=perplexity"], "Type objective=reward, or"),
    ],
)
def test_reward_that_needs_an_answer_is_refused_for_prompts_alone(prompts, tmp_path, words, said):
    with pytest.raises(LlamaLabError) as caught:
        compose_words([*prompts(), *words])
    assert said.format(file=tmp_path / "prompts.jsonl") in str(caught.value)


def test_rewards_that_need_no_answer_take_prompts_alone(prompts, mine):
    rewards = "trainer.rewards=[composes,mine.rewards:short]"
    assert compose_words([*prompts(), rewards]).trainer.rewards == ["composes", "mine.rewards:short"]


def test_answers_of_some_rows_are_not_lost(tmp_path):
    rows = [{"prompt": f"word {i}", **({"completion": "x"} if i == 30 else {})} for i in range(40)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [*GRPO[:2], "dataset=jsonl", f"dataset.path={file}", "trainer.rewards=[composes]"]
    with pytest.raises(LlamaLabError, match=r"row 31: column completion holds an answer.*Type dataset\.format=prompt"):
        compose_words(words)
    assert compose_words([*words, "dataset.format=prompt"]).dataset.format is DataFormat.prompt


def test_answers_under_another_name_are_not_overlooked(prompts):
    words = prompts(answer="x")
    with pytest.raises(
        LlamaLabError, match=r"a column answer beside prompt\. Type dataset\.columns\.completion=answer"
    ):
        compose_words([*words, "trainer.rewards=[composes]"])
    assert compose_words([*words, "dataset.columns.completion=answer"]).trainer.rewards == ["composes", "exact_match"]
    compose_words([*words, "trainer.rewards=[composes]", "dataset.format=prompt"])


@pytest.mark.parametrize("trainer", ["sft", "dpo", "reward"])
def test_prompts_alone_are_for_trainers_that_answer_themselves(prompts, trainer):
    with pytest.raises(LlamaLabError, match=r"a prompt and no answer\. Prompts alone are for trainer=grpo and rloo"):
        compose_words([*prompts(), f"trainer={trainer}"])


@pytest.mark.parametrize(
    "prompt", ["France?", [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "France?"}]]
)
def test_prompts_alone_are_read_as_at_inference_and_pass_the_checks(tiny_tokenizer, tmp_path, prompt):
    from llama_lab.data.answers import asked_and_wanted
    from llama_lab.data.audit import audit
    from llama_lab.data.findings import Level
    from llama_lab.data.splits import build_splits
    from llama_lab.data.templates import encode_prompt
    from llama_lab.dataset_config import DatasetSettings

    long = {"prompt": "word " * 200}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [{"prompt": prompt}] * 8 + [long]))
    dataset = DatasetSettings(path=str(tmp_path / "rows.jsonl"), max_length=100)
    dataset.max_duplicate_share = dataset.max_leak_share = 1.0
    splits = build_splits(dataset, tiny_tokenizer, seed=0, trainer=TrainerName.grpo)
    messages, wanted = asked_and_wanted(splits.train.examples[0])
    assert (messages[-1], wanted) == ({"role": "user", "content": "France?"}, "")
    assert splits.train.tokens[0]["input_ids"] == encode_prompt(messages, tiny_tokenizer)
    assert splits.train.counts.num_dropped + splits.valid.counts.num_dropped == 1  # half a question is none
    findings = audit(splits, tiny_tokenizer, dataset, vocab_size=len(tiny_tokenizer))
    assert [found.message for found in findings if found.level is Level.failure] == []
