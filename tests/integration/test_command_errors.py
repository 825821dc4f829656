"""Hostile command lines: one message with what, where and what to type; exit code 2; nothing written or loaded."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "wandb", "bitsandbytes")

# The command's words, and what the message must hold. Files are made by `files` below.
CASES = [
    # keys
    ("lora.rr=8", ["lora.rr", "lora.r"]),
    ("+lora.rr=8", ["lora.rr", "lora.r"]),
    ("++lora.rr=8", ["lora.rr", "lora.r"]),
    ("modle=tiny", ["modle", "model"]),
    ("dataset.nme=x", ["dataset.nme", "dataset.name"]),
    ("rank=8", ["rank", "lora.r"]),
    ("lr=1e-4", ["lr", "trainer.learning_rate"]),
    ("trainer.per_device_train_batch_size=1000000000", ["out of range", "65536"]),
    ("trainer.num_train_epochs=1e300", ["trainer.num_train_epochs", "10000"]),
    ("dataset.max_eval_rows=99999999999999999999999", ["dataset.max_eval_rows", "null for all rows"]),
    ("-m lora.r=range(1,10,0)", ["lora.r=range(1,10,0)", "range(FIRST,END,STEP)"]),
    ("-m search=lora_lr lora.r=range(1,10,0)", ["lora.r=range(1,10,0)", "range(FIRST,END,STEP)"]),
    ("-m search=lora_lr lora.r=range(8,8)", ["lora.r=range(8,8)", "no value to choose from"]),
    ("-m lora.r=range(8,8)", ["lora.r=range(8,8)", "no value to choose from"]),
    ("-m search=lora_lr 'lora.dropout=interval(0,nan)'", ["interval(0,nan)", "finite"]),
    ("-m search=lora_lr +search.constraints.foo=1", ["hydra.sweeper.constraints", "foo", "peak_memory_gib"]),
    ("-m search=lora_lr +search.constraints.peak_memory_gib=nan", ["constraints.peak_memory_gib=nan", "finite"]),
    ("-m search=lora_lr hydra.sweep.subdir=x", ["hydra.sweep.subdir=x", "'hydra.sweep.subdir=${hydra.job.num}'"]),
    ("-m lora.r=4,8 hydra.launcher.rows=3", ["hydra.launcher.rows belongs to stacks", "hydra/launcher=stacked"]),
    (
        "-m hydra/sweeper=optuna 'lora.r=choice(4,8)' 'hydra.sweeper.multiples={lora.alpha: lora.r}'",
        ["hydra.sweeper.multiples", "Type +hydra.sweeper.multiples="],
    ),
    (
        "-m hydra/sweeper=optuna 'lora.r=choice(4,8)' hydra.sweeper.objectives=[reward_margin]",
        ["reward_margin is an objective", "trainer=sft does not measure it", "dpo"],
    ),
    (
        "-m hydra/sweeper=optuna 'lora.r=choice(4,8)' +hydra.sweeper.constraints.composes=1 dataset.metrics=[]",
        ["composes is a constraint", "dataset.metrics=[composes]"],
    ),
    ("hydra/sweeper/sampler=tpe", ["hydra/sweeper/sampler", "search=lora_quant"]),
    ("'dataset.path=my data/lr=1/x.jsonl'", ["two kinds of quotes", "'dataset.path=\"my data/lr=1/x.jsonl\"'"]),
    ("'dataset.columns={promt:words}'", ["dataset.columns.promt is no setting", "Did you mean dataset.columns.prompt"]),
    ("-m search=lora_quant 'lora.r=choice(2,null)'", ["takes no null", "lora.r=2,null"]),
    ("serve x --with foo", ["foo is no choice", "llama-cpp"]),
    ("generate good.jsonl hello", ["good.jsonl: that is a file", "outputs/DATE/TIME"]),
    ("dashboard good.jsonl", ["good.jsonl: that is a file", "outputs/NAME"]),
    ("micro_batch_size=2", ["micro_batch_size", "trainer.micro_batch_size"]),
    ("search=lora_lr search.n_trial=5", ["hydra.sweeper.n_trials", "--cfg hydra"]),
    ("-m search=lora_lr --cfg job", ["--cfg shows one run", "Leave -m out"]),
    ("trainer.lr=1e-4", ["trainer.lr", "trainer.learning_rate"]),
    ("lora.lora_alpha=16", ["lora_alpha", "lora.alpha"]),
    ("trainer.batch_size=4", ["trainer.per_device_train_batch_size"]),
    ("hydra.run.dirr=x", ["hydra.run.dir"]),
    ("load_in_8bit=true", ["load_in_8bit", "quant.type"]),
    ("peft.lora_r=8", ["peft.lora_r", "lora.r"]),
    ("~lora.rr", ["lora.rr", "lora.r"]),
    ("+lora.r=8", ["+lora.r=8", "Leave the + out: lora.r=8"]),
    ("hydra.sweeper=optuna", ["hydra/sweeper=optuna"]),
    # types
    ("lora.r=abc", ["lora.r=abc", "whole number"]),
    ("lora.r=1.5", ["lora.r=1.5", "whole number"]),
    ("lora.r=null", ["lora.r", "needs a value"]),
    ("lora.r=", ["lora.r", "whole number"]),
    ("lora.dropout=much", ["lora.dropout=much", "number"]),
    ("trainer.bf16=maybe", ["trainer.bf16=maybe", "true or false"]),
    ("dataset.metrics=exact_match", ["dataset.metrics", "list", "[a,b]"]),
    ("quant.type=nf5", ["nf5", "quant.type=nf4"]),
    ("quant.compute_dtype=bf16", ["bf16", "bfloat16"]),
    ("hydra.run.dir=a=b", ["hydra.run.dir=a=b", "two kinds of quotes"]),
    ("trainer.micro_batch_size=3", ["trainer.micro_batch_size=3", "1, 2"]),
    ("trainer.micro_batch_size=aut", ["trainer.micro_batch_size=aut", "type auto"]),
    ("dataset.pad_to_multiple_of=0", ["dataset.pad_to_multiple_of=0", "1 to 1024"]),
    ("dataset.format=text dataset.ghost_attention=true", ["dataset.ghost_attention", "system message"]),
    ("dataset.max_cut_share=2", ["dataset.max_cut_share=2", "0 to 1"]),
    ("trainer.optim=adamw", ["adamw", "adamw_torch"]),
    ("trainer.lr_scheduler_type=cosin", ["cosine"]),
    ("model=tiny lora=8", ["lora=8", "choice"]),
    ("lora.layers_to_transform=[a]", ["lora.layers_to_transform=[a]", "whole numbers"]),
    ("lora.r={a:1}", ["lora.r={a:1}", "whole number"]),
    ("dataset.columns=text", ["dataset.columns", "dataset.columns.text="]),
    ("hydra.mode=FOO", ["hydra.mode=FOO", "MULTIRUN"]),
    # choices
    ("model=llama3_7b", ["model=llama3_7b", "model=llama2_7b"]),
    ("quant=nf5", ["quant=nf5", "quant=nf4"]),
    ("quant=NF4", ["quant=NF4", "quant=nf4"]),
    ("lora=al_linear", ["lora=all_linear"]),
    ("dataset=guanako", ["dataset=guanaco"]),
    ("trainer=stf", ["trainer=sft"]),
    ("trainer=ppo", ["trainer=ppo", "trainer=grpo"]),
    ("tracking=wandbb", ["tracking=wandb"]),
    ("experiment=seed_guanco", ["experiment=seed_guanaco"]),
    ("hydra/launcher=slurmm", ["hydra/launcher=slurmm", "basic"]),
    ("model=[tiny,llama2_7b]", ["one choice", "-m model=A,B"]),
    ("lora=null", ["lora=null", "choice"]),
    ("~lora", ["lora", "deleted"]),
    ("~lora.r", ["lora.r", "deleted"]),
    ("experiment=null", ["experiment=null", "Leave it out"]),
    # ranges
    ("lora.r=0", ["lora.r=0", "1 to 8192"]),
    ("lora.r=-1", ["lora.r=-1"]),
    ("lora.r=99999999999999999999", ["lora.r"]),
    ("lora.alpha=0", ["lora.alpha=0", "positive"]),
    ("lora.alpha=inf", ["lora.alpha=inf"]),
    ("lora.dropout=1.5", ["lora.dropout=1.5", "from 0"]),
    ("lora.dropout=-0.1", ["lora.dropout=-0.1"]),
    ("trainer.learning_rate=nan", ["trainer.learning_rate=nan", "positive"]),
    ("trainer.learning_rate=0", ["trainer.learning_rate=0"]),
    ("trainer.max_steps=0", ["trainer.max_steps=0", "-1"]),
    ("trainer.per_device_train_batch_size=0", ["per_device_train_batch_size=0"]),
    ("trainer.warmup_ratio=1", ["trainer.warmup_ratio=1"]),
    ("trainer.max_grad_norm=0", ["trainer.max_grad_norm=0"]),
    ("dataset.max_length=2", ["dataset.max_length=2"]),
    ("dataset.eval_fraction=1", ["dataset.eval_fraction=1"]),
    ("dataset.max_train_rows=0", ["dataset.max_train_rows=0"]),
    ("seed=-1", ["seed=-1"]),
    ("generation.top_p=0", ["generation.top_p=0"]),
    ("trainer.weight_decay=inf", ["trainer.weight_decay=inf"]),
    ("trainer.neftune_noise_alpha=-1", ["trainer.neftune_noise_alpha=-1"]),
    ("lora.target_modules=[q_proj] lora.layers_to_transform=[-1]", ["lora.layers_to_transform=-1"]),
    # words
    ("foo", ["'foo'", "verb"]),
    ("generat outputs/x hello", ["generat", "generate"]),
    ("chatt outputs/x", ["chatt", "chat"]),
    ("lora.r 8", ["lora.r", "KEY=VALUE"]),
    ("'lora.r=8 lora.alpha=16'", ["lora.r=8 lora.alpha=16", "quotes"]),
    ("lora.r=8,16", ["lora.r=8,16", "-m"]),
    ("lora.r=[", ["lora.r=[", "not closed"]),
    ("=8", ["=8", "KEY=VALUE"]),
    ("trainer.learning_rate='${model.lr}'", ["model.lr", "no setting"]),
    ("lora.r='${oc.env:NOT_SET_ANYWHERE}'", ["NOT_SET_ANYWHERE", "not set"]),
    ("--config-name nope", ["nope", "--config-name"]),
    ("--config-dir nowhere", ["nowhere"]),
    ("--muiltrun lora.r=8", ["--muiltrun", "--multirun"]),
    ("-m lora.r=8,0", ["lora.r=0"]),
    ("-m quant=nf4,nf5", ["nf5", "quant=nf4"]),
    ("lora.r:8", ["lora.r:8", "lora.r=8"]),
    ("'lora.r = 8'", ["without spaces", "lora.r=8"]),
    ("--lora.r=8", ["without dashes: lora.r=8"]),
    ("'tracking.name=a, b'", ["'tracking.name=\"a, b\"'"]),
    ("dataset.path='~/rows.jsonl'", ["'dataset.path=\"~/rows.jsonl\"'"]),
    ("lora.r='${lora.r}'", ["lora.r refers to itself"]),
    ("hydra.run.dir='${nope}'", ["hydra.run.dir", "${nope}"]),
    ("lora.r=8 -m quant=nf4,nf5", ["nf5", "quant=nf4"]),
    ("-m 'lora.r=interval(1,8)'", ["lora.r=interval(1,8)", "-m KEY=A,B"]),
    ("seed=1 chat folder", ["chat is a verb", "first"]),
    ("--cfg jbo", ["--cfg", "jbo", "job"]),
    ("--resolve", ["--resolve", "--cfg"]),
    # data
    ("dataset=jsonl", ["dataset.path"]),
    ("dataset.path=good.jsonl", ["dataset=jsonl dataset.path=good.jsonl"]),
    ("dataset=jsonl dataset.path=godo.jsonl", ["godo.jsonl", "good.jsonl"]),
    ("dataset=jsonl dataset.path=.", ["folder"]),
    ("dataset=jsonl dataset.path=empty.jsonl", ["empty.jsonl", "empty"]),
    ("dataset=jsonl dataset.path=broken.jsonl", ["broken.jsonl", "line 3"]),
    ("dataset=jsonl dataset.path=object.json", ["object.json", "list"]),
    ("dataset=jsonl dataset.path=list.jsonl", ["list.jsonl"]),
    ("dataset=jsonl dataset.path=short.csv", ["short.csv", "line 3"]),
    ("dataset=jsonl dataset.path=text.parquet", ["text.parquet", "Parquet"]),
    ("dataset=jsonl dataset.path=latin.jsonl", ["latin.jsonl", "UTF-8"]),
    ("dataset=jsonl dataset.path=rows.txt", ["rows.txt", ".jsonl"]),
    ("dataset=jsonl dataset.path=one.jsonl", ["one.jsonl", "two"]),
    ("dataset=jsonl dataset.path=columns.jsonl", ["dataset.columns.prompt=question dataset.columns.completion=answer"]),
    ("dataset=jsonl dataset.path=good.jsonl dataset.format=messages", ["messages"]),
    ("dataset=jsonl dataset.path=types.jsonl", ["types.jsonl", "row 2"]),
    ("dataset=jsonl dataset.path=blank.jsonl", ["blank.jsonl", "row 2", "empty"]),
    ("dataset=jsonl dataset.path=roles.jsonl", ["roles.jsonl", "user, user"]),
    ("dataset.name='my data'", ["my data", "dataset.path"]),
    ("dataset=jsonl dataset.path=turns.jsonl", ["turns.jsonl", "row 1", "assistant", "empty"]),
    ("dataset=jsonl dataset.path=system.jsonl", ["system.jsonl", "user, system, assistant"]),
    ("dataset=jsonl dataset.path=surrogate.jsonl", ["surrogate.jsonl", "row 2", "surrogate"]),
    ("dataset=jsonl dataset.path=lacking.jsonl", ["lacking.jsonl", "row 2", "completion"]),
    ("dataset=jsonl dataset.path=text.jsonl dataset.loss_on=completion", ["dataset.loss_on=all"]),
    ("dataset=jsonl dataset.path=twice.csv", ["twice.csv", "line 1", "twice"]),
    ("dataset.name=good.jsonl", ["dataset=jsonl dataset.path=good.jsonl"]),
    ("dataset=jsonl dataset.path=good.jsonl dataset.eval_split=test", ["dataset.eval_split=test", "Leave it out"]),
    ("dataset.format=alpaca", ["dataset.name=sample", "instruction", "dataset.format"]),
    # models and folders
    ("model.name=./nowhere model.source=hub", ["./nowhere", "folder"]),
    ("model.name=folder model.source=hub", ["folder", "config.json"]),
    ("model.name='two words' model.source=hub", ["two words", "OWNER/NAME"]),
    ("hydra.run.dir=good.jsonl/run", ["good.jsonl", "hydra.run.dir"]),
    ("hydra.run.dir=taken", ["taken", "resume=taken"]),
    ("resume=nowhere", ["nowhere"]),
    ("resume=torn", ["torn", "not whole"]),
    ("generate nowhere hello", ["nowhere"]),
    ("generate folder hello", ["folder", "run.json"]),
    ("chat folder", ["folder", "run.json"]),
    ("generate folder", ["request is empty", "quotes"]),
    ("model.name=good.jsonl model.source=hub", ["good.jsonl", "is a file"]),
    ("model.name=no_weights model.source=hub", ["no_weights", "safetensors"]),
    ("model.name=list model.source=hub", ["model.name=list", "its config.json", "no object of settings"]),
    ("model.name=text model.source=hub", ["model.name=text", "its config.json", "no object of settings"]),
    ("model.name=layers model.source=hub", ["model.name=layers", "num_hidden_layers=-1", "whole number from 1"]),
    ("plan model.name=width model.source=hub", ["model.name=width", 'hidden_size="x"', "whole number from 1"]),
    ("model.name=''", ["model.name is empty"]),
    ("model.package=no.such.package", ["no.such.package", "pip install"]),
    ("model.file=nope.gguf", ["nope.gguf", "SmolLM2"]),
    ("hydra.run.dir=", ["hydra.run.dir is empty"]),
    ("-m lora.r=8,16 hydra.sweep.dir=good.jsonl", ["hydra.sweep.dir=good.jsonl", "file"]),
    ("resume=", ["names no folder"]),
    ("resume=taken", ["taken", "lacks the settings"]),
    ("resume=tron", ["tron", "resume=torn"]),
    ("+resume=torn", ["Leave the + out: resume=torn"]),
    ("-m resume=torn", ["Leave -m out"]),
    ("generate folder hello --smaple", ["--smaple", "--sample"]),
    ("generate folder hello --seed -1", ["--seed", "from 0"]),
    ("generate folder two words", ["'words'", "quotes"]),
    # combinations
    ("lora=dora quant=int8", ["lora.use_dora", "int8", "quant=nf4"]),
    ("lora=pissa", ["pissa", "quant=none"]),
    ("lora=loftq", ["loftq", "quant=none"]),
    ("lora.init=orthogonal", ["orthogonal", "quant=none"]),
    ("lora.target_modules=[lm_head]", ["lm_head"]),
    ("lora.target_modules=[q_porj]", ["q_porj", "q_proj"]),
    ("lora.target_modules=[]", ["all-linear"]),
    ("lora.modules_to_save=[embed_token]", ["embed_token", "Did you mean embed_tokens?"]),
    ("lora.layers_to_transform=[0]", ["layers_to_transform", "all-linear"]),
    ("quant=int8 quant.double_quant=true", ["double_quant", "int8"]),
    ("dataset.format=text dataset.loss_on=completion", ["loss_on"]),
    ("objective=foo", ["objective=foo", "eval_loss"]),
    ("dataset.metrics=[exact]", ["exact_match"]),
    ("model.chat_template=chatlm", ["chatml"]),
    ("trainer.bf16=true trainer.fp16=true", ["bf16", "fp16"]),
    ("tracking.project=a/b", ["tracking.project=a/b", "tracking.entity"]),
    ("tracking.mode=online", ["WANDB_API_KEY", "tracking.mode=offline"]),
]

LOADED_NOTHING = [
    "lora.rr=8",
    "model=llama3_7b",
    "lora.r=0",
    "lora.r=abc",
    "dataset=jsonl dataset.path=broken.jsonl",
    "lora=pissa",
    "generat outputs/x hello",
    "generate folder hello",
    "resume=torn",
    "hydra.run.dir=taken",
]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with one file for every way to be wrong."""
    good = {"prompt": "a", "completion": "b"}
    rows = {
        "good.jsonl": [good] * 3,
        "one.jsonl": [good],
        "columns.jsonl": [{"question": "a", "answer": "b"}] * 3,
        "types.jsonl": [good, {"prompt": 1, "completion": "b"}],
        "blank.jsonl": [good, {"prompt": "a", "completion": " "}],
        "roles.jsonl": [{"messages": [{"role": "user", "content": "a"}] * 2}] * 2,
        "turns.jsonl": [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}] * 2,
        "system.jsonl": [{"messages": [{"role": r, "content": "a"} for r in ("user", "system", "assistant")]}] * 2,
        "surrogate.jsonl": [good, {"prompt": "\ud800", "completion": "b"}],
        "lacking.jsonl": [good, {"prompt": "a"}],
        "text.jsonl": [{"text": "a b c"}] * 3,
        "rows.txt": [good] * 3,
    }
    for name, content in rows.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.jsonl").write_text(f'{json.dumps(good)}\n{json.dumps(good)}\n{{"prompt": "a"\n')
    (tmp_path / "object.json").write_text(json.dumps(good))
    (tmp_path / "list.jsonl").write_text(json.dumps([good, good]))
    (tmp_path / "short.csv").write_text("prompt,completion\na,b\na\n")
    (tmp_path / "twice.csv").write_text("prompt,prompt\na,b\nc,d\n")
    (tmp_path / "text.parquet").write_text("not parquet at all")
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(good).encode() + '\n{"prompt": "é"}\n'.encode("latin-1"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "no_weights").mkdir()
    (tmp_path / "no_weights" / "config.json").write_text("{}")
    configs = {"list": "[]", "text": '"x"', "layers": '{"num_hidden_layers": -1}', "width": '{"hidden_size": "x"}'}
    for name, content in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
        (tmp_path / name / "model.safetensors").touch()
    for name, content in (("taken", "{}"), ("torn", '{"schema": 1, "conf')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(content)
    return tmp_path


def listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*"))


@pytest.mark.parametrize(("command", "said"), CASES, ids=[command for command, _ in CASES])
def test_hostile_words_end_in_one_message(lab, files, command, said):
    before, began = listing(files), time.monotonic()
    done = lab(*shlex.split(command), cwd=files)
    seconds = time.monotonic() - began
    message = done.stderr
    assert done.returncode == 2, done.stdout + message
    assert message.startswith("llama_lab: ")
    assert message.count("llama_lab: ") == 1
    assert "Traceback" not in message
    assert len(message.strip().splitlines()) == 1
    assert [words for words in said if words not in message] == [], message
    assert listing(files) == before
    assert seconds < 10  # 0.4 s on a quiet machine; the bound is for loaded ones


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WANDB_MODE": "foo"}, ["what WANDB_MODE is set to", "'online'", "`unset WANDB_MODE`"]),
        ({"WANDB_BASE_URL": "nonsense"}, ["what WANDB_BASE_URL is set to", "valid URL"]),
        ({"WANDB_HTTP_TIMEOUT": "soon"}, ["what WANDB_HTTP_TIMEOUT is set to", "valid number"]),
        ({"WANDB_PROJECT": "a/b", "WANDB_NAME": "c"}, ["what WANDB_PROJECT is set to", "a/b"]),
        ({"WANDB_API_KEY": "short"}, ["the key that is set", "`wandb login`"]),
        ({"WORLD_SIZE": "two"}, ["WORLD_SIZE=two is no whole number", "`unset WORLD_SIZE`"]),
        ({"RANK": "-1"}, ["RANK=-1 is no whole number", "`unset RANK`"]),
        ({"LOCAL_RANK": "1.5"}, ["LOCAL_RANK=1.5 is no whole number", "`unset LOCAL_RANK`"]),
        ({"WORLD_SIZE": "2"}, ["WORLD_SIZE=2", "RANK is not set", "torchrun"]),
        ({"WORLD_SIZE": "2", "RANK": "2"}, ["RANK=2 is none of WORLD_SIZE=2"]),
    ],
    ids=str,
)
def test_variables_that_cannot_be_right_are_named(lab, tmp_path, variables, said):
    done = lab("model=tiny", "tracking.mode=online", cwd=tmp_path, **variables)
    assert done.returncode == 2
    (message,) = done.stderr.strip().splitlines()
    assert message.startswith("llama_lab: ")
    assert [words for words in said if words not in message] == [], message
    assert list(tmp_path.iterdir()) == []


def test_processes_that_cannot_meet_are_told(lab, tmp_path):
    done = lab("model=tiny", "tracking=none", cwd=tmp_path, WORLD_SIZE="2", RANK="0")
    assert done.returncode == 2
    assert "MASTER_ADDR is not set" in done.stderr
    assert "torchrun" in done.stderr


@pytest.mark.parametrize("command", LOADED_NOTHING)
def test_hostile_words_load_no_heavy_library(environment, files, command):
    words = [sys.executable, "-X", "importtime", "-m", "llama_lab", *shlex.split(command)]
    done = subprocess.run(words, cwd=files, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 2
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "import time" in line}
    assert "hydra" in imported or "argparse" in imported
    assert imported.isdisjoint(HEAVY)


@pytest.mark.parametrize("command", ["lora.r=0", "compare nowhere", "resume=nowhere"])
def test_traceback_is_there_for_who_asks(lab, files, command):
    words = shlex.split(command)
    done = lab(*words, cwd=files, HYDRA_FULL_ERROR="1")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "Traceback" not in lab(*words, cwd=files).stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_that_cannot_be_written(lab, files):
    (files / "folder").chmod(0o500)
    done = lab("hydra.run.dir=folder/run", cwd=files)
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
