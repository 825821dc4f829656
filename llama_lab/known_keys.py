"""The settings by their dotted names: which there are, which was probably meant, and what they take."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, cast, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf

from llama_lab.config import RunConfig
from llama_lab.errors import ConfigError, did_you_mean, nearest
from llama_lab.paths import CONF_DIR
from llama_lab.sweep.methods import PREFIX
from llama_lab.sweep.settings import SweepSettings

ALIASES = {
    "rank": "lora.r",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "alpha": "lora.alpha",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "init_lora_weights": "lora.init",
    "load_in_4bit": "quant.type",
    "load_in_8bit": "quant.type",
    "bnb_4bit_quant_type": "quant.type",
    "bnb_4bit_use_double_quant": "quant.double_quant",
    "bnb_4bit_compute_dtype": "quant.compute_dtype",
    "torch_dtype": "quant.compute_dtype",
    "dtype": "quant.compute_dtype",
    "model_name_or_path": "model.name",
    "base_model": "model.name",
    "dataset_name": "dataset.name",
    "data_path": "dataset.path",
    "max_seq_length": "dataset.max_length",
    "cutoff_len": "dataset.max_length",
    "lr": "trainer.learning_rate",
    "epochs": "trainer.num_train_epochs",
    "num_epochs": "trainer.num_train_epochs",
    "steps": "trainer.max_steps",
    "batch_size": "trainer.per_device_train_batch_size",
    "warmup_steps": "trainer.warmup_ratio",
    "optimizer": "trainer.optim",
    "scheduler": "trainer.lr_scheduler_type",
    "grad_clip": "trainer.max_grad_norm",
    "random_seed": "seed",
    "report_to": "tracking.backend",
    "run_name": "tracking.name",
    "wandb_project": "tracking.project",
    "resume_from_checkpoint": "resume",
    "output_dir": "hydra.run.dir",
    "n_trials": "hydra.sweeper.n_trials",
    "n_jobs": "hydra.sweeper.n_jobs",
    "confirm": "hydra.sweeper.confirm",
    "storage": "hydra.sweeper.storage",
    "study_name": "hydra.sweeper.study_name",
}
"""Words of other tools, and what they are called here."""


OPEN_KEYS = tuple(f"{PREFIX}{name}" for name in ("params", "multiples", "only_if", "constraints"))
"""Settings of a study that hold names of the user's, which Hydra takes behind a + alone."""


def known_keys(node: Any = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every group and setting of the schema by its dotted name, such as `lora` and `lora.r`."""
    for name, hint in get_type_hints(node).items():
        if name.startswith("_"):
            continue
        yield prefix + name
        if is_dataclass(hint):
            yield from known_keys(hint, f"{prefix}{name}.")


def nearest_key(key: str) -> str | None:
    """The setting that was probably meant: another tool's word, the same last name elsewhere, or a like spelling."""
    leaf = key.split(".")[-1]
    if key.startswith(PREFIX):
        keys = list(known_keys(SweepSettings, PREFIX))
        same_leaf = [k for k in keys if k.split(".")[-1] == leaf]
        return same_leaf[0] if same_leaf else nearest(key, keys)
    if leaf in ALIASES:
        return ALIASES[leaf]
    keys = [*known_keys(), "hydra.run.dir", "hydra.sweep.dir", "experiment"]
    keys += ["hydra.launcher", "hydra.launcher.rows", "hydra.sweeper"]
    same_leaf = [k for k in keys if "." in k and k.split(".")[-1] == leaf and not k.startswith("model.")]
    return same_leaf[0] if same_leaf else nearest(key, keys)


def unknown_key(key: str) -> ConfigError:
    """The error for a setting that does not exist, with the one that was probably meant."""
    if key == "stages" or key.startswith("stages."):
        return _no_stage(key)
    found = nearest_key(key)
    if found == key == "hydra.launcher.rows":
        return ConfigError(f"{key} belongs to stacks. Type hydra/launcher=stacked as well.")
    if found in OPEN_KEYS and found == key:
        return ConfigError(f"{key}: what it is to hold is not there yet. Type +{key}=... and hydra/sweeper=optuna.")
    if found == key and key.startswith(PREFIX):
        return ConfigError(f"{key} belongs to a study. Type hydra/sweeper=optuna as well, or search=lora_quant.")
    hint = f" Did you mean {found}?" if found else ""
    shown = "search=lora_quant --cfg hydra" if key.startswith(PREFIX) else "--cfg job"
    return ConfigError(f"{key} is no setting of llama_lab.{hint} All of them: python -m llama_lab {shown}")


def _no_stage(key: str) -> ConfigError:
    """The error for a stage that the experiment does not have; those of the shipped ones are known."""
    files = sorted((CONF_DIR / "experiment").glob("*.yaml"))
    names = {f"stages.{name}" for file in files for name in cast(DictConfig, OmegaConf.load(file)).get("stages", {})}
    return ConfigError(
        f"{key} is no stage of the experiment.{did_you_mean(key, sorted(names))} The file of an experiment names its "
        "stages; on the command line the words of one are typed \"stages.NAME=['trainer=dpo','trainer.beta=0.5']\"."
    )


def field_type(key: str) -> Any:
    """The declared type of a setting by its dotted name; None for a name that is none."""
    node, key = _root(key)
    for part in key.split("."):
        if not is_dataclass(node) or part not in {f.name for f in fields(node)}:
            return None
        node = get_type_hints(node)[part]
    if get_origin(node) is UnionType:
        node = next(arg for arg in get_args(node) if arg is not type(None))
    return node


def default_of(key: str) -> Any:
    """The default of a setting by its dotted name."""
    node, key = _root(key)
    *groups, name = key.split(".")
    for group in groups:
        node = get_type_hints(node)[group]
    return next(f.default for f in fields(node) if f.name == name)


def _root(key: str) -> tuple[Any, str]:
    """The schema that holds a setting, and its name in there."""
    return (SweepSettings, key.removeprefix(PREFIX)) if key.startswith(PREFIX) else (RunConfig, key)
