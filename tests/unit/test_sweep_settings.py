"""hydra.sweeper's own settings: typed, in range, and refused where they cannot work together."""

import optuna
import pytest
from omegaconf import OmegaConf

from llama_lab.errors import ConfigError
from llama_lab.sweep.methods import (
    PRUNER_OPTIONS,
    SAMPLER_OPTIONS,
    PrunerName,
    PrunerSettings,
    SamplerName,
    SamplerSettings,
)
from llama_lab.sweep.samplers import make_pruner, make_sampler
from llama_lab.sweep.settings import Direction, check_pruner, sweep_settings


def settings(**changed):
    node = {"sampler": {"name": "tpe"}, "pruner": {"name": "none"}} | changed
    return sweep_settings(OmegaConf.create(node))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"n_trials": 0}, "n_trials=0"),
        ({"n_jobs": 0}, "n_jobs=0"),
        ({"max_failure_rate": 1.5}, "from 0 to 1"),
        ({"study_name": "a/b"}, "study_name=a/b"),
        ({"objectives": ["eval_los"]}, "Did you mean eval_loss?"),
        ({"objectives": ["eval_loss", "reward", "eval_loss"]}, "eval_loss twice"),
        ({"constraints": {"peak_memory": 3.0}}, "peak_memory_gib"),
        ({"baselines": [3]}, "holds 3"),
        ({"heartbeat_s": 100.0}, "heartbeat_s"),
        ({"pruner": {"name": "median", "reduction_factor": 3}}, "belongs to successive_halving and hyperband"),
        ({"pruner": {"name": "hyperband", "reduction_factor": 1}}, "at least 2"),
        ({"sampler": {"name": "random", "multivariate": True}}, "belongs to tpe"),
        ({"sampler": {"name": "qmc", "qmc_type": "sobel"}}, "neither sobol nor halton"),
        ({"confirm_seeds": 1}, "confirm_seeds=1"),
    ],
)
def test_wrong_settings_are_refused(changed, said):
    with pytest.raises(ConfigError) as error:
        settings(**changed)
    assert said in str(error.value)


def test_direction_follows_the_objective_unless_it_is_said():
    names = ["eval_loss", "tokens_per_s", "peak_memory_gib"]
    assert settings().directions(names) == [Direction.minimize, Direction.maximize, Direction.minimize]
    assert settings(direction="maximize").directions(["eval_loss"]) == [Direction.maximize]
    assert settings(direction=["minimize", "maximize"]).directions(names[:2]) == ["minimize", "maximize"]
    for direction, said in [("minimise", "Did you mean minimize?"), (["minimize"], "2 entries")]:
        with pytest.raises(ConfigError) as error:
            settings(direction=direction).directions(names[:2])
        assert said in str(error.value)


def test_pruner_needs_one_objective_that_is_a_loss():
    pruned = settings(pruner={"name": "median"})
    check_pruner(pruned, ["eval_loss"], [Direction.minimize])
    for names, directions in [
        (["eval_loss", "tokens_per_s"], [Direction.minimize, Direction.maximize]),
        (["exact_match"], [Direction.maximize]),
    ]:
        with pytest.raises(ConfigError, match="pruner=none"):
            check_pruner(pruned, names, directions)
        check_pruner(settings(), names, directions)


@pytest.mark.parametrize("name", SamplerName)
def test_every_sampler_and_option_exists_in_optuna(name):
    values = {
        "n_startup_trials": 5,
        "n_ei_candidates": 9,
        "multivariate": True,
        "population_size": 4,
        "qmc_type": "halton",
    }
    options = {option: values[option] for option in SAMPLER_OPTIONS[name]}
    assert make_sampler(SamplerSettings(name=name, **options), seed=1, number=2) is not None


@pytest.mark.parametrize("name", PrunerName)
def test_every_pruner_and_option_exists_in_optuna(name):
    options = dict.fromkeys(PRUNER_OPTIONS[name], 4)
    assert make_pruner(PrunerSettings(name=name, **options), 2, 20) is not None
    assert make_pruner(PrunerSettings(name=name), 2, 20) is not None


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"name": "none"}, []),
        ({"name": "median"}, [8, 16, 24, 32, 40, 48, 56]),
        ({"name": "successive_halving"}, [8, 32]),
        ({"name": "successive_halving", "reduction_factor": 2, "num_measurements": 16}, [4, 8, 16, 32]),
        ({"name": "successive_halving", "reduction_factor": 3, "min_resource": 5}, [5, 15, 45]),
        ({"name": "successive_halving", "reduction_factor": 2, "min_early_stopping_rate": 1}, [16, 32]),
        ({"name": "hyperband"}, [8, 24]),
        ({"name": "successive_halving", "min_resource": 64}, []),
    ],
    ids=str,
)
def test_losses_are_measured_where_the_pruner_judges(options, steps):
    pruner = PrunerSettings(**options | {"name": PrunerName(options["name"])})
    assert pruner.measured_steps(64) == steps
    if options["name"] != "successive_halving":
        return
    study = optuna.create_study(pruner=make_pruner(pruner, pruner.first_step(64), 64))
    measured_everywhere(study.ask(), 0.0, 63)
    assert [step for step in range(1, 64) if measured_everywhere(study.ask(), 1.0, step).should_prune()] == steps


def measured_everywhere(trial, loss, until):
    for step in range(1, until + 1):
        trial.report(loss, step)
    return trial
