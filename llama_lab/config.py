"""The settings of a run: one dataclass a config group. Hydra composes them, `llama_lab.parse` checks them.

The defaults of every setting stand here and nowhere else; the YAML files of conf/ hold what makes a choice
different. Nothing in this module imports torch, so a wrong setting is found in a fraction of a second.
"""

from dataclasses import dataclass, field, replace
from math import inf, isqrt
from typing import Any

from omegaconf import MISSING

from llama_lab.choices import (
    Attention,
    Bias,
    ComputeDtype,
    DataFormat,
    Engine,
    LongRows,
    LoraInit,
    LossOn,
    Memory,
    ModelSource,
    Optimizer,
    QuantType,
    Resume,
    RewardScale,
    Schedule,
    Tracker,
    TrackingMode,
    TrainerLoss,
    TrainerName,
)
from llama_lab.errors import ConfigError, check_range, did_you_mean
from llama_lab.own_settings import check_own

OWN_ADAPTER = "default"
"""PEFT's name of an adapter that has its model for itself."""
LLAMA_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a Llama decoder block; their names are the legal LoRA targets."""

LLAMA_MODULES = (*LLAMA_LINEAR, "embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm")
"""Modules with weights of a Llama model; their names are the legal lora.modules_to_save."""


EMBEDDED_DATASETS = ("sample", "sample_preference", "sample_rewards")
"""The names of the data sets that come with llama_lab."""


MAX_AT_ONCE, MAX_COUNT, MAX_EPOCHS = 2**16, 10**12, 10**4
"""Rows in a batch and batches in a step; rows and steps in all; passes. More is a slip of the finger, and what counts
them would take for ever."""


def divisors(number: int) -> list[int]:
    """All whole numbers that divide it, the largest first."""
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)}, reverse=True)


@dataclass(kw_only=True)
class ModelSettings:
    """The frozen base model and its tokenizer."""

    name: str = MISSING
    """A hub id (`NousResearch/Llama-2-7b-hf`), a folder, or a short name where the source is not the hub."""
    source: ModelSource = ModelSource.hub
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    package: str | None = None
    """source=package: the pip package that holds `file`."""
    file: str | None = None
    """source=package: the GGUF file inside the package."""
    adapter: str | None = None
    """The folder of a finished run, or of a PEFT adapter: the run goes on with its adapter instead of a fresh one."""
    chat_template: str | None = None
    """A template of llama_lab/data/templates by name; null takes the tokenizer's own."""
    pad_token: str | None = None
    """null: the tokenizer's own unless that is the EOS, else <unk>. Never the EOS: the model would not stop."""
    learning_rate: float = 2e-4
    """What suits LoRA on a model of this size; trainer.learning_rate takes it. Source: QLoRA, table 9."""
    preference_learning_rate: float = 5e-6
    """What suits DPO, KTO, GRPO and RLOO on it; trainer.learning_rate takes it. Source: DPO of Zephyr 7B with QLoRA."""
    batch_size: int = 4
    """Rows of a step that suit it; trainer.per_device_train_batch_size takes it."""
    attn_implementation: Attention = Attention.sdpa
    trust_remote_code: bool = False
    """Run Python code that came with the model."""

    def __post_init__(self) -> None:
        check_range(0 < self.learning_rate < inf, "model.learning_rate", self.learning_rate, "type a positive number")
        rate = self.preference_learning_rate
        check_range(0 < rate < inf, "model.preference_learning_rate", rate, "type a positive number")
        check_range(self.batch_size >= 1, "model.batch_size", self.batch_size, "type at least 1")
        if not self.name.strip():
            raise ConfigError("model.name is empty. Type a folder, a hub id as OWNER/NAME, or model=llama2_7b.")
        if self.source is ModelSource.package and not (self.package and self.file):
            raise ConfigError("model.source=package needs model.package and model.file. Type model=smollm2_135m.")


@dataclass(kw_only=True)
class QuantSettings:
    """How the frozen base is stored and in which type it computes."""

    type: QuantType = MISSING
    double_quant: bool = False
    """Quantise the quantisation constants too: 0.37 bits a parameter less (QLoRA, section 3). 4-bit only."""
    compute_dtype: ComputeDtype = ComputeDtype.auto

    @property
    def is_4bit(self) -> bool:
        """Whether weights are stored in 4 bits."""
        return self.type in (QuantType.nf4, QuantType.fp4)

    def __post_init__(self) -> None:
        if self.double_quant and not self.is_4bit:
            raise ConfigError(
                f"quant.double_quant=true needs a 4-bit type, and quant.type is {self.type}. "
                "Type quant.double_quant=false, or quant=nf4."
            )


@dataclass(kw_only=True)
class LoraSettings:
    """The adapter: W x + (alpha / r) B A x with A (r, d_in) and B (d_out, r). LoRA, arXiv 2106.09685."""

    r: int = 16
    """Rank."""
    alpha: float = 16.0
    """The update is scaled by alpha / r (alpha / sqrt(r) with use_rslora). Source: QLoRA, arXiv 2305.14314."""
    dropout: float = 0.05
    """Share of the adapter's inputs that are zeroed in training."""
    target_modules: Any = "all-linear"
    """`all-linear`, or a list of layer names: lora.target_modules=[q_proj,v_proj]."""
    bias: Bias = Bias.none
    init: LoraInit = LoraInit.default
    use_rslora: bool = False
    """Scale by alpha / sqrt(r): arXiv 2312.03732."""
    use_dora: bool = False
    """Learn each column's magnitude apart from its direction: arXiv 2402.09353."""
    modules_to_save: list[str] = field(default_factory=list)
    """Modules trained in full and stored with the adapter, such as embed_tokens."""
    layers_to_transform: list[int] = field(default_factory=list)
    """Decoder layers that get an adapter; empty is all of them. Needs a list of target_modules."""

    def __post_init__(self) -> None:
        check_range(
            1 <= self.r <= 8192, "lora.r", self.r, "the rank is a whole number from 1 to 8192, such as lora.r=16"
        )
        check_range(0 < self.alpha < inf, "lora.alpha", self.alpha, "type a positive number, such as lora.alpha=16")
        check_range(0 <= self.dropout < 1, "lora.dropout", self.dropout, "type a number from 0 up to, but not, 1")
        targets = self.target_modules
        if targets != "all-linear":
            is_list = isinstance(targets, list) and targets and all(isinstance(t, str) for t in targets)
            if not is_list:
                raise ConfigError(
                    f"lora.target_modules={targets} is neither all-linear nor a list of layer names. "
                    "Type lora.target_modules=all-linear, or lora.target_modules=[q_proj,v_proj]."
                )
            for name in targets:
                check_target(name)
        for layer in self.layers_to_transform:
            check_range(layer >= 0, "lora.layers_to_transform", layer, "decoder layers are counted from 0")
        for name in self.modules_to_save:
            if name.split(".")[-1] not in LLAMA_MODULES:
                raise ConfigError(
                    f"lora.modules_to_save holds {name}, which no Llama model has.{did_you_mean(name, LLAMA_MODULES)} "
                    f"It can hold: {', '.join(LLAMA_MODULES)}."
                )


def check_target(name: str) -> None:
    """Refuse a LoRA target that no Llama model has, and lm_head, which TRL's loss reads past."""
    if name == "lm_head":
        raise ConfigError(
            "lora.target_modules holds lm_head. TRL computes the loss from lm_head's frozen weight directly, so an "
            "adapter there would never be trained. Leave it out."
        )
    if name.split(".")[-1] not in LLAMA_LINEAR:
        raise ConfigError(
            f"lora.target_modules holds {name}, which no Llama model has."
            f"{did_you_mean(name, LLAMA_LINEAR)} The linear layers are: {', '.join(LLAMA_LINEAR)}."
        )


@dataclass(kw_only=True)
class ColumnSettings:
    """What the file calls our columns: dataset.columns.prompt=question says that its questions are our prompts."""

    text: str = "text"
    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    conversations: str = "conversations"
    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"
    quote: str = "quote"
    author: str = "author"
    chosen: str = "chosen"
    """Of preference rows: the better answer, or the whole conversation with it."""
    rejected: str = "rejected"
    label: str = "label"
    """Of unpaired preference rows: whether the answer is a good one."""


@dataclass(kw_only=True)
class DatasetSettings:
    """The rows: where they are, what their columns mean, and which of their tokens are learned."""

    name: str | None = None
    """A hub id, or `sample`, `sample_preference` or `sample_rewards`, the data sets that come with llama_lab."""
    path: str | None = None
    """A local JSONL, JSON, CSV, TSV or Parquet file, or a folder of files of one kind. Not together with `name`."""
    package: str | None = None
    """An installed Python package that holds `file`. Neither together with `name` nor with `path`."""
    file: str | None = None
    """The data file inside `package`, by its path in there."""
    revision: str | None = None
    subset: str | None = None
    """The hub data set's configuration name."""
    split: str = "train"
    eval_split: str | None = None
    """Held-out split; null holds `eval_fraction` of the training rows out, drawn by the run's seed."""
    eval_fraction: float = 0.05
    """Share of the rows that is held out, at least one, where eval_split is null."""
    format: DataFormat = DataFormat.auto
    columns: ColumnSettings = field(default_factory=ColumnSettings)
    system_prompt: str | None = None
    """Put before every conversation that has none of its own."""
    max_train_rows: int | None = None
    """The first so many, of those that are not held out; null is all."""
    max_eval_rows: int | None = None
    """The first so many of the held-out rows; null is all."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be read or converted, and what follows where a file breaks off; the run says how many
    and why. false stops at the first of them."""
    max_length: int = 1024
    """Tokens of a row."""
    long_rows: LongRows = LongRows.cut
    """What becomes of a row that is longer; the run says how many were."""
    packing: bool = False
    """Whole rows share blocks of max_length tokens without seeing each other: hardly any padding."""
    pad_to_multiple_of: int | None = None
    """Batches are padded to a multiple of so many tokens; null pads to the longest row."""
    loss_on: LossOn = LossOn.auto
    ghost_attention: bool = False
    """Rows with a system message: it is taken out of all questions but the first, and the last answer alone is learned,
    whatever loss_on says. The answers must have been sampled for it: data/ghost.py. Llama 2, arXiv 2307.09288, 3.3."""
    max_cut_share: float = 0.25
    """The run refuses data of which more rows than this share are cut to max_length."""
    max_empty_share: float = 0.1
    """... of which more rows than this share are empty."""
    max_duplicate_share: float = 0.25
    """... of which more training rows than this share are copies of another."""
    max_leak_share: float = 0.1
    """... of which more held-out prompts than this share are in the training rows as well."""
    metrics: list[str] = field(default_factory=list)
    """What is measured on greedy answers to held-out prompts: exact_match, composes."""

    def __post_init__(self) -> None:
        for key in ("max_train_rows", "max_eval_rows"):
            value = getattr(self, key)
            check_range(
                value is None or 1 <= value <= MAX_COUNT,
                f"dataset.{key}",
                value,
                f"type 1 to {MAX_COUNT}, or null for all rows",
            )
        check_range(self.max_length >= 8, "dataset.max_length", self.max_length, "type at least 8 tokens")
        for key in ("max_cut_share", "max_empty_share", "max_duplicate_share", "max_leak_share"):
            check_range(0 <= getattr(self, key) <= 1, f"dataset.{key}", getattr(self, key), "type a share from 0 to 1")
        multiple = self.pad_to_multiple_of
        check_range(
            multiple is None or 1 <= multiple <= 1024,
            "dataset.pad_to_multiple_of",
            multiple,
            "type 1 to 1024, or null",
        )
        check_range(
            0 < self.eval_fraction < 1, "dataset.eval_fraction", self.eval_fraction, "type a number between 0 and 1"
        )
        known = ("exact_match", "composes")
        for metric in self.metrics:
            if metric not in known:
                raise ConfigError(
                    f"dataset.metrics holds {metric}.{did_you_mean(metric, known)} It can hold: {', '.join(known)}."
                )
        self._check_source()

    def _check_source(self) -> None:
        """Refuse none and several sources, and settings of another source than the one that is read."""
        if self.name and self.path:
            raise ConfigError(
                f"dataset.name={self.name} and dataset.path={self.path} are both set. "
                f"Type dataset=jsonl dataset.path={self.path} to train on the file."
            )
        if self.package and (self.name or self.path):
            key, value = ("name", self.name) if self.name else ("path", self.path)
            raise ConfigError(
                f"dataset.package={self.package} and dataset.{key}={value} are both set. Type dataset.{key}=null, or "
                "leave dataset.package out."
            )
        if self.file and not self.package:
            raise ConfigError(
                f"dataset.file={self.file} is a file inside of dataset.package, which is not set. A file of yours is "
                f"named by dataset=jsonl dataset.path={self.file}"
            )
        if self.package and not self.file:
            raise ConfigError(f"dataset.package={self.package} needs dataset.file, the data file inside of it.")
        if not self.name and not self.path and not self.package:
            raise ConfigError("No data set is named. Type dataset=sample, or dataset=jsonl dataset.path=FILE.")
        local = self.path or self.package or (self.name if self.name in EMBEDDED_DATASETS else None)
        for key, default in (("split", "train"), ("eval_split", None), ("subset", None), ("revision", None)):
            if getattr(self, key) != default and local:
                raise ConfigError(
                    f"dataset.{key}={getattr(self, key)} belongs to a data set of the hub, and the run reads "
                    f"{local}. Leave it out."
                )


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

    @property
    def effective_batch_size(self) -> int:
        """Rows of one optimizer step on one device."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

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


@dataclass(kw_only=True)
class TrackingSettings:
    """W&B or another tracker: which project, and under which name."""

    backend: Tracker = Tracker.wandb
    mode: TrackingMode = TrackingMode.auto
    """Of W&B; disabled turns every other tracker off, too."""
    project: str = "llama_lab"
    """MLflow calls it an experiment."""
    entity: str | None = None
    """Of W&B: the user or team that owns the project; null is the account's own."""
    group: str | None = None
    """Of W&B: runs that belong together; null is none, and in a grid or a study its name."""
    job_type: str = "train"
    """Of W&B: what kind of run it is within its group."""
    tags: list[str] = field(default_factory=list)
    name: str | None = None
    """null: the overrides, such as `lora.r=64 quant=fp4`."""
    notes: str | None = None
    log_adapter: bool = False
    """Upload the trained adapter as an artifact of the run."""

    def __post_init__(self) -> None:
        # W&B refuses these when the run starts, in words of its own
        if not 1 <= len(self.project) <= 128 or set(self.project) & set("/\\#?%:"):
            raise ConfigError(
                f"tracking.project={self.project}: W&B takes 1 to 128 characters, none of them / \\ # ? % or :. "
                "The owner of a project is named by tracking.entity."
            )
        for tag in self.tags:
            if not 1 <= len(tag) <= 64:
                raise ConfigError(f"tracking.tags holds '{tag}'. A tag of W&B has 1 to 64 characters.")


@dataclass(kw_only=True)
class EvaluateSettings:
    """What is measured on held-out rows before and after training."""

    before: bool = True
    """Measure the base model's loss and sample answers too, so that the gain is known."""
    metrics_before: bool = False
    """Score dataset.metrics before training as well: as many answers again."""
    batch_size: int = 8
    """Rows or prompts at once, whatever a step of training has."""
    max_new_tokens: int = 40
    """Tokens an answer may have when it is scored by dataset.metrics."""

    def __post_init__(self) -> None:
        check_range(self.batch_size >= 1, "evaluate.batch_size", self.batch_size, "type at least 1")
        check_range(self.max_new_tokens >= 1, "evaluate.max_new_tokens", self.max_new_tokens, "type at least 1")


@dataclass(kw_only=True)
class GenerationSettings:
    """The prompts of samples.md and how they, and `generate` and `chat`, are answered."""

    prompts: list[str] = field(default_factory=list)
    """Empty: the first `num_prompts` held-out prompts."""
    num_prompts: int = 3
    max_new_tokens: int | None = 64
    """Tokens of an answer, at most."""
    max_length: int | None = None
    """Prompt and answer together, in tokens; used where max_new_tokens is null."""
    do_sample: bool = False
    """false is greedy; true draws by temperature and top_p."""
    temperature: float = 1.0
    """Logits are divided by it, where do_sample is true."""
    top_p: float = 1.0
    """Drawn from the likeliest tokens that have this much of the probability, where do_sample is true."""
    repetition_penalty: float = 1.0
    """Logits of tokens that stand there already are divided by it (multiplied, where negative): arXiv 1909.05858."""

    def __post_init__(self) -> None:
        check_range(self.num_prompts >= 0, "generation.num_prompts", self.num_prompts, "type 0 or more")
        for key in ("max_new_tokens", "max_length"):
            value = getattr(self, key)
            check_range(value is None or value >= 1, f"generation.{key}", value, "type at least 1, or null")
        if self.max_new_tokens is None and self.max_length is None:
            raise ConfigError("generation.max_new_tokens and generation.max_length are both null. Set one of them.")
        check_range(0 < self.top_p <= 1, "generation.top_p", self.top_p, "type a number above 0, at most 1")
        for key in ("temperature", "repetition_penalty"):
            value = getattr(self, key)
            check_range(0 < value < inf, f"generation.{key}", value, "type a positive number")


@dataclass(kw_only=True)
class RunConfig:
    """A whole run."""

    model: ModelSettings = MISSING
    quant: QuantSettings = MISSING
    lora: LoraSettings = MISSING
    dataset: DatasetSettings = MISSING
    trainer: TrainerSettings = MISSING
    tracking: TrackingSettings = MISSING
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    stages: dict[str, list[str]] = field(default_factory=dict)
    """Several runs instead of one, by name, each with the words that make it different; each goes on with the adapter
    of the one before (stages.py)."""
    seed: int = 0
    """Of the adapter's start, the order of the rows, dropout, and the held-out split."""
    objective: str = "eval_loss"
    """The key of result.json that a sweep optimises; it is what the process returns to Hydra."""
    resume: str | None = None
    """The folder of an interrupted run: resume=outputs/2026-01-31/12-00-00."""
    verbose: bool = False
    """Show the libraries' own log lines too."""

    def __post_init__(self) -> None:
        check_range(0 <= self.seed < 2**32, "seed", self.seed, "type a whole number from 0 to 4294967295")
