"""The settings that take one of a few words. Nothing here imports torch."""

from enum import StrEnum


class ModelSource(StrEnum):
    """Where the weights come from: a hub id or a folder, a GGUF inside a pip package, or a seed."""

    hub = "hub"
    package = "package"
    random = "random"


class QuantType(StrEnum):
    """How the frozen base is stored. NF4 and FP4: QLoRA, arXiv 2305.14314; int8: LLM.int8(), arXiv 2208.07339."""

    nf4 = "nf4"
    fp4 = "fp4"
    int8 = "int8"
    none = "none"


class ComputeDtype(StrEnum):
    """The type of activations; `auto` is bf16 where the device is fast at it and fp32 elsewhere."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class LoraInit(StrEnum):
    """How A and B start. All but `pissa`, `olora` and `loftq` leave the base as it was."""

    default = "default"
    gaussian = "gaussian"
    olora = "olora"
    pissa = "pissa"
    orthogonal = "orthogonal"
    loftq = "loftq"


class Bias(StrEnum):
    """Which biases are trained beside the adapter (PEFT's own words)."""

    none = "none"
    all = "all"
    lora_only = "lora_only"


class DataFormat(StrEnum):
    """What the columns of a data set mean; `auto` reads it from their names."""

    auto = "auto"
    text = "text"
    prompt_completion = "prompt_completion"
    messages = "messages"
    sharegpt = "sharegpt"
    guanaco = "guanaco"
    alpaca = "alpaca"
    quotes = "quotes"
    preference = "preference"
    unpaired_preference = "unpaired_preference"
    prompt = "prompt"


class LongRows(StrEnum):
    """What becomes of a row with more than dataset.max_length tokens.

    `cut` leaves out its end, `drop` all of it; `split` goes on in further rows, each of which begins with a BOS. Where
    the tokenizer adds none, it begins with the token before, which is not learned again.
    """

    cut = "cut"
    drop = "drop"
    split = "split"  # type: ignore[assignment]  # a name of str's, too


class LossOn(StrEnum):
    """Which tokens are learned; never BOS and padding.

    `completion` is the last answer with its EOS, `assistant` every answer with its EOS, `all` the prompts as well.
    `auto` is `all` for rows of text, which mark no answers, else `completion`.
    """

    auto = "auto"
    completion = "completion"
    assistant = "assistant"
    all = "all"


class Attention(StrEnum):
    """The attention kernel (transformers' words)."""

    sdpa = "sdpa"
    eager = "eager"
    flash_attention_2 = "flash_attention_2"
    flex_attention = "flex_attention"


class Engine(StrEnum):
    """How a step is computed: `fast` with the fewer operations of llama_lab/engine, `standard` by TRL, PEFT and
    bitsandbytes alone. `auto` is fast wherever the fast one computes the settings (engine/suits.py for a GPU).
    """

    auto = "auto"
    fast = "fast"
    standard = "standard"


class Memory(StrEnum):
    """What the fast engine keeps in a GPU's memory, from the leanest to the fastest.

    `lean` computes each block again in backward; `balanced` keeps activations; `fast` also keeps the base dequantised.
    `auto` is the fastest that fits.
    """

    auto = "auto"
    lean = "lean"
    balanced = "balanced"
    fast = "fast"


class Optimizer(StrEnum):
    """The optimizers of transformers that suit an adapter; `paged` moves its states to the CPU when the GPU is full."""

    adamw_torch = "adamw_torch"
    adamw_torch_fused = "adamw_torch_fused"
    adamw_8bit = "adamw_8bit"
    paged_adamw_32bit = "paged_adamw_32bit"
    paged_adamw_8bit = "paged_adamw_8bit"
    lion_32bit = "lion_32bit"
    lion_8bit = "lion_8bit"
    adafactor = "adafactor"
    sgd = "sgd"


class Schedule(StrEnum):
    """How the learning rate goes over the steps (transformers' words). `constant` has no warm-up."""

    linear = "linear"
    cosine = "cosine"
    constant = "constant"
    constant_with_warmup = "constant_with_warmup"
    cosine_with_restarts = "cosine_with_restarts"
    polynomial = "polynomial"
    inverse_sqrt = "inverse_sqrt"


class TrainerName(StrEnum):
    """Which of TRL's trainers runs.

    `sft` learns answers; `dpo`, `kto` and `orpo` which answer is the better one; `reward` to score answers; `grpo` and
    `rloo` answers of the model's own that are worth much.
    """

    sft = "sft"
    dpo = "dpo"
    kto = "kto"
    orpo = "orpo"
    reward = "reward"
    grpo = "grpo"
    rloo = "rloo"


class RewardScale(StrEnum):
    """What GRPO divides an advantage by: the deviation of the answers to one prompt, of the whole batch, or nothing."""

    group = "group"
    batch = "batch"
    none = "none"


class TrainerLoss(StrEnum):
    """What a trainer minimises (TRL's words). Which belong to which trainer: own_settings.LOSSES."""

    sigmoid = "sigmoid"
    hinge = "hinge"
    ipo = "ipo"
    exo_pair = "exo_pair"
    nca_pair = "nca_pair"
    robust = "robust"
    bco_pair = "bco_pair"
    sppo_hard = "sppo_hard"
    aot = "aot"
    aot_unpaired = "aot_unpaired"
    apo_zero = "apo_zero"
    apo_down = "apo_down"
    discopop = "discopop"
    sigmoid_norm = "sigmoid_norm"
    kto = "kto"
    apo_zero_unpaired = "apo_zero_unpaired"
    grpo = "grpo"
    bnpo = "bnpo"
    dr_grpo = "dr_grpo"
    dapo = "dapo"


class Resume(StrEnum):
    """`never` refuses a folder that holds a run; `auto` goes on from its last complete checkpoint."""

    never = "never"
    auto = "auto"


class Tracker(StrEnum):
    """Where metrics go beside the run's own files."""

    wandb = "wandb"
    tensorboard = "tensorboard"
    mlflow = "mlflow"
    trackio = "trackio"
    none = "none"


class TrackingMode(StrEnum):
    """`auto` is online where a W&B key is set, else offline; it never asks."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"
