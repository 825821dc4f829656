"""What both ways to train share: their settings, and what they tell."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from llama_lab import ranks
from llama_lab.checkpoints import PARTIAL, checkpoints_in, flush, last_checkpoint, step_of
from llama_lab.choices import Engine, Memory
from llama_lab.config import RunConfig
from llama_lab.errors import RunError
from llama_lab.events import Listener
from llama_lab.quant import compute_dtype
from llama_lab.results import FitResult
from llama_lab.rundir import RunDir
from llama_lab.trainer_config import TrainerSettings


@dataclass(kw_only=True)
class FitSettings:
    """What a way to train needs to know beside model and data."""

    trainer: TrainerSettings
    engine: Engine
    """Fast or standard; on a CPU the model has been sped up where it is fast."""
    seed: int
    checkpoints: Path
    """Complete checkpoints lie here as checkpoint-STEP."""
    autocast_bf16: bool
    """What trainer.bf16=null means on this device."""
    memory: Memory = Memory.balanced
    """What the fast engine keeps on a GPU."""
    pad_to_multiple_of: int | None = None
    runtime_before_s: float = 0.0
    """Seconds of training before the checkpoint that is resumed from."""
    losses_before: Sequence[float] = ()
    """That were logged before it."""
    note: Callable[[str], None] = print
    """Tells the user one line."""


def fit_settings(
    config: RunConfig, run_dir: RunDir, engine: Engine, memory: Memory, note: Callable[[str], None] = print
) -> FitSettings:
    """What training needs to know of a run.

    Args:
        note: tells the user one line.
    """
    logged = [row for row in run_dir.read_metrics() if "train/runtime_s" in row]
    return FitSettings(
        trainer=config.trainer,
        seed=config.seed,
        checkpoints=run_dir.checkpoints,
        engine=engine,
        memory=memory,
        note=note,
        autocast_bf16=torch.cuda.is_available() and compute_dtype(config.quant)[0] is torch.bfloat16,
        pad_to_multiple_of=config.dataset.pad_to_multiple_of,
        runtime_before_s=logged[-1]["train/runtime_s"] if logged else 0.0,
        losses_before=[row["train/loss"] for row in logged],
    )


@dataclass(kw_only=True)
class Recorder:
    """Tells the listener what happens, and sums up the numbers of a run."""

    settings: FitSettings
    listener: Listener
    evaluate: Callable[[], dict[str, float]]
    """Held-out numbers of the model as it is."""
    start_step: int
    losses: list[float] = field(default_factory=list)
    started_at: float = 0.0
    paused_s: float = 0.0
    ended_at: float | None = None
    eval_at: Collection[int] = ()
    """Steps after which a listener wants held-out numbers; trainer.eval_steps goes before that."""
    num_tokens: int = 0
    """Real tokens trained on in this process."""
    num_steps: int = 0

    def begin(self, num_steps: int) -> None:
        """Training of `num_steps` steps in all begins."""
        self.started_at, self.num_steps = time.monotonic(), num_steps
        self.eval_at = self.listener.started(self.start_step, num_steps) or ()

    def end(self) -> None:
        """Training is over; what comes now is not counted."""
        self.ended_at = time.monotonic()

    def wants_eval(self, step: int) -> bool:
        """Whether held-out numbers are due after this step."""
        every = self.settings.trainer.eval_steps
        return step < self.num_steps and (step % every == 0 if every else step in self.eval_at)

    def measure(self, step: int) -> None:
        """Held-out numbers, outside of the training's time."""
        began = time.monotonic()
        self.listener.logged(step, self.evaluate())
        self.paused_s += time.monotonic() - began

    def log(self, step: int, loss: float, numbers: dict[str, float]) -> None:
        """Tell the mean loss since the last time and other numbers of the step.

        Raises:
            RunError: the loss is not finite.
        """
        if not math.isfinite(loss):
            rate = self.settings.trainer.learning_rate
            raise not_finite(f"The training loss is {loss} at step {step}", float(rate))
        self.losses.append(loss)
        metrics = {"train/loss": loss} | {f"train/{name}": value for name, value in numbers.items()}
        metrics["train/tokens_per_s"] = self.tokens_per_s()
        metrics["train/runtime_s"] = self.settings.runtime_before_s + self.seconds()
        metrics["train/peak_memory_gib"] = peak_memory_gib()
        self.listener.logged(step, metrics)

    def complete(self, step: int) -> None:
        """A checkpoint has been written in full: it gets its name, and the oldest go."""
        name = f"checkpoint-{step}"
        partial, final = self.settings.checkpoints / PARTIAL / name, self.settings.checkpoints / name
        flush(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        self._drop_old()

    def seconds(self) -> float:
        """Seconds of training in this process; evaluation left out."""
        return (self.ended_at or time.monotonic()) - self.started_at - self.paused_s

    def tokens_per_s(self) -> float:
        """Real tokens a second of this process."""
        return self.num_tokens / max(self.seconds(), 1e-9)

    def result(self, num_steps: int) -> FitResult:
        """The training in numbers; the loss is the mean of the logged ones, NaN where no step was taken."""
        losses = [*self.settings.losses_before, *self.losses]
        return FitResult(
            num_steps=num_steps,
            train_loss=sum(losses) / len(losses) if losses else math.nan,
            train_runtime_s=self.settings.runtime_before_s + self.seconds(),
            tokens_per_s=self.tokens_per_s(),
        )

    def _drop_old(self) -> None:
        limit = self.settings.trainer.save_total_limit
        kept = checkpoints_in(self.settings.checkpoints)
        for old in kept[: -limit if limit else 0]:
            # renamed first: a kill during the removal must not leave half a checkpoint under a checkpoint's name
            doomed = self.settings.checkpoints / PARTIAL / f"old-{old.name}"
            doomed.parent.mkdir(exist_ok=True)
            old.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


@contextmanager
def recording(
    settings: FitSettings, listener: Listener, evaluate: Callable[[], dict[str, float]]
) -> Iterator[tuple[Path | None, Recorder]]:
    """The checkpoint to go on from, if there is one, and who records; afterwards the listener is told of the end."""
    start = last_checkpoint(settings.checkpoints)
    if ranks.is_first():
        shutil.rmtree(settings.checkpoints / PARTIAL, ignore_errors=True)
    try:
        yield start, Recorder(settings=settings, listener=listener, evaluate=evaluate, start_step=step_of(start))
    finally:
        listener.ended()
        if ranks.is_first():
            shutil.rmtree(settings.checkpoints / PARTIAL, ignore_errors=True)


def not_finite(said: str, learning_rate: float) -> RunError:
    """The error of a run whose numbers are no longer finite, with what to type."""
    return RunError(
        f"{said}. Type a smaller trainer.learning_rate than {learning_rate:g}, or trainer.max_grad_norm=0.3."
    )


def peak_memory_gib() -> float:
    """Peak memory in GiB: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return _peak_of_process() / 2**20


def _peak_of_process() -> int:
    """KiB. By Linux's own count; getrusage's is never less than what the process held that has started this one."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(status.partition("VmHWM:")[2].split()[0])


def forget_peak() -> None:
    """Let what comes next in this process have a peak of its own. A kernel that does not allow it keeps that of all."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: the peak becomes what the process holds now
