"""llama_lab as a Hydra application: settings are checked first, then Hydra starts the job."""

from __future__ import annotations

import copy
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from llama_lab import __version__
from llama_lab.choices import Resume, TrackingMode
from llama_lab.compose import check_grid, parse, searchpath_words, typed_words
from llama_lab.config import RunConfig
from llama_lab.data.files import expanded
from llama_lab.error_report import hydra_raises, log_failure, report_error
from llama_lab.errors import ConfigError, RunError, no_folder
from llama_lab.events import Listener
from llama_lab.explain import explain, missing_launcher
from llama_lab.paths import CONF_DIR
from llama_lab.ranks import check_no_sweep
from llama_lab.results import objective_of
from llama_lab.rundir import STAGES_FILE, RunDir, check_run_folder, telling_how_to_go_on
from llama_lab.stacked.launcher import TARGET as STACKED_LAUNCHER
from llama_lab.stages import check_words_of, read_stages, run_stages, stages_of
from llama_lab.sweep.settings import TARGET as STUDY_SWEEPER
from llama_lab.unread import go_on_unread
from llama_lab.words import GROUPS, ordered, resumed

RAY_PLUGIN = "hydra_plugins.hydra_ray_launcher"
BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


class CheckFirst(Callback):
    """Hydra's hook before a run: wrong settings end here, before a folder is made."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Check the settings and the folder."""
        with _ends_the_process():
            # as typed: what refers to a setting is not followed here
            words = typed_words(config, "task")
            task = _without_hydra(config)
            check_words_of(task.get("stages") or {}, words)
            settings = parse(task)
            stages_of(settings, words)
            check_start(settings)
            if config.hydra.sweeper._target_ == STUDY_SWEEPER:
                print("llama_lab: this is one run. With -m it is a study: python -m llama_lab -m ...", file=sys.stderr)
            folder = _folder(config.hydra.run.dir, "hydra.run.dir")
            check_run_folder(folder, settings.trainer.resume)
            if (folder / "run.json").exists():  # to go on with, by trainer.resume=auto
                from llama_lab.lock import check_unchanged

                check_unchanged(RunDir(folder).read_lock(), settings)
            RunDir(folder).claim()  # Hydra writes .hydra before the run begins

    def on_multirun_start(self, config: DictConfig, config_name: str | None = None, **_: Any) -> None:
        """Check the folder and, of a grid, the runs; our own sweeper checks its study, another one's is not known."""
        with _ends_the_process():
            check_no_sweep()
            on_ray = RAY_PLUGIN in config.hydra.launcher._target_
            if on_ray and find_spec(RAY_PLUGIN) is None:
                raise missing_launcher("ray")  # its YAML is ours, so that Hydra finds it in any case
            folder = _folder(config.hydra.sweep.dir, "hydra.sweep.dir")
            check_run_folder(folder, Resume.auto, "hydra.sweep.dir")
            if config.hydra.launcher._target_ == STACKED_LAUNCHER:
                from llama_lab.stacked.rows import check_no_stages, check_rows

                check_rows(config.hydra.launcher.rows)
                check_no_stages(config.get("stages"))
            if config.hydra.sweeper._target_ == BASIC_SWEEPER:
                words = searchpath_words(config)
                words += [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
                check_grid([*words, *typed_words(config, "task")], config_name or "config")
            if on_ray and config.hydra.sweeper._target_ != STUDY_SWEEPER:
                from llama_lab.sweep.rays import start_ray

                start_ray(config.hydra.launcher.ray)


def launch(words: list[str]) -> int:
    """Start Hydra on the words of the command line; the exit code.

    Raises:
        LlamaLabError: what is wrong with the words, the settings or the run.
    """
    if "--version" in words:
        print(f"llama_lab {__version__} (Hydra {hydra.__version__})")
        return 0
    if words in (["--help"], ["-h"]):
        show_help()
        return 0
    words = ordered(words)
    if going_on := resumed(words):
        return resume(*going_on)
    sys.argv[1:] = words  # Hydra reads them there
    # the plugin has a ray of its own in the store; ours is used instead, with its fields
    warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/ray' is validated against")
    with hydra_raises():
        try:
            hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")(job)()
        except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
            if _is_from_job(error):
                raise
            raise explain(error) from error
    return 0


def job(cfg: DictConfig) -> float:
    """Hydra's task: one run; returns the objective."""
    hydra_cfg = HydraConfig.get()
    folder = Path(hydra_cfg.runtime.output_dir)
    try:
        config = parse(cfg)
        if hydra_cfg.mode is RunMode.MULTIRUN and config.tracking.group is None:
            config.tracking.group = Path(hydra_cfg.sweep.dir).name  # the runs of a grid belong together
        check_run_folder(folder, config.trainer.resume)  # of a sweep; CheckFirst has done it for a single run
        words = list(hydra_cfg.overrides.task)
        if config.stages:
            group = f"{hydra_cfg.runtime.choices['experiment']}_{folder.name}"
            return run_stages(stages_of(config, words), folder, config.tracking.group or group, run_in)
        return run_in(config, folder, words)
    except Exception as error:
        log_failure(error)
        if hydra_cfg.mode is RunMode.MULTIRUN:
            raise  # the sweep goes on with its other jobs
        raise SystemExit(report_error(error)) from error


def resume(folder: Path, words: list[str]) -> int:
    """Go on with the run in `folder` under the settings of its run.json.

    Args:
        words: settings that do not change what is learned, such as tracking.mode=offline.
    Raises:
        RunError: the folder holds no run, or the words change what it learns.
    """
    from llama_lab.lock import check_unchanged, config_of

    folder = expanded(str(folder))
    if not os.path.isdir(folder):
        raise RunError(f"resume={folder}: {no_folder(folder, 'resume=')} A run lies in outputs/DATE/TIME.")
    if (folder / STAGES_FILE).is_file():
        stages = [replace(stage, config=_changed(stage.config, words)) for stage in read_stages(folder)]
        run_stages(stages, folder.resolve(), folder.resolve().name, run_in)
        return 0
    run_dir = RunDir(folder.resolve())
    lock = run_dir.read_lock()
    config = _changed(config_of(lock), words)
    check_unchanged(lock, config)
    logging.basicConfig(filename=folder / "llama_lab.log", level=logging.INFO)
    try:
        run_in(config, run_dir.path, lock["overrides"])
    except Exception as error:
        log_failure(error)
        raise
    return 0


def run_in(config: RunConfig, folder: Path, overrides: list[str], listeners: Sequence[Listener] = ()) -> float:
    """One run in this process; the heavy libraries are imported here, after all checks."""
    from llama_lab.process import prepare, terminated

    signal.signal(signal.SIGTERM, terminated)
    go_on_unread()
    prepare(config)
    with telling_how_to_go_on(folder, "run.json"):
        from rich.console import Console

        from llama_lab.runner import run

        return objective_of(run(config, folder, overrides, Console(), listeners))


def show_help() -> None:
    """Print what Hydra prints for --help, which composes a run and copies all schemas once a folder of conf/."""
    cfg = OmegaConf.create({"hydra": {"help": OmegaConf.load(CONF_DIR / "hydra" / "help" / "llama_lab.yaml")}})
    groups = sorted(path for path in CONF_DIR.iterdir() if path.is_dir() and path.name != "hydra")
    choices = [f"{group.name}: {', '.join(sorted(file.stem for file in group.glob('*.yaml')))}\n" for group in groups]
    print(Template(cfg.hydra.help.template).substitute(APP_CONFIG_GROUPS="".join(choices)))


def check_start(config: RunConfig) -> None:
    """Refuse what is known to fail once the run has begun.

    Raises:
        ConfigError: `resume` stands in a file, or W&B is to be online without a key.
    """
    if config.resume is not None:
        raise ConfigError(f"resume={config.resume} stands in a file. Type it on the command line instead.")
    if config.tracking.mode is TrackingMode.online:
        from llama_lab.tracking import resolve_mode

        resolve_mode(config.tracking)


@contextmanager
def _ends_the_process() -> Iterator[None]:
    """Hydra swallows what a hook raises, so an error is reported here and ends the process."""
    try:
        yield
    except OmegaConfBaseException as error:
        raise SystemExit(report_error(explain(error))) from error
    except Exception as error:
        raise SystemExit(report_error(error)) from error


def _is_from_job(error: BaseException) -> bool:
    """Whether the error comes from a run or from a study, and not from the words that describe it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(f.f_code is job.__code__ or f.f_globals.get("__name__") == "llama_lab.sweep.drive" for f in frames)


def _folder(value: Any, key: str) -> Path:
    if not str(value).strip():
        raise ConfigError(f"{key} is empty. Type {key}=FOLDER; the folder you are in is {key}=.")
    return Path(str(value))


def _changed(config: RunConfig, words: list[str]) -> RunConfig:
    """The settings of a resumed run with the words of the command line."""
    tree = OmegaConf.structured(config)
    for word in words:
        try:
            override = OverridesParser.create().parse_override(word)
            key = override.key_or_group
            if key in GROUPS or override.is_hydra_override():
                raise ConfigError(f"{word}: a resumed run keeps its {key}. Leave it out.")
            if override.is_sweep_override():
                raise ConfigError(f"{word}: these are several values, and a run has one.")
            OmegaConf.update(tree, key, override.value(), merge=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise explain(error, word) from error
    tree.trainer.resume = Resume.auto
    return parse(tree)


def _without_hydra(config: DictConfig) -> DictConfig:
    task = copy.deepcopy(config)
    with read_write(task), open_dict(task):
        del task["hydra"]
    return task
