"""TensorBoard, MLflow and Trackio, each by the callback that transformers has for it.

The callbacks hear our events instead of a trainer, so they do not depend on the way to train. What a name means there
(the run's own folder, an experiment, a project) and what they read from the environment is theirs.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

from llama_lab.choices import Tracker
from llama_lab.config import TrackingSettings
from llama_lab.errors import ConfigError
from llama_lab.events import Pruned
from llama_lab.lock import flat
from llama_lab.report import Sample
from llama_lab.results import Result
from llama_lab.rundir import RunDir
from llama_lab.tracking import FilesOnly, default_tags, run_name

log = logging.getLogger(__name__)

RUN_TAG = "llama_lab.id"
"""Tag of an MLflow run, by which a resumed run finds it."""
LOGGED_BEFORE = ("eval_loss", "train_loss")
"""Numbers of a result that stand among the steps already."""


class CallbackTracking(FilesOnly):
    """metrics.jsonl, and a callback that is told the same. What goes wrong in it is told and stops no run."""

    def __init__(self, run_dir: RunDir, callback: TrainerCallback, args: TrainingArguments, where: str) -> None:
        super().__init__(run_dir)
        self.callback, self.args, self.place = callback, args, where
        self.state, self.control = TrainerState(), TrainerControl()
        with _printed_to_the_log():
            self.callback.on_train_begin(self.args, self.state, self.control)

    def logged(self, step: int, metrics: dict[str, float]) -> None:
        super().logged(step, metrics)
        # transformers' own names: its callbacks write loss as train/loss and eval_loss as eval/loss
        self._tell(step, {k.removeprefix("train/").replace("eval/", "eval_"): v for k, v in metrics.items()})

    def finished(self, result: Result, samples: list[Sample]) -> None:
        numbers = {k: v for k, v in result.as_json().items() if isinstance(v, int | float) and k not in LOGGED_BEFORE}
        self._tell(result.num_steps, {f"eval_{key}": value for key, value in numbers.items() if key != "schema"})

    def where(self) -> str:
        return self.place

    def close(self) -> None:
        """The run is over, well or not."""
        with _printed_to_the_log():
            self._call("on_train_end")

    def _tell(self, step: int, logs: dict[str, float]) -> None:
        self.state.global_step = step
        self._call("on_log", logs=logs)

    def _call(self, event: str, **what: Any) -> None:
        try:
            getattr(self.callback, event)(self.args, self.state, self.control, **what)
        except Exception as error:  # a server that is gone, a full disk: the run has its own files
            log.warning("%s at step %d", type(self.callback).__name__, self.state.global_step, exc_info=True)
            self.place = f"{type(self.callback).__name__} did not take everything: {type(error).__name__}: {error}"


class _Settings(TrainingArguments):
    """What the callbacks read, with the settings of the run in place of a trainer's."""

    def __init__(self, settings: TrackingSettings, lock: dict[str, Any], run_dir: RunDir) -> None:
        super().__init__(
            output_dir=str(run_dir.path),
            run_name=f"{run_name(settings, lock)} {lock['id'][:4]}",  # Trackio goes on with the run of the same name
            project=settings.project,
            trackio_space_id=None,
            report_to="none",
        )
        self.of_run = flat(lock["config"]) | {"id": lock["id"]}

    def to_dict(self) -> dict[str, Any]:
        return {
            key: value if isinstance(value, int | float | str) else str(value) for key, value in self.of_run.items()
        }


@contextmanager
def open_tracker(settings: TrackingSettings, run_dir: RunDir, lock: dict[str, Any]) -> Iterator[FilesOnly]:
    """The tracking of `tracking.backend`, closed when the block ends.

    Raises:
        ConfigError: it cannot be opened, as where MLflow's server does not answer.
    """
    with _mlflow_run(settings, lock) if settings.backend is Tracker.mlflow else nullcontext():
        try:
            tracking = CallbackTracking(
                run_dir, _callback(settings, run_dir), _Settings(settings, lock, run_dir), _where(settings, run_dir)
            )
        except Exception as error:
            raise _cannot_open(settings, error) from error
        try:
            yield tracking
        finally:
            tracking.close()


def _callback(settings: TrackingSettings, run_dir: RunDir) -> TrainerCallback:
    (kind,) = get_reporting_integration_callbacks([str(settings.backend)])
    if kind is not TensorBoardCallback:
        return kind()
    from torch.utils.tensorboard import SummaryWriter

    from llama_lab.checkpoints import last_checkpoint, step_of

    start = step_of(last_checkpoint(run_dir.checkpoints))
    # a resumed run repeats the steps since its checkpoint: TensorBoard drops what it was told of them before
    return TensorBoardCallback(SummaryWriter(_log_dir(run_dir), purge_step=start + 1 if start else None))


def _log_dir(run_dir: RunDir) -> str:
    return os.environ.get("TENSORBOARD_LOGGING_DIR") or str(run_dir.path / "tensorboard")


def _where(settings: TrackingSettings, run_dir: RunDir) -> str:
    if settings.backend is Tracker.tensorboard:
        return f"TensorBoard: tensorboard --logdir {_log_dir(run_dir)}"
    if settings.backend is Tracker.trackio:
        return f"Trackio: trackio show --project {settings.project}"
    import mlflow

    return f"MLflow: experiment {settings.project} in {mlflow.get_tracking_uri()}"


@contextmanager
def _mlflow_run(settings: TrackingSettings, lock: dict[str, Any]) -> Iterator[None]:
    """MLflow's active run, which its callback takes; a resumed run goes on with the one that it began."""
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.INFO if lock["config"]["verbose"] else logging.WARNING)
    tags = {RUN_TAG: lock["id"], "group": settings.group, "job_type": settings.job_type}
    tags |= dict.fromkeys(settings.tags or default_tags(lock), "")
    try:
        if "MLFLOW_EXPERIMENT_NAME" not in os.environ:
            mlflow.set_experiment(settings.project)
        filter_string = f"tags.`{RUN_TAG}` = '{lock['id']}'"
        found = mlflow.search_runs(filter_string=filter_string, search_all_experiments=True, output_format="list")
        run = mlflow.start_run(
            run_id=found[0].info.run_id if found else None,
            run_name=run_name(settings, lock),
            tags={key: value for key, value in tags.items() if value is not None},
            description=settings.notes,
        )
    except Exception as error:
        raise _cannot_open(settings, error) from error
    pruned = None
    with run:
        try:
            yield
        except Pruned as stop:  # not failed
            mlflow.set_tag("pruned", "")
            pruned = stop
    if pruned:
        raise pruned


@contextmanager
def _printed_to_the_log() -> Iterator[None]:
    """Trackio prints what it does; the log has it, and `verbose` shows the log."""
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            yield
    finally:
        for line in printed.getvalue().splitlines():
            log.info(line)


def _cannot_open(settings: TrackingSettings, error: Exception) -> ConfigError:
    reason = " ".join(str(error).split())[:300]
    return ConfigError(
        f"tracking={settings.backend} cannot be opened: {type(error).__name__}: {reason}. Type tracking=none to run "
        "without it."
    )
