"""The settings of a run: one dataclass a config group. Hydra composes them, `compose.parse` checks them.

The defaults of every setting stand here, in dataset_config.py and in trainer_config.py, and nowhere else; the YAML
files of conf/ hold what makes a choice different. Nothing in these modules imports torch, so a wrong setting is found
in a fraction of a second.
"""

from dataclasses import dataclass, field
from math import inf
from typing import Any

from omegaconf import MISSING

from llama_lab.choices import Attention, Bias, ComputeDtype, LoraInit, ModelSource, QuantType, Tracker, TrackingMode
from llama_lab.dataset_config import DatasetSettings
from llama_lab.errors import ConfigError, check_range, did_you_mean
from llama_lab.trainer_config import TrainerSettings

OWN_ADAPTER = "default"
"""PEFT's name of an adapter that has its model for itself."""
LLAMA_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a Llama decoder block; their names are the legal LoRA targets."""

LLAMA_MODULES = (*LLAMA_LINEAR, "embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm")
"""Modules with weights of a Llama model; their names are the legal lora.modules_to_save."""


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
