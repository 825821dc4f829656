"""The settings of the config group `trainer`, as config.py has those of the others."""

from dataclasses import dataclass, replace
from math import ceil, inf, isqrt

from llama_lab.choices import Engine, Memory, Optimizer, Resume, RewardScale, Schedule, TrainerLoss, TrainerName
from llama_lab.errors import ConfigError, check_range
from llama_lab.own_settings import check_own

MAX_AT_ONCE, MAX_COUNT, MAX_EPOCHS = 2**16, 10**12, 10**4
"""Rows in a batch and batches in a step; rows and steps in all; passes. More is a slip of the finger, and what counts
them would take for ever."""

POLYNOMIAL_END = 1e-7
"""The rate at which transformers' polynomial schedule ends."""


def divisors(number: int) -> list[int]:
    """All whole numbers that divide it, the largest first."""
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)}, reverse=True)


@dataclass(kw_only=True)
class TrainerSettings:
    """How the adapter is trained; the names are transformers' and TRL's."""

    name: TrainerName = TrainerName.sft
    engine: Engine = Engine.auto
    """The same mathematics with fewer operations, or the libraries' own."""
    memory: Memory = Memory.auto
    """What the fast engine keeps in a GPU's memory; `auto` is the fastest that fits in 90% of it."""
    num_train_epochs: float = 1.0
    max_steps: int = -1
    """Optimizer steps; -1 leaves it to num_train_epochs."""
    per_device_train_batch_size: int = 4
    """Rows that one process reads at once."""
    gradient_accumulation_steps: int = 1
    """So many times of that make an optimizer step."""
    micro_batch_size: str | None = None
    """Rows that go through the model at once: a number, or `auto` for the most that fit in 90% of the memory.

    The rows of a step stay per_device_train_batch_size x gradient_accumulation_steps; null leaves these as they are.
    """
    learning_rate: float = 2e-4
    """The highest, after warm-up."""
    lr_scheduler_type: Schedule = Schedule.linear
    warmup_ratio: float = 0.1
    """Share of the steps; today's transformers takes it as warmup_steps below 1."""
    optim: Optimizer = Optimizer.adamw_torch_fused
    """An adapter's states are small; the paged ones move to the CPU's memory where the GPU's is full."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Gradients of all trained parameters together are scaled down to this norm."""
    group_by_length: bool = False
    """Batches of rows of like length: less padding, but rows are no longer mixed evenly (experiments/default_run)."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, about a third more time."""
    bf16: bool | None = None
    """Autocast to bf16; null is on where the GPU has it and the base computes in bf16."""
    fp16: bool = False
    """Autocast to fp16 with a loss scale; GPU only."""
    neftune_noise_alpha: float | None = None
    """Noise on the embeddings: arXiv 2310.05914."""
    logging_steps: int = 5
    """Loss, gradient norm, learning rate and speed are logged every so many optimizer steps."""
    eval_steps: int | None = None
    """Held-out loss every so many optimizer steps; null only before and after."""
    save_steps: int = 25
    """A checkpoint every so many optimizer steps; 0 writes none."""
    save_total_limit: int | None = 2
    """Older checkpoints beyond so many are removed."""
    resume: Resume = Resume.never
    beta: float | None = None
    """dpo, kto, grpo, rloo: how much it costs to leave the reference model; grpo and rloo have none where it is 0.
    orpo: the weight of the odds ratio (lambda)."""
    loss_type: TrainerLoss | None = None
    """dpo, kto, grpo: what is minimised."""
    label_smoothing: float | None = None
    """dpo: the share of rows whose answers are taken to be the wrong way round, for loss_type=robust and exo_pair."""
    desirable_weight: float | None = None
    """kto: the weight of good answers in the loss."""
    undesirable_weight: float | None = None
    """kto: the weight of bad answers in the loss."""
    center_rewards_coefficient: float | None = None
    """reward: the weight of a term that keeps the scores around 0; 0 leaves it out."""
    rewards: list[str] | None = None
    """grpo, rloo: what answers are worth, by name: composes, exact_match, length, reward_model, package.module:function
    (llama_lab/rewards.py). The reward is their sum, weighted by reward_weights."""
    reward_weights: list[float] | None = None
    """grpo, rloo: one number for each of `rewards`; null weighs all alike."""
    reward_model: str | None = None
    """grpo, rloo: the folder of a finished run of trainer=reward, for rewards=[reward_model]."""
    num_generations: int | None = None
    """grpo, rloo: answers to each prompt, which are compared with each other."""
    max_completion_length: int | None = None
    """grpo, rloo: tokens of an answer, at most."""
    temperature: float | None = None
    """grpo, rloo: of sampling the answers."""
    epsilon: float | None = None
    """grpo, rloo: the ratio of new to old probability counts up to 1 +- epsilon."""
    scale_rewards: RewardScale | None = None
    """grpo: what an answer's advantage is divided by."""
    normalize_advantages: bool | None = None
    """rloo: whether the advantages of a step are brought to mean 0 and deviation 1."""

    def __post_init__(self) -> None:
        check_own(self)
        check_range(0 < self.learning_rate < inf, "trainer.learning_rate", self.learning_rate, "type a positive number")
        check_range(
            self.max_steps == -1 or 1 <= self.max_steps <= MAX_COUNT,
            "trainer.max_steps",
            self.max_steps,
            f"type -1, or 1 to {MAX_COUNT}",
        )
        check_range(
            0 < self.num_train_epochs <= MAX_EPOCHS,
            "trainer.num_train_epochs",
            self.num_train_epochs,
            f"type a positive number up to {MAX_EPOCHS}",
        )
        for key in ("max_grad_norm", "neftune_noise_alpha"):
            value = getattr(self, key)
            check_range(value is None or 0 < value < inf, f"trainer.{key}", value, "type a positive number")
        for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            value = getattr(self, key)
            check_range(1 <= value <= MAX_AT_ONCE, f"trainer.{key}", value, f"type 1 to {MAX_AT_ONCE}")
        for key, low in (
            ("logging_steps", 1),
            ("save_steps", 0),
        ):
            check_range(getattr(self, key) >= low, f"trainer.{key}", getattr(self, key), f"type at least {low}")
        self._check_micro_batch()
        for key in ("eval_steps", "save_total_limit"):
            value = getattr(self, key)
            check_range(value is None or value >= 1, f"trainer.{key}", value, "type at least 1, or null")
        check_range(
            0 <= self.warmup_ratio < 1, "trainer.warmup_ratio", self.warmup_ratio, "type a share from 0 up to 1"
        )
        check_range(0 <= self.weight_decay < inf, "trainer.weight_decay", self.weight_decay, "type 0 or more")
        if self.bf16 and self.fp16:
            raise ConfigError("trainer.bf16 and trainer.fp16 are both on. Type trainer.fp16=false.")
        is_polynomial = self.lr_scheduler_type is Schedule.polynomial
        check_range(
            not is_polynomial or self.learning_rate > POLYNOMIAL_END,
            "trainer.learning_rate",
            self.learning_rate,
            f"trainer.lr_scheduler_type=polynomial ends at {POLYNOMIAL_END}; type more, or lr_scheduler_type=linear",
        )
        if self.max_steps > 0:
            self.check_warmup(self.max_steps)

    @property
    def effective_batch_size(self) -> int:
        """Rows of one optimizer step on one device."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def check_warmup(self, num_steps: int) -> None:
        """Refuse a warm-up that leaves no step to a polynomial decay: transformers divides by their number.

        Args:
            num_steps: optimizer steps of the run.
        Raises:
            ConfigError: see above.
        """
        if self.lr_scheduler_type is Schedule.polynomial and ceil(num_steps * self.warmup_ratio) >= num_steps:
            raise ConfigError(
                "trainer.lr_scheduler_type=polynomial has no step to decay in: "
                f"trainer.warmup_ratio={self.warmup_ratio} takes all of {num_steps}. "
                "Type trainer.warmup_ratio=0, or trainer.lr_scheduler_type=linear."
            )

    def with_micro_batch(self, size: int) -> "TrainerSettings":
        """The same optimizer steps, `size` rows at a time."""
        return replace(
            self,
            micro_batch_size=None,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=self.effective_batch_size // size,
        )

    def _check_micro_batch(self) -> None:
        wanted, effective = self.micro_batch_size, self.effective_batch_size
        if wanted is None or wanted == "auto":
            return
        fitting = divisors(effective)[::-1]
        check_range(
            wanted.isdecimal() and int(wanted) in fitting,
            "trainer.micro_batch_size",
            wanted,
            f"type auto, or a number that divides the {effective} rows of a step: {', '.join(map(str, fitting))}",
        )
