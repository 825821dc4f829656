"""What is told to whom: the run's own files, Weights & Biases, or another tracker (trackers.py).

W&B is online where a key is set, offline where none is; it never asks, and never stops a run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llama_lab.choices import LoraInit, Tracker, TrackingMode
from llama_lab.config import TrackingSettings
from llama_lab.errors import ConfigError
from llama_lab.events import Listener, Pruned
from llama_lab.report import Sample
from llama_lab.results import Result
from llama_lab.rundir import RunDir

if TYPE_CHECKING:
    import wandb

INIT_TIMEOUT_S = 20
FINISH_TIMEOUT_S = 60


class Tracking(Listener, Protocol):
    """A listener that also takes what a run ends with."""

    def finished(self, result: Result, samples: list[Sample]) -> None:
        """The run ended well."""

    def where(self) -> str:
        """One line for the person: the address of the run, or how to upload it."""


class FilesOnly:
    """The run's own metrics.jsonl; every run has it, whatever else is on."""

    def __init__(self, run_dir: RunDir) -> None:
        self.run_dir = run_dir

    def started(self, start_step: int, num_steps: int) -> None:
        pass

    def stepped(self, step: int) -> None:
        pass

    def logged(self, step: int, metrics: dict[str, float]) -> None:
        self.run_dir.log(step, metrics)

    def saved(self, step: int, checkpoint: Path) -> None:
        pass

    def ended(self) -> None:
        pass

    def finished(self, result: Result, samples: list[Sample]) -> None:
        pass

    def where(self) -> str:
        return ""


class WandbTracking(FilesOnly):
    """metrics.jsonl and a W&B run beside it."""

    def __init__(self, run_dir: RunDir, run: wandb.Run, *, log_adapter: bool) -> None:
        super().__init__(run_dir)
        self.run, self.log_adapter = run, log_adapter
        # asked now: after `finish` W&B warns
        self.address = (
            f"W&B is offline. Upload with: wandb sync {Path(run.dir).parent}" if run.offline else f"W&B: {run.url}"
        )
        # a step of our own: W&B's counter cannot go back, and a resumed run repeats a few steps
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        run.define_metric("eval/loss", step_metric="step", summary="min")

    def logged(self, step: int, metrics: dict[str, float]) -> None:
        super().logged(step, metrics)
        self.run.log({"step": step, **metrics})

    def finished(self, result: Result, samples: list[Sample]) -> None:
        import wandb

        rows = [[s.prompt, s.before or "", s.after] for s in samples]
        self.run.log({"samples": wandb.Table(columns=["prompt", "before", "after"], data=rows)})
        self.run.summary.update(result.as_json())
        if self.log_adapter:
            adapter = wandb.Artifact(f"adapter-{self.run.id}", type="model", metadata=result.as_json())
            adapter.add_dir(str(self.run_dir.adapter))
            self.run.log_artifact(adapter, aliases=["final", *filter(None, [self.run.group])])

    def where(self) -> str:
        return self.address


@contextmanager
def open_tracking(settings: TrackingSettings, run_dir: RunDir, lock: dict[str, Any]) -> Iterator[Tracking]:
    """The run's tracking, closed as failed when the block raises.

    Raises:
        ConfigError: tracking.mode=online and no key is set.
    """
    mode = resolve_mode(settings)
    if mode is TrackingMode.disabled:
        yield FilesOnly(run_dir)
        return
    if settings.backend is not Tracker.wandb:
        from llama_lab.trackers import open_tracker

        with open_tracker(settings, run_dir, lock) as tracking:
            yield tracking
        return
    run = _start(settings, mode, run_dir, lock)
    code = 1
    try:
        yield WandbTracking(run_dir, run, log_adapter=settings.log_adapter)
        code = 0
    except Pruned:
        code = 0  # not failed
        run.tags = (*(run.tags or ()), "pruned")
        raise
    finally:
        run.finish(exit_code=code)


def resolve_mode(settings: TrackingSettings) -> TrackingMode:
    """online, offline or disabled; WANDB_MODE decides where tracking.mode is auto.

    A tracker other than W&B is on or off: what its server is, it reads from the environment.

    Raises:
        ConfigError: see `open_tracking`.
    """
    if settings.backend is Tracker.none or settings.mode is TrackingMode.disabled:
        return TrackingMode.disabled
    if settings.backend is not Tracker.wandb:
        return TrackingMode.online
    mode: TrackingMode = settings.mode
    if mode is TrackingMode.auto and os.environ.get("WANDB_MODE") in ("online", "offline", "disabled"):
        mode = TrackingMode(os.environ["WANDB_MODE"])
    if mode in (TrackingMode.offline, TrackingMode.disabled):
        return mode
    has_key = _has_key()
    if mode is TrackingMode.online and not has_key:
        raise ConfigError(
            "tracking.mode=online needs a W&B key, and none is set. Type `wandb login` once, or set WANDB_API_KEY; "
            "or type tracking.mode=offline and upload later."
        )
    return TrackingMode.online if has_key else TrackingMode.offline


def _has_key() -> bool:
    import wandb

    try:
        return bool(wandb.login(prompt=False, verify=False))  # type: ignore[call-arg, unused-ignore]
    except Exception as error:
        # a malformed key: W&B names it in its own words
        raise ConfigError(f"W&B does not accept the key that is set: {' '.join(str(error).split())}") from error


def _start(settings: TrackingSettings, mode: TrackingMode, run_dir: RunDir, lock: dict[str, Any]) -> wandb.Run:
    import wandb

    kwargs: dict[str, Any] = {
        "project": settings.project,
        "entity": settings.entity,
        "group": settings.group,
        "job_type": settings.job_type,
        "tags": settings.tags or default_tags(lock),
        "name": run_name(settings, lock),
        "notes": settings.notes,
        "id": lock["id"],
        "resume": "allow",
        "config": lock["config"],
        "dir": str(run_dir.path),
        "settings": wandb.Settings(
            init_timeout=INIT_TIMEOUT_S,
            finish_timeout=FINISH_TIMEOUT_S,
            x_graphql_retry_max=2,
            silent=True,
            console="off",
        ),
    }
    try:
        return wandb.init(mode=str(mode), **kwargs)  # type: ignore[arg-type]
    except wandb.errors.CommError:
        wandb.teardown()  # else the id is "in use"
        return wandb.init(mode="offline", **kwargs)


def run_name(settings: TrackingSettings, lock: dict[str, Any]) -> str:
    """What is special about the run: its overrides, unless it has been given a name."""
    return settings.name or " ".join(lock["overrides"])[:120] or "default"


def default_tags(lock: dict[str, Any]) -> list[str]:
    """Model, quantisation, kind of LoRA and trainer."""
    config = lock["config"]
    model = config["model"]["name"].split("/")[-1][:64]
    return [model, config["quant"]["type"], _lora_kind(config["lora"]), config["trainer"]["name"]]


def _lora_kind(lora: dict[str, Any]) -> str:
    if lora["use_dora"] or lora["use_rslora"]:
        return "dora" if lora["use_dora"] else "rslora"
    return str(lora["init"]) if lora["init"] != LoraInit.default else "lora"
