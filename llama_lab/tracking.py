"""What is told to whom: the run's own files, Weights & Biases, or another tracker (trackers.py).

W&B is online where a key is set, offline where none is; it never asks, and never stops a run.
"""

from __future__ import annotations

import logging
import os
import shlex
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
from llama_lab.wandb_run import OPEN, NoAnswer, has_key, start_wandb

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)


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


class Untold(FilesOnly):
    """A run of which W&B has heard nothing."""

    def __init__(self, run_dir: RunDir, reason: str) -> None:
        super().__init__(run_dir)
        self.reason = " ".join(reason.split())[:200].rstrip(".")

    def where(self) -> str:
        return f"W&B did not answer ({self.reason}): the numbers are in {self.run_dir.metrics} alone."


class WandbTracking(FilesOnly):
    """metrics.jsonl and a W&B run beside it. What goes wrong with W&B is told at the end and stops no run."""

    def __init__(self, run_dir: RunDir, run: wandb.Run, *, log_adapter: bool) -> None:
        super().__init__(run_dir)
        self.run, self.log_adapter, self.problem = run, log_adapter, ""
        OPEN.add(run.id)
        # asked now: after `finish` W&B warns
        self.is_offline, self.files, self.url = run.offline, Path(run.dir).parent, run.url
        # a step of our own: W&B's counter cannot go back, and a resumed run repeats a few steps
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        run.define_metric("eval/loss", step_metric="step", summary="min")

    def logged(self, step: int, metrics: dict[str, float]) -> None:
        super().logged(step, metrics)
        with self._noted():
            self.run.log({"step": step, **metrics})

    def finished(self, result: Result, samples: list[Sample]) -> None:
        import wandb

        with self._noted():
            self.run.summary.update(result.as_json())
        rows = [[s.prompt, s.before or "", s.after] for s in samples]
        with self._noted():  # asks the server, unlike a number
            self.run.log({"samples": wandb.Table(columns=["prompt", "before", "after"], data=rows)})
        if self.log_adapter:
            with self._noted():
                adapter = wandb.Artifact(f"adapter-{self.run.id}", type="model", metadata=result.as_json())
                adapter.add_dir(str(self.run_dir.adapter))
                self.run.log_artifact(adapter, aliases=["final", *filter(None, [self.run.group])])

    def close(self, exit_code: int) -> None:
        """Wait for the upload, but not for ever."""
        with self._noted():
            self.run.finish(exit_code=exit_code)
        OPEN.discard(self.run.id)

    def where(self) -> str:
        files = shlex.quote(str(self.files))
        if self.problem:
            flag = "" if self.is_offline else "--include-online "  # without it W&B takes the run for uploaded
            return f"W&B did not get everything ({self.problem}). Upload it with: wandb sync {flag}{files}"
        return f"W&B is offline. Upload with: wandb sync {files}" if self.is_offline else f"W&B: {self.url}"

    @contextmanager
    def _noted(self) -> Iterator[None]:
        """Keep what is raised from the run: a network that dies costs it nothing but the upload."""
        try:
            yield
        except Exception as error:
            log.warning("W&B", exc_info=True)
            self.problem = self.problem or " ".join(f"{type(error).__name__}: {error}".split())[:200].rstrip(".")


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
    with _open_wandb(settings, mode, run_dir, lock) as tracking:
        yield tracking


@contextmanager
def _open_wandb(
    settings: TrackingSettings, mode: TrackingMode, run_dir: RunDir, lock: dict[str, Any]
) -> Iterator[FilesOnly]:
    try:
        run = start_wandb(
            settings,
            mode,
            folder=run_dir.path,
            run_id=lock["id"],
            name=run_name(settings, lock),
            tags=settings.tags or default_tags(lock),
            config=lock["config"],
        )
    except NoAnswer as error:
        log.warning("W&B", exc_info=True)
        yield Untold(run_dir, str(error.__cause__))
        return
    tracking, code = WandbTracking(run_dir, run, log_adapter=settings.log_adapter), 1
    try:
        yield tracking
        code = 0
    except Pruned:
        code = 0  # not failed
        run.tags = (*(run.tags or ()), "pruned")
        raise
    finally:
        tracking.close(code)


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
    is_known = has_key()
    if mode is TrackingMode.online and not is_known:
        raise ConfigError(
            "tracking.mode=online needs a W&B key, and none is set. Type `wandb login` once, or set WANDB_API_KEY; "
            "or type tracking.mode=offline and upload later."
        )
    return TrackingMode.online if is_known else TrackingMode.offline


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
