"""One run, stage by stage. Read this first: it is the table of contents of llama_lab."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from llama_lab import ranks, report
from llama_lab.backend import Adapted, Backend, OwnBackend
from llama_lab.checkpoints import check_readable, last_checkpoint, step_of
from llama_lab.choices import Engine, Memory, Resume, TrainerName
from llama_lab.config import RunConfig
from llama_lab.data.audit import stop_on_failure
from llama_lab.data.batches import training_rows
from llama_lab.data.findings import Level
from llama_lab.data.splits import Splits
from llama_lab.error_report import is_disk_full
from llama_lab.errors import RunError
from llama_lab.events import Listener, Listeners, Pruned
from llama_lab.hub import at_commit, commit_of
from llama_lab.lock import check_same_base, check_same_rows, check_unchanged, hardware, make_lock
from llama_lab.lora import count_params, save_adapter
from llama_lab.measure import Evaluator, Measurement, eval_metrics, result_of
from llama_lab.micro_batch import Rows, resolve
from llama_lab.model import base_path, base_shape, describe
from llama_lab.preference_batches import lengths_at_once
from llama_lab.preference_checks import check_unanswered
from llama_lab.prepared import prepare
from llama_lab.process import quiet_libraries
from llama_lab.progress import Display
from llama_lab.quant import compute_dtype
from llama_lab.results import FitResult, Result, Score
from llama_lab.rewards import import_rewards
from llama_lab.rundir import RunDir, how_to_go_on
from llama_lab.same_base import fingerprint
from llama_lab.tracking import Tracking, open_tracking
from llama_lab.trainer_config import TrainerSettings
from llama_lab.training import fit_settings


@dataclass(kw_only=True)
class _Loaded:
    """What the stages of a run work with."""

    config: RunConfig
    backend: Backend
    adapted: Adapted
    longest_row: int
    """Tokens."""
    run_dir: RunDir
    tracking: Tracking
    display: Display
    evaluator: Evaluator
    num_params: tuple[int, int]
    """Trained, and in all."""
    listeners: Sequence[Listener]


def run(
    config: RunConfig,
    folder: Path,
    overrides: list[str],
    console: Console,
    listeners: Sequence[Listener] = (),
    backend: Backend | None = None,
) -> dict[str, Any]:
    """Do one run in `folder`, from the start or from its last complete checkpoint; returns result.json.

    Args:
        listeners: hear of the training, beside tracking and progress.
        backend: where the base comes from and who trains; None for a base of the run's own.
    Raises:
        LlamaLabError: what the user can mend. Every failure is recorded in result.json and raised again.
    """
    run_dir, display = RunDir(folder), Display(console)
    scores = config.trainer.name is TrainerName.reward
    with run_dir.held():
        lock = _open_lock(run_dir, config, overrides)
        if backend is None:  # else the base is there already
            config = replace(config, model=at_commit(config.model, lock))
        if _is_done(run_dir):
            display.note(f"{folder} has ended already; this is its result.")
            report.show(console, run_dir, run_dir.read_result(), [], "", scores=scores)
            return run_dir.read_result()
        check_readable(run_dir.checkpoints)
        with _failure_recorded(run_dir), open_tracking(config.tracking, run_dir, lock) as tracking:
            loaded = _load(config, run_dir, lock, tracking, display, listeners, backend or OwnBackend())
            result, samples = _stages(loaded)
            tracking.finished(result, samples)
        if not scores:
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
    backend: Backend,
) -> _Loaded:
    """Tokenizer, rows, base and adapter; the rows are checked before the base is loaded."""
    quiet_libraries(config)
    display.note(describe(config.model, config.quant))
    if run_dir.checkpoints.exists():
        check_same_base(lock, config.model, run_dir.path)
    tokenizer, splits = _rows(config, backend, display)
    if last_checkpoint(run_dir.checkpoints):
        check_same_rows(lock, splits.fingerprint, run_dir.path)
    trainer, rows = _with_micro_batch(config, splits, lock, display)
    config = replace(config, trainer=trainer)
    ranks.tell((config, run_dir.path))
    import_rewards(config.trainer.rewards or [])
    with display.stage("Loading and quantising the base"):
        adapted = backend.adapted(config, tokenizer)
    if adapted.note:
        display.note(f"{adapted.note}.")
    run_dir.write_lock(lock | _facts(config, splits) | {"micro_batch_size": trainer.per_device_train_batch_size})
    num_params = count_params(adapted.model, adapted.adapter_name)
    settings = fit_settings(config, run_dir, Engine.standard, Memory.balanced)
    evaluator = Evaluator(
        config=config,
        model=adapted.model,
        adapter_name=adapted.adapter_name,
        tokenizer=tokenizer,
        splits=splits,
        # before anything is measured, since what it measures is its own loss
        prepared=prepare(adapted.model, tokenizer, splits, settings),
    )
    return _Loaded(
        config=config,
        backend=backend,
        adapted=adapted,
        longest_row=rows.longest,
        run_dir=run_dir,
        tracking=tracking,
        display=display,
        evaluator=evaluator,
        num_params=num_params,
        listeners=listeners,
    )


def _rows(config: RunConfig, backend: Backend, display: Display) -> tuple[PreTrainedTokenizerBase, Splits]:
    """The tokenizer, and the rows once they are checked."""
    with display.stage("Loading tokenizer and rows"):
        tokenizer, splits, findings = backend.rows(config)
        check_unanswered(config, splits.format)
    sizes = f"{len(splits.train.tokens):,} to train on, {len(splits.valid.tokens):,} held out"
    display.note(f"Rows ({splits.format}): {sizes}")
    for note in [*splits.notes, *(found.message for found in findings if found.level is Level.warning)]:
        display.note(f"Note: {note}.")
    stop_on_failure(findings)
    return tokenizer, splits


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


def _stages(loaded: _Loaded) -> tuple[Result, list[report.Sample]]:
    before = _measure_before(loaded)
    fitted = _fit(loaded)
    _save(loaded)
    with loaded.display.stage("Measuring the trained model"):
        after = loaded.evaluator.measure(loaded.config.dataset.metrics)
    loaded.tracking.logged(fitted.num_steps, eval_metrics(after.score))
    return result_of(loaded.config, loaded.num_params, before, fitted, after), loaded.evaluator.samples(before, after)


def _fit(loaded: _Loaded) -> FitResult:
    config, run_dir, adapted, evaluator = loaded.config, loaded.run_dir, loaded.adapted, loaded.evaluator
    start_step = step_of(last_checkpoint(run_dir.checkpoints))
    run_dir.rewind_metrics(start_step)
    memory, note = loaded.backend.memory(config, adapted, loaded.longest_row)
    if note:
        loaded.display.note(f"{note}.")
    settings = fit_settings(config, run_dir, adapted.engine, memory, loaded.display.note)
    listeners = Listeners(loaded.tracking, loaded.display, *loaded.listeners)
    if evaluator.prepared:
        return evaluator.prepared.fit(settings, listeners, evaluator.held_out)
    rows = training_rows(evaluator.splits.train.tokens, config.dataset)
    return loaded.backend.fit(adapted, evaluator.tokenizer, rows, settings, listeners, evaluator.held_out)


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
        before = loaded.evaluator.measure(config.dataset.metrics if config.evaluate.metrics_before else [])
    loaded.tracking.logged(0, eval_metrics(before.score))
    run_dir.checkpoints.mkdir(exist_ok=True)
    partial = kept.with_suffix(".partial")
    partial.write_text(json.dumps({"score": vars(before.score), "answers": before.answers}))
    partial.replace(kept)
    return before


def _save(loaded: _Loaded) -> None:
    with loaded.run_dir.replacing(loaded.run_dir.adapter) as folder:
        save_adapter(loaded.adapted.model, loaded.adapted.adapter_name, folder)
        loaded.evaluator.tokenizer.save_pretrained(folder)
        if loaded.adapted.model.can_generate():
            loaded.adapted.model.generation_config.save_pretrained(folder)


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
            "fingerprint": fingerprint(config.model),
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
        is_full = is_disk_full(error)
        said = "The disk is full" if is_full else f"{type(error).__name__}: {error}"
        with suppress(OSError):
            run_dir.write_result(None, status="failed", error=said)
        if is_full:
            raise RunError(
                f"The disk of {run_dir.path} is full. Free some space there, and go on from the last checkpoint with: "
                + how_to_go_on(run_dir.path)
            ) from error
        raise
