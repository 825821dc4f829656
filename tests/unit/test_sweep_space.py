"""The search space: Hydra's words in, points and Hydra's words out."""

import math

import optuna
import pytest

from llama_lab.errors import ConfigError
from llama_lab.sweep.space import parse_space


def draws(space, num=40, seed=0):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return [space.draw(study.ask()) for _ in range(num)]


@pytest.mark.parametrize(
    ("word", "described", "drawn"),
    [
        ("lora.r=8,16", "choice(8,16)", {8, 16}),
        ("lora.r=choice(8,16)", "choice(8,16)", {8, 16}),
        ("lora.r=range(8,20,4)", "int interval(8,16) step 4", {8, 12, 16}),
        ("lora.r=interval(1,3)", "int interval(1,3)", {1, 2, 3}),
        ("quant=nf4,fp4", "choice(nf4,fp4)", {"nf4", "fp4"}),
        ("trainer.group_by_length=true,false", "choice(true,false)", {True, False}),
        ("lora.target_modules=all-linear,[q_proj,v_proj]", None, {"all-linear", '["q_proj", "v_proj"]'}),
        ("lora.dropout=range(0,0.25,0.1)", "interval(0,0.2) step 0.1", {0.0, 0.1, 0.2}),
    ],
)
def test_words_of_hydra_become_dimensions(word, described, drawn):
    space = parse_space({}, [word])
    key = word.partition("=")[0]
    assert described in (None, space.describe()[key])
    assert {point[key] for point in draws(space)} == drawn


def test_log_interval_is_drawn_on_a_log_scale_and_typed_exactly():
    space = parse_space({}, ["trainer.learning_rate=tag(log,interval(3e-5,1e-3))"])
    points = draws(space, num=300)
    values = sorted(point["trainer.learning_rate"] for point in points)
    assert 3e-5 <= values[0] < values[-1] <= 1e-3
    assert 1.2e-4 < values[150] < 2.5e-4  # the geometric middle is 1.7e-4, the arithmetic one 5e-4
    word = space.words(points[0])[0]
    assert float(word.partition("=")[2]) == points[0]["trainer.learning_rate"]


def test_command_line_goes_over_the_yaml():
    space = parse_space({"lora.r": "choice(8,16)", "quant": ["nf4", "none"], "seed": 3}, ["lora.r=4", "seed=1,2"])
    assert space.describe() == {"quant": "choice(nf4,none)", "seed": "choice(1,2)"}
    assert space.fixed == ("lora.r=4",)


def test_words_of_lists_and_texts_are_read_back_by_hydra():
    words = ["lora.target_modules=[q_proj,v_proj],[k_proj]", "dataset.system_prompt='a, b','it is'"]
    space = parse_space({}, words)
    again = parse_space({}, space.words(draws(space, num=1)[0]))
    assert not again.dimensions
    assert len(again.fixed) == 2


def test_alpha_is_a_factor_of_the_rank():
    space = parse_space(
        {"lora.alpha": "choice(0.5,2)", "lora.r": "choice(8,16)"}, [], multiples={"lora.alpha": "lora.r"}
    )
    assert [d.name for d in space.dimensions] == ["lora.r", "lora.alpha/lora.r"]
    for point in draws(space):
        words = dict(word.split("=") for word in space.words(point))
        assert float(words["lora.alpha"]) == point["lora.alpha/lora.r"] * point["lora.r"]
    fixed = parse_space({"lora.alpha": "choice(0.5,2)"}, ["lora.r=64"], multiples={"lora.alpha": "lora.r"})
    assert {tuple(fixed.words(point)) for point in draws(fixed)} == {("lora.alpha=32",), ("lora.alpha=128",)}


CONDITIONAL = {"quant": "choice(nf4,int8,none)", "quant.double_quant": "choice(true,false)", "lora.r": "choice(8,16)"}
ONLY_IF = {"quant.double_quant": {"quant": ["nf4"]}}


def test_conditional_setting_is_drawn_where_its_condition_holds():
    points = draws(parse_space(CONDITIONAL, [], only_if=ONLY_IF))
    assert {point["quant"] for point in points} == {"nf4", "int8", "none"}
    assert all(("quant.double_quant" in point) == (point["quant"] == "nf4") for point in points)


@pytest.mark.parametrize(("fixed", "drawn"), [("quant=nf4", True), ("quant=int8", False)])
def test_condition_on_a_fixed_word(fixed, drawn):
    points = draws(parse_space(CONDITIONAL, [fixed], only_if=ONLY_IF))
    assert {"quant.double_quant" in point for point in points} == {drawn}


def test_checked_points_show_every_choice_and_both_ends_within_the_conditions():
    space = parse_space(CONDITIONAL | {"trainer.learning_rate": "interval(1e-5,1e-3)"}, ["model=tiny"], only_if=ONLY_IF)
    runs = space.check_points()
    assert len(runs) <= 4
    words = {word for run in runs for word in run}
    assert words >= {"quant=nf4", "quant=int8", "quant=none", "quant.double_quant=true", "quant.double_quant=false"}
    assert words >= {"lora.r=8", "lora.r=16", "trainer.learning_rate=1e-05", "trainer.learning_rate=0.001"}
    assert all("model=tiny" in run for run in runs)
    assert all("quant=nf4" in run for run in runs if any(word.startswith("quant.double") for word in run))


def test_chain_of_conditions_is_covered_and_ends():
    space = parse_space(
        {"a": "choice(1,2)", "b": "choice(3,4)", "c": "choice(5,6)"}, [], only_if={"b": {"a": [2]}, "c": {"b": [4]}}
    )
    words = {word for run in space.check_points() for word in run}
    assert words == {"a=1", "a=2", "b=3", "b=4", "c=5", "c=6"}
    never = parse_space({"a": "choice(1,2)", "b": "choice(3,4)"}, [], only_if={"b": {"a": [2, 1]}})
    assert len(never.check_points()) == 2


@pytest.mark.parametrize(
    ("params", "arguments", "options", "said"),
    [
        ({}, ["lora.r=tag(lgo,interval(1,2))"], {}, "Did you mean log?"),
        ({}, ["lora.dropout=tag(log,interval(0,1))"], {}, "above 0"),
        ({}, ["lora.r=interval(8,4)"], {}, "interval(4,8)"),
        ({}, ["lora.r=choice(8,"], {}, "not closed"),
        ({"lora.r": "choise(8,16)"}, [], {}, "choise"),
        ({"lora.r": [8]}, [], {"multiples": {"lora.alfa": "lora.r"}}, "lora.alfa"),
        ({"lora.r": [8]}, [], {"only_if": {"lora.r": {"qant": ["nf4"]}}}, "neither searched nor typed"),
        (
            {"lora.r": [8], "quant": ["nf4"]},
            [],
            {"only_if": {"lora.r": {"quant": ["nf5"]}}},
            "none of its choices: nf4",
        ),
        ({"a": [1], "b": [2]}, [], {"only_if": {"a": {"b": [2]}, "b": {"a": [1]}}}, "hang on each other"),
        ({"a": [1]}, [], {"only_if": {"a": 3}}, "needs a setting and its values"),
        ({"lora.r": [8, math.nan]}, [], {}, "nan is no value"),
        ({}, ["lora.r=range(0,inf)"], {}, "finite"),
        ({}, ["lora.r=tag(log,range(8,65))"], {}, "lora.r=tag(log,interval(LOW,HIGH))"),
        ({}, ["lora.r=tag(log,choice(8,64))"], {}, "only an interval has a tag"),
        ({"lora": {"r": "choice(8,16)"}}, [], {}, '{lora.r: "choice(8,16)"}'),
        ({"lora.alpha": [1]}, ["quant=nf4"], {"multiples": {"lora.alpha": "quant"}}, "quant=nf4 is no number"),
        ({"lora.alpha": [1, False], "lora.r": [8]}, [], {"multiples": {"lora.alpha": "lora.r"}}, "=False is no number"),
    ],
)
def test_wrong_spaces_are_refused(params, arguments, options, said):
    with pytest.raises(ConfigError) as error:
        parse_space(params, arguments, **options)
    assert said in str(error.value)


def test_null_is_a_choice_of_a_list():
    words = [run[0] for run in parse_space({"dataset.max_length": [512, None]}, []).check_points()]
    assert words == ["dataset.max_length=512", "dataset.max_length=null"]


def test_choices_of_the_command_line_may_leave_no_value_of_a_condition():
    space = parse_space(CONDITIONAL, ["quant=choice(int8,none)"], only_if={"quant.double_quant": {"quant": ["nf4"]}})
    words = {word for run in space.check_points() for word in run}
    assert {"quant=int8", "quant=none"} < words
    assert not any(word.startswith("quant.double_quant") for word in words)


def test_baselines_name_searched_settings_and_their_values():
    space = parse_space(
        {"lora.r": [8, 16], "lora.alpha": [1, 2], "trainer.learning_rate": "interval(1e-5,1e-3)"},
        [],
        multiples={"lora.alpha": "lora.r"},
    )
    point = space.check_baseline({"lora.r": 8, "lora.alpha": 2, "trainer.learning_rate": 1e-4})
    assert point == {"lora.r": 8, "lora.alpha/lora.r": 2, "trainer.learning_rate": 1e-4}
    for wrong, said in [
        ({"lora.rr": 8}, "Did you mean lora.r?"),
        ({"lora.r": 9}, "8, 16"),
        ({"trainer.learning_rate": 1}, "outside"),
        ({"trainer.learning_rate": None}, "outside"),
        ({"trainer.learning_rate": [1e-4]}, "outside"),
    ]:
        with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
            space.check_baseline(wrong)


def test_a_baseline_of_whole_numbers_is_one_that_can_be_drawn():
    space = parse_space(
        {"lora.r": "range(4,17,4)", "lora.alpha": "interval(1,9)", "trainer.max_steps": "interval(5,9)"}, []
    )
    assert space.check_baseline({"lora.r": 12, "lora.alpha": 2.5, "trainer.max_steps": 7})
    for wrong in ({"lora.r": 6}, {"lora.r": 12.5}, {"trainer.max_steps": 5.5}, {"trainer.max_steps": True}):
        with pytest.raises(ConfigError, match="outside"):
            space.check_baseline(wrong)


def test_baselines_and_conditions_of_the_yaml_yield_to_the_command_line():
    params = CONDITIONAL | {"trainer.learning_rate": "interval(1e-5,1e-3)"}
    words = ["lora.r=4", "quant=choice(nf4,none)", "trainer.learning_rate=interval(1e-2,1e-1)"]
    space = parse_space(params, words, only_if={"quant.double_quant": {"quant": ["nf4", "int8"]}})
    point = {"lora.r": 8, "quant": "nf4", "quant.double_quant": True, "trainer.learning_rate": 1e-4}
    assert space.check_baseline(point) == {"quant": "nf4", "quant.double_quant": True}
