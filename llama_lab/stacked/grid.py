"""The points of a grid, or of any sweeper's batch, through the stacked launcher: all wait, and stacks take them in."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.types import HydraContext
from omegaconf import DictConfig, open_dict, read_write
from rich.console import Console

from llama_lab.choices import Resume
from llama_lab.compose import parse
from llama_lab.config import RunConfig
from llama_lab.errors import ConfigError, LlamaLabError, RunError
from llama_lab.hub import needs_hub
from llama_lab.process import signals_raise
from llama_lab.results import objective_of
from llama_lab.rundir import RunDir
from llama_lab.stacked.hosts import Stacks
from llama_lab.stacked.rows import check_no_stages
from llama_lab.sweep.child import Order
from llama_lab.sweep.judge import hear
from llama_lab.sweep.outcome import recorded
from llama_lab.sweep.processes import STOP, interrupt
from llama_lab.sweep.slots import gpu_of, visible_gpus
from llama_lab.sweep.sweeper import SILENT
from llama_lab.sweep.trial import LAUNCHING, check_own_run
from llama_lab.sweep.words import IN_PLACE

GPUS = "CUDA_VISIBLE_DEVICES"


def launch_grid(
    context: HydraContext, tree: DictConfig, jobs: Sequence[Sequence[str]], first: int, wanted: int | None
) -> list[JobReturn]:
    """Run all jobs, together where they share a base; what Hydra's launchers return.

    Args:
        tree: the whole tree, hydra included, without the words of the jobs.
        jobs: the words of each.
        first: number of the first.
        wanted: hydra.launcher.rows; None for auto.
    Raises:
        LlamaLabError: the jobs cannot be right, one of them failed, or another process has the folder.
    """
    tree = _silent(tree)
    console = Console()
    configs = _configs(context, tree, jobs, first)
    for config in configs:
        check_no_stages(config.stages)
    folder = Path(str(tree.hydra.sweep.dir))
    if len(jobs) > 1:  # of one alone the folder may be its own
        RunDir(folder).claim()
    stacks = Stacks(
        wanted=wanted,
        configs=configs,
        folder=folder,
        offline=not any(needs_hub(config) for config in configs),
        is_queue=True,
        note=lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True),
    )
    stacks.note(f"{len(jobs)} points. Where it stops, it goes on with the same command and hydra.sweep.dir={folder}")
    stacks.decide()
    launcher = BasicLauncher()
    launcher.setup(hydra_context=context, task_function=GridTask(stacks=stacks, common=_common(jobs)), config=tree)

    def launch(number: int) -> JobReturn:
        with LAUNCHING:
            return launcher.launch([[*jobs[number - first], IN_PLACE]], initial_job_idx=number)[0]

    try:
        return _all(launch, range(first, first + len(jobs)))
    except (KeyboardInterrupt, SystemExit):
        raise KeyboardInterrupt(f"The same command with hydra.sweep.dir={folder} goes on.") from None
    finally:
        stacks.close()


@dataclass(frozen=True, kw_only=True)
class GridTask:
    """The task of a point, instead of llama_lab.app.job: it hands the run to the stacks and waits for its end."""

    stacks: Stacks
    common: frozenset[str]
    """The words that all points have."""

    def __call__(self, cfg: DictConfig) -> float:
        """The point's objective.

        Raises:
            RunError: the run failed; its result.json and its log say why.
        """
        hydra_cfg = HydraConfig.get()
        number, folder = int(hydra_cfg.job.num), Path(hydra_cfg.runtime.output_dir)
        config = parse(cfg)
        config.trainer.resume = Resume.auto
        if config.tracking.group is None:
            config.tracking.group = Path(hydra_cfg.sweep.dir).name  # the runs of a grid belong together
        words = list(hydra_cfg.overrides.task)
        order = Order(config=config, folder=folder, overrides=words, env=_env(number, dict(hydra_cfg.job.env_set)))
        own = " ".join(word for word in words if word not in self.common)
        is_done = _is_done(RunDir(folder), config)
        teller = _Teller(label=f"point {number} {own}".rstrip(), note=self.stacks.note)
        LAUNCHING.release()
        try:
            code = 0 if is_done else self.stacks.run(order, teller.hear)
        finally:
            LAUNCHING.acquire()
        return _objective(folder, code, teller)


def _is_done(run_dir: RunDir, config: RunConfig) -> bool:
    """Whether an earlier start has finished the point; what one that failed left as its result is taken away.

    Raises:
        RunError: the folder holds a run of other settings.
    """
    check_own_run(run_dir, config)
    if (recorded(run_dir.path) or {}).get("status") == "ok":
        return True
    run_dir.result.unlink(missing_ok=True)
    return False


def _env(number: int, env: dict[str, str]) -> dict[str, str]:
    """Of a point; where there are several GPUs, each has stacks of its own, and the points are dealt out."""
    if len(visible_gpus()) < 2 or GPUS in env:
        return env
    return env | {GPUS: str(gpu_of(number))}


@dataclass(kw_only=True)
class _Teller:
    """Says how a point goes."""

    label: str
    note: Callable[[str], None]
    num_steps: int = 0

    def hear(self, pipe: Connection, sentinel: int) -> tuple[str, Any] | None:
        """Until the run has ended."""
        return hear(pipe, sentinel, self._started, self._measured)

    def _started(self, first_step: int, num_steps: int) -> None:
        self.num_steps = num_steps
        self.note(f"{self.label}  {num_steps} steps")

    def _measured(self, step: int, loss: float) -> None:
        self.note(f"{self.label}  step {step}/{self.num_steps}, held-out loss {loss:.4g}")


def _objective(folder: Path, code: int, teller: _Teller) -> float:
    result = recorded(folder) or {}
    if code == 0 and result.get("status") == "ok":
        loss = result.get("eval_loss")  # null where it is not finite, and of prompts alone
        numbers = f"held-out loss {'-' if loss is None else f'{loss:.4g}'}, {result['tokens_per_s']:.0f} tokens/s"
        teller.note(f"{teller.label}  done: {numbers}")
        return objective_of(result)
    reason = result.get("error") or f"its process ended with exit code {code}"
    if not STOP.is_set():
        teller.note(f"{teller.label}  {result.get('status') or 'failed'}: {str(reason).splitlines()[0]}")
    raise RunError(f"{teller.label}: {reason}")


def _common(jobs: Sequence[Sequence[str]]) -> frozenset[str]:
    return frozenset(set(jobs[0]).intersection(*jobs[1:])) if len(jobs) > 1 else frozenset()


def _all(launch: Callable[[int], JobReturn], numbers: range) -> list[JobReturn]:
    """All jobs, each waiting in a thread of its own."""
    STOP.clear()
    with signals_raise(signal.SIGTERM), ThreadPoolExecutor(len(numbers)) as pool:
        waiting: list[Future[JobReturn]] = [pool.submit(launch, number) for number in numbers]
        try:
            wait(waiting)
        except BaseException:
            interrupt()
            raise
    return [job.result() for job in waiting]


def _configs(context: HydraContext, tree: DictConfig, jobs: Sequence[Sequence[str]], first: int) -> list[RunConfig]:
    """The settings of the jobs; one that cannot be right fails as a job and says so there.

    Raises:
        ConfigError: two jobs would have one folder.
        RunError: the folder of one holds a run of other settings.
    """
    found, folders = [], set[str]()
    for number, words in enumerate(jobs, first):
        composed = context.config_loader.load_sweep_config(tree, list(words))
        with read_write(composed), open_dict(composed):
            composed.hydra.job.num = number
            folder = _subdir(composed)
            del composed["hydra"]
        if folder in folders:
            raise ConfigError(
                f"hydra.sweep.subdir={folder} is one folder for several points. Leave it out, or put their number into "
                "it: 'hydra.sweep.subdir=${hydra.job.num}'"
            )
        folders.add(folder)
        try:
            config = parse(composed)
        except LlamaLabError:
            continue
        check_own_run(RunDir(Path(str(tree.hydra.sweep.dir)) / folder), config)
        found.append(config)
    return found


def _subdir(composed: DictConfig) -> str:
    """The folder of a job as Hydra will name it; ${hydra:...} is read from the configuration of the process."""
    before = HydraConfig.instance().cfg
    try:
        HydraConfig.instance().set_config(composed)
        return str(composed.hydra.sweep.subdir)
    finally:
        HydraConfig.instance().cfg = before


def _silent(tree: DictConfig) -> DictConfig:
    """Hydra's launchers say two lines a job."""
    tree = copy.deepcopy(tree)
    with read_write(tree), open_dict(tree):
        tree.hydra.hydra_logging = SILENT
    return tree
