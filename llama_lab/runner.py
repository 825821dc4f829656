"""One run, stage by stage. Read this first: it is the table of contents of llama_lab."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from llama_lab import report
from llama_lab.choices import Engine, Memory, Resume, TrainerName
from llama_lab.config import RunConfig, TrainerSettings
from llama_lab.continued import continue_adapter
from llama_lab.data.answers import chat_of
from llama_lab.data.audit import audit, stop_on_failure
from llama_lab.data.batches import training_rows
from llama_lab.data.findings import Level
from llama_lab.data.splits import Splits, build_splits
from llama_lab.engine.choose import choose_for, fit_of
from llama_lab.engine.install import speed_up
from llama_lab.evaluate import score
from llama_lab.events import Listener, Listeners, Pruned
from llama_lab.generate import answer
from llama_lab.hub import commit_of
from llama_lab.lock import check_unchanged, hardware, make_lock
from llama_lab.lora import add_adapter, count_params
from llama_lab.micro_batch import Rows, memory_level, resolve
from llama_lab.model import base_path, base_shape, describe, load_base, load_tokenizer, set_special_tokens
from llama_lab.own_settings import FROM_PAIRS
from llama_lab.preference_batches import lengths_at_once
from llama_lab.prepared import Prepared, prepare
from llama_lab.process import quiet_libraries
from llama_lab.progress import Display
from llama_lab.quant import compute_dtype
from llama_lab.results import FitResult, Result, Score
from llama_lab.reward_model import prepare_head
from llama_lab.rundir import RunDir
from llama_lab.tracking import Tracking, open_tracking
from llama_lab.training import FitSettings, last_checkpoint, peak_memory_gib, step_of


@dataclass(kw_only=True)
class Measurement:
    """What is known of the model at one moment."""

    score: Score
    answers: list[str]
    """To the prompts of samples.md."""


@dataclass(kw_only=True)
class _Loaded:
    """What the stages of a run work with."""

    config: RunConfig
    engine: Engine
    longest_row: int
    """Tokens."""
    run_dir: RunDir
    tracking: Tracking
    display: Display
    tokenizer: PreTrainedTokenizerBase
    splits: Splits
    model: PeftModel
    prepared: Prepared | None
    """Ready to train and to score, where the trainer is not SFT's."""
    num_params: tuple[int, int]
    """Trained, and in all."""
    listeners: Sequence[Listener]


def run(
    config: RunConfig, folder: Path, overrides: list[str], console: Console, listeners: Sequence[Listener] = ()
) -> dict[str, Any]:
    """Do one run in `folder`, from the start or from its last complete checkpoint; returns result.json.

    Args:
        listeners: hear of the training, beside tracking and progress.
    Raises:
        LlamaLabError: what the user can mend. Every failure is recorded in result.json and raised again.
    """
    run_dir, display = RunDir(folder), Display(console)
    scores = config.trainer.name is TrainerName.reward
    with run_dir.held():
        lock = _open_lock(run_dir, config, overrides)
        if _is_done(run_dir):
            display.note(f"{folder} has ended already; this is its result.")
            report.show(console, run_dir, run_dir.read_result(), [], "", scores=scores)
            return run_dir.read_result()
        with _failure_recorded(run_dir), open_tracking(config.tracking, run_dir, lock) as tracking:
            loaded = _load(config, run_dir, lock, tracking, display, listeners)
            result, samples = _stages(loaded)
            tracking.finished(result, samples)
        run_dir.write_samples(report.samples_markdown(samples))
        run_dir.write_result(result, status="ok")
        report.show(console, run_dir, run_dir.read_result(), samples, tracking.where(), scores=scores)
        return run_dir.read_result()


def _load(
    config: RunConfig,
    run_dir: RunDir,
    lock: dict[str, Any],
    tracking: Tracking,
    display: Display,
    listeners: Sequence[Listener],
) -> _Loaded:
    """Tokenizer, rows, base and adapter; the rows are checked before the base is loaded."""
    quiet_libraries(config)
    display.note(describe(config.model, config.quant))
    with display.stage("Loading tokenizer and rows"):
        tokenizer = load_tokenizer(config.model)
        splits = build_splits(config.dataset, tokenizer, seed=config.seed, trainer=config.trainer.name)
        findings = audit(splits, tokenizer, config.dataset, base_shape(config.model).vocab_size)
    sizes = f"{len(splits.train.tokens):,} to train on, {len(splits.valid.tokens):,} held out"
    display.note(f"Rows ({splits.format}): {sizes}")
    for note in [*splits.notes, *(found.message for found in findings if found.level is Level.warning)]:
        display.note(f"Note: {note}.")
    stop_on_failure(findings)
    with display.stage("Loading and quantising the base"):
        model = _adapted_base(config, tokenizer)
        choice = choose_for(config, model)
        if choice.speeds_up_model:
            speed_up(model)
    if choice.note:
        display.note(f"{choice.note}.")
    trainer, rows = _with_micro_batch(config, splits, lock, display)
    run_dir.write_lock(lock | _facts(config, splits) | {"micro_batch_size": trainer.per_device_train_batch_size})
    config, num_params = replace(config, trainer=trainer), count_params(model)
    settings = _fit_settings(config, run_dir, Engine.standard, Memory.balanced)
    return _Loaded(
        config=config,
        engine=choice.engine,
        longest_row=rows.longest,
        run_dir=run_dir,
        tracking=tracking,
        display=display,
        tokenizer=tokenizer,
        splits=splits,
        model=model,
        # before anything is measured, since what it measures is its own loss
        prepared=prepare(model, tokenizer, splits, settings),
        num_params=num_params,
        listeners=listeners,
    )


def _adapted_base(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PeftModel:
    """The base with the adapter that training begins with."""
    scores, start = config.trainer.name is TrainerName.reward, config.model.adapter
    base = load_base(config.model, config.quant, dense=config.trainer.engine is not Engine.standard, scores=scores)
    set_special_tokens(base, tokenizer)
    if scores:
        prepare_head(base, config.seed)
    return continue_adapter(base, start) if start else add_adapter(base, config.lora, seed=config.seed, scores=scores)


def _with_micro_batch(
    config: RunConfig, splits: Splits, lock: dict[str, Any], display: Display
) -> tuple[TrainerSettings, Rows]:
    """A resumed run goes on with the micro-batch that it began with, also where more would fit now."""
    lengths = lengths_at_once(training_rows(splits.train.tokens, config.dataset), config.trainer)
    multiple = config.dataset.pad_to_multiple_of or 1
    rows = Rows(
        longest=-(-max(lengths) // multiple) * multiple,
        padded=config.dataset.packing or len(set(lengths)) > 1,
    )
    if config.trainer.micro_batch_size == "auto" and "micro_batch_size" in lock:
        return config.trainer.with_micro_batch(lock["micro_batch_size"]), rows
    trainer, note = resolve(config, base_shape(config.model), rows)
    if note:
        display.note(f"{note}.")
    return trainer, rows


def _memory_level(loaded: _Loaded) -> Memory:
    """trainer.memory; of `auto` the fastest that fits, which is said."""
    if loaded.engine is Engine.standard or not torch.cuda.is_available():
        return Memory.balanced
    level, note = memory_level(loaded.config, base_shape(loaded.config.model), loaded.longest_row)
    loaded.display.note(f"{note}.")
    return level


def _stages(loaded: _Loaded) -> tuple[Result, list[report.Sample]]:
    before = _measure_before(loaded)
    fitted = _fit(loaded)
    _save_adapter(loaded.model, loaded.tokenizer, loaded.run_dir)
    with loaded.display.stage("Measuring the trained model"):
        after = _measure(loaded, loaded.config.dataset.metrics)
    loaded.tracking.logged(fitted.num_steps, _eval_metrics(after.score))
    config, splits = loaded.config, loaded.splits
    return _result(config, loaded.num_params, before, fitted, after), _samples(config, splits, before, after)


def _fit(loaded: _Loaded) -> FitResult:
    config, run_dir, splits = loaded.config, loaded.run_dir, loaded.splits
    start_step = step_of(last_checkpoint(run_dir.checkpoints))
    run_dir.rewind_metrics(start_step)
    settings = _fit_settings(config, run_dir, loaded.engine, _memory_level(loaded), loaded.display.note)

    def held_out() -> dict[str, float]:
        return _eval_metrics(_score(loaded, metrics=[]))

    listeners = Listeners(loaded.tracking, loaded.display, *loaded.listeners)
    if loaded.prepared:
        return loaded.prepared.fit(settings, listeners, held_out)
    rows, fit = training_rows(splits.train.tokens, config.dataset), fit_of(loaded.engine)
    return fit(loaded.model, loaded.tokenizer, rows, settings, listeners, held_out)


def _fit_settings(
    config: RunConfig, run_dir: RunDir, engine: Engine, memory: Memory, note: Callable[[str], None] = print
) -> FitSettings:
    runtimes = [row["train/runtime_s"] for row in run_dir.read_metrics() if "train/runtime_s" in row]
    return FitSettings(
        trainer=config.trainer,
        seed=config.seed,
        checkpoints=run_dir.checkpoints,
        engine=engine,
        memory=memory,
        note=note,
        autocast_bf16=torch.cuda.is_available() and compute_dtype(config.quant)[0] is torch.bfloat16,
        pad_to_multiple_of=config.dataset.pad_to_multiple_of,
        runtime_before_s=runtimes[-1] if runtimes else 0.0,
    )


def _score(loaded: _Loaded, metrics: list[str]) -> Score:
    valid, settings = loaded.splits.valid, loaded.config.evaluate
    if loaded.prepared:
        return loaded.prepared.score(valid, settings, metrics)
    return score(loaded.model, loaded.tokenizer, valid, settings, metrics)


def _measure(loaded: _Loaded, metrics: list[str]) -> Measurement:
    config, model, tokenizer, splits = loaded.config, loaded.model, loaded.tokenizer, loaded.splits
    found = _score(loaded, metrics)
    if config.trainer.name is TrainerName.reward:
        return Measurement(score=found, answers=[])
    one_turn = all(len(chat_of(example)) == 2 for example in splits.valid.examples)
    if found.answers and one_turn and not config.generation.prompts and not config.generation.do_sample:
        # the prompts of samples.md are the first held-out ones, and those have just been answered
        return Measurement(score=found, answers=[a.strip() for a in found.answers[: config.generation.num_prompts]])
    prompts = [[{"role": "user", "content": p}] for p in _sample_prompts(config, splits)]
    torch.manual_seed(config.seed)  # sampled answers depend on the seed alone
    answers = answer(model, tokenizer, prompts, config.generation) if prompts else []
    return Measurement(score=found, answers=[a.strip() for a in answers])


def _measure_before(loaded: _Loaded) -> Measurement | None:
    """Measure the untrained model once; a resumed run reads what the first one found."""
    config, run_dir = loaded.config, loaded.run_dir
    if not config.evaluate.before:
        return None
    kept = run_dir.checkpoints / "before.json"
    if kept.exists():
        found = json.loads(kept.read_text())
        return Measurement(score=Score(**found["score"]), answers=found["answers"])
    with loaded.display.stage("Measuring the model before training"):
        before = _measure(loaded, config.dataset.metrics if config.evaluate.metrics_before else [])
    loaded.tracking.logged(0, _eval_metrics(before.score))
    run_dir.checkpoints.mkdir(exist_ok=True)
    partial = kept.with_suffix(".partial")
    partial.write_text(json.dumps({"score": vars(before.score), "answers": before.answers}))
    partial.replace(kept)
    return before


def _sample_prompts(config: RunConfig, splits: Splits) -> list[str]:
    if config.trainer.name is TrainerName.reward:
        return []  # it scores answers and writes none
    if config.generation.prompts:
        return config.generation.prompts
    chats = [chat for example in splits.valid.examples if (chat := chat_of(example))]
    firsts = [next(m["content"] for m in chat if m["role"] == "user") for chat in chats]
    return firsts[: config.generation.num_prompts]


def _samples(config: RunConfig, splits: Splits, before: Measurement | None, after: Measurement) -> list[report.Sample]:
    prompts = _sample_prompts(config, splits)
    befores: list[str] | list[None] = before.answers if before else [None] * len(prompts)
    return [report.Sample(prompt=p, before=b, after=a) for p, b, a in zip(prompts, befores, after.answers, strict=True)]


def _eval_metrics(found: Score) -> dict[str, float]:
    return {"eval/loss": found.eval_loss} | {f"eval/{name}": value for name, value in found.metrics.items()}


def _save_adapter(model: PeftModel, tokenizer: PreTrainedTokenizerBase, run_dir: RunDir) -> None:
    with run_dir.replacing(run_dir.adapter) as folder:
        # the embedding is never resized here, so PEFT need not compare it with the hub's
        model.save_pretrained(str(folder), save_embedding_layers=False, selected_adapters=["default"])
        tokenizer.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)


def _result(
    config: RunConfig, num_params: tuple[int, int], before: Measurement | None, fitted: FitResult, after: Measurement
) -> Result:
    trainable, total = num_params
    is_of_tokens = config.trainer.name not in FROM_PAIRS
    result = Result(
        objective=math.nan,
        eval_loss_before=before.score.eval_loss if before else None,
        eval_loss=after.score.eval_loss,
        perplexity=math.exp(min(after.score.eval_loss, 700.0)) if is_of_tokens else None,
        train_loss=fitted.train_loss,
        train_runtime_s=fitted.train_runtime_s,
        tokens_per_s=fitted.tokens_per_s,
        peak_memory_gib=peak_memory_gib(),
        num_trainable_params=trainable,
        num_params=total,
        num_steps=fitted.num_steps,
        metrics_before=before.score.metrics if before else {},
        metrics=after.score.metrics,
    )
    result.objective = result.as_json()[config.objective]
    return result


def _open_lock(run_dir: RunDir, config: RunConfig, overrides: list[str]) -> dict[str, Any]:
    """run.json of this folder: the first time written, on a resume read and compared."""
    if config.trainer.resume is Resume.auto and run_dir.lock.exists():
        lock = run_dir.read_lock()
        check_unchanged(lock, config)
        return lock
    lock = make_lock(config, overrides, run_id=uuid.uuid4().hex[:12])
    run_dir.write_lock(lock)
    return lock


def _facts(config: RunConfig, splits: Splits) -> dict[str, Any]:
    """What run.json learns once model and rows are loaded."""
    return {
        "model": {
            "name": config.model.name,
            "path": base_path(config.model).replace(str(Path.home()), "~", 1),
            "commit": commit_of(config.model),
            "compute_dtype": str(compute_dtype(config.quant)[0]).removeprefix("torch."),
        },
        "dataset": {
            "fingerprint": splits.fingerprint,
            "format": str(splits.format),
            "num_train_rows": len(splits.train.tokens),
            "num_valid_rows": len(splits.valid.tokens),
        },
        "hardware": hardware(),
    }


def _is_done(run_dir: RunDir) -> bool:
    return run_dir.result.exists() and run_dir.read_result().get("status") == "ok"


@contextmanager
def _failure_recorded(run_dir: RunDir) -> Iterator[None]:
    try:
        yield
    except Pruned as stop:
        run_dir.write_result(None, status="pruned", num_steps=stop.step, error=str(stop))
        raise
    except torch.cuda.OutOfMemoryError as error:
        run_dir.write_result(None, status="infeasible", error=str(error).splitlines()[0])
        raise
    except BaseException as error:
        run_dir.write_result(None, status="failed", error=f"{type(error).__name__}: {error}")
        raise
