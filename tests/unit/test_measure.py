import pytest

from llama_lab.compose import compose_words
from llama_lab.data.splits import build_splits
from llama_lab.lora import add_adapter
from llama_lab.measure import Evaluator
from llama_lab.model import load_base, load_tokenizer

ROWS = ["model=tiny", "quant=none", "dataset.max_train_rows=8", "dataset.max_eval_rows=4", "evaluate.max_new_tokens=9"]


def measured(words):
    config = compose_words([*ROWS, *words])
    tokenizer = load_tokenizer(config.model)
    model = add_adapter(load_base(config.model, config.quant), config.lora, seed=0).eval()
    splits = build_splits(config.dataset, tokenizer, seed=0)
    evaluator = Evaluator(
        config=config, model=model, adapter_name="default", tokenizer=tokenizer, splits=splits, prepared=None
    )
    return evaluator, evaluator.measure(["exact_match"])


@pytest.mark.parametrize(
    "words",
    [
        ["generation.max_new_tokens=3"],
        ["generation.max_new_tokens=20"],
        ["generation.repetition_penalty=3"],
        ["generation.max_new_tokens=null", "generation.max_length=400"],
    ],
)
def test_samples_are_answered_as_generation_says_whatever_scores_say(words):
    evaluator, found = measured(words)
    _, unscored = measured([*words, "dataset.metrics=[]"])
    assert found.answers == evaluator.measure([]).answers == unscored.answers
    assert found.answers != [answer.strip() for answer in found.score.answers[:3]]


def test_prompts_that_were_scored_alike_are_not_asked_again():
    evaluator, found = measured(["generation.max_new_tokens=9"])
    assert found.answers == evaluator.measure([]).answers == [answer.strip() for answer in found.score.answers[:3]]
