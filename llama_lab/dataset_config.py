"""The settings of the config group `dataset`, as config.py has those of the others."""

from dataclasses import dataclass, field

from llama_lab.choices import DataFormat, LongRows, LossOn
from llama_lab.errors import ConfigError, check_range, did_you_mean
from llama_lab.trainer_config import MAX_COUNT

EMBEDDED_DATASETS = ("sample", "sample_preference", "sample_rewards")
"""The names of the data sets that come with llama_lab."""


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
