"""llama_lab as a Hydra application: settings are checked first, then Hydra starts the job."""

from __future__ import annotations

import copy
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from llama_lab.compose import parse
from llama_lab.config import RunConfig
from llama_lab.errors import ConfigError, LlamaLabError, RunError
from llama_lab.explain import explain
from llama_lab.paths import CONF_DIR
from llama_lab.rundir import RunDir, check_run_folder

GROUPS = ("model", "quant", "lora", "dataset", "trainer", "tracking", "experiment")
FULL_ERROR = "HYDRA_FULL_ERROR"


class CheckFirst(Callback):
    """Hydra's hook before a run: wrong settings end here, before a folder is made."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Check the settings and the folder; Hydra swallows exceptions of a hook, so a wrong one ends the process."""
        try:
            settings = parse(_without_hydra(config))
            check_run_folder(Path(str(config.hydra.run.dir)), settings.trainer.resume)
        except Exception as error:
            raise SystemExit(report_error(error)) from error


def launch(words: list[str]) -> int:
    """Start Hydra on the words of the command line; the exit code.

    Raises:
        LlamaLabError: what is wrong with the words, the settings or the run.
    """
    check_words(words)
    if resumed := [word for word in words if word.startswith("resume=") and word != "resume=null"]:
        return resume(Path(resumed[0].removeprefix("resume=")).expanduser(), [w for w in words if w not in resumed])
    with _hydra_raises():
        try:
            hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")(job)()
        except (HydraException, OmegaConfBaseException) as error:
            raise explain(error) from error
        except (PermissionError, FileExistsError, NotADirectoryError) as error:
            raise RunError(
                f"{error.filename} cannot be written: {error.strerror}. Type another hydra.run.dir."
            ) from error
    return 0


def job(cfg: DictConfig) -> float:
    """Hydra's task: one run; returns the objective."""
    hydra_cfg = HydraConfig.get()
    folder = Path(hydra_cfg.runtime.output_dir)
    try:
        return run_in(parse(cfg), folder, list(hydra_cfg.overrides.task))
    except Exception as error:
        logging.getLogger(__name__).exception("The run failed")
        if hydra_cfg.mode is RunMode.MULTIRUN:
            raise  # the sweep goes on with its other jobs
        raise SystemExit(report_error(error)) from error


def resume(folder: Path, words: list[str]) -> int:
    """Go on with the run in `folder` under the settings of its run.json.

    Args:
        words: settings that do not change what is learned, such as tracking.mode=offline.
    """
    from llama_lab.lock import config_of

    run_dir = RunDir(folder.resolve())
    lock = run_dir.read_lock()
    lock["config"]["trainer"]["resume"] = "auto"
    try:
        changed = OmegaConf.merge(OmegaConf.structured(config_of(lock)), OmegaConf.from_dotlist(words))
        config = parse(changed)  # type: ignore[arg-type]
    except OmegaConfBaseException as error:
        raise explain(error) from error
    logging.basicConfig(filename=folder / "llama_lab.log", level=logging.INFO)
    try:
        run_in(config, run_dir.path, lock["overrides"])
    except Exception:
        logging.getLogger(__name__).exception("The run failed")
        raise
    return 0


def run_in(config: RunConfig, folder: Path, overrides: list[str]) -> float:
    """One run in this process; the heavy libraries are imported here, after all checks."""
    from llama_lab.process import prepare

    signal.signal(signal.SIGTERM, _terminated)
    prepare(config)
    from rich.console import Console

    from llama_lab.runner import run

    return float(run(config, folder, overrides, Console())["objective"] or "nan")


def check_words(words: list[str]) -> None:
    """Refuse words that Hydra would take for something else.

    Raises:
        ConfigError: names the word and what to type.
    """
    for word in words:
        key, _, value = word.partition("=")
        if key.lstrip("+") in GROUPS and value.startswith("["):
            raise ConfigError(f"{word}: a group takes one choice. Type {key}=CHOICE, or -m {key}=A,B for several runs.")


def report_error(error: BaseException) -> int:
    """Print one message for `error`, a traceback too where HYDRA_FULL_ERROR=1 asks for it; the exit code."""
    if os.environ.get(_USERS_FULL_ERROR) == "1":
        traceback.print_exception(error)
    if isinstance(error, LlamaLabError):
        print(f"llama_lab: {error}", file=sys.stderr)
        return error.exit_code
    if type(error).__name__ == "OutOfMemoryError":
        print(
            "llama_lab: the GPU's memory is full. Halve trainer.per_device_train_batch_size and double "
            "trainer.gradient_accumulation_steps, or type trainer.gradient_checkpointing=true, "
            "or a smaller dataset.max_length.",
            file=sys.stderr,
        )
        return LlamaLabError.exit_code
    print(
        f"llama_lab: {type(error).__name__}: {error}\nThe traceback is in llama_lab.log in the run's folder; "
        f"{FULL_ERROR}=1 shows it here.",
        file=sys.stderr,
    )
    return 1


_USERS_FULL_ERROR = "LLAMA_LAB_FULL_ERROR"


@contextmanager
def _hydra_raises() -> Iterator[None]:
    """Let Hydra raise its errors instead of printing them; what the user asked for is kept beside."""
    asked = os.environ.get(FULL_ERROR)
    os.environ[_USERS_FULL_ERROR] = asked or "0"
    os.environ[FULL_ERROR] = "1"
    try:
        yield
    finally:
        if asked is None:
            del os.environ[FULL_ERROR]
        else:
            os.environ[FULL_ERROR] = asked


def _without_hydra(config: DictConfig) -> DictConfig:
    task = copy.deepcopy(config)
    with read_write(task), open_dict(task):
        del task["hydra"]
    return task


def _terminated(signum: int, frame: Any) -> None:
    raise SystemExit(128 + signum)  # Slurm's and Docker's way to stop a job: record it and let go
