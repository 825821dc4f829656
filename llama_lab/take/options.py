"""What the verbs can be asked for. Nothing here imports torch."""

from dataclasses import dataclass
from enum import StrEnum

EVALUATION_FILE = "evaluation.json"
MERGE_FILE = "merge.json"
"""The numbers of a merge, in the merged folder."""
MODELFILE = ".Modelfile"
"""The end of the name of Ollama's file beside a GGUF."""
MAX_PORT = 65535


class Onto(StrEnum):
    """The weights that the adapter is added to."""

    original = "original"
    """Those of the model as it came."""
    dequantised = "dequantised"
    """The numbers that the quantised weights stand for: what the adapter was trained on."""
    quantised = "quantised"
    """The quantised weights themselves, quantised again afterwards: what many do, and what loses the training."""


class OutDtype(StrEnum):
    """The type in which merged weights are stored."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


@dataclass(kw_only=True)
class MergeOptions:
    """What is asked for."""

    dtype: OutDtype
    onto: Onto | None
    """None tries both and takes the most faithful."""
    max_kl: float
    """Nats a token; above it the merge is refused."""
    num_rows: int
    """Held-out rows that are compared."""
    force: bool


@dataclass(kw_only=True)
class EvaluateOptions:
    """What is measured beside held-out loss and the data set's own metrics."""

    base: bool
    """The base model, too."""
    tasks: list[str]
    """Of lm-eval: names, or files."""
    limit: int | None
    """Rows of each task; None takes all."""
    chat_template: bool
    """Ask the tasks through the chat template."""


class GgufKind(StrEnum):
    """How a GGUF stores its weights."""

    f16 = "f16"
    bf16 = "bf16"
    f32 = "f32"
    q8_0 = "q8_0"


class Server(StrEnum):
    """Programs of others that speak OpenAI's protocol."""

    transformers = "transformers"
    vllm = "vllm"
    llama_cpp = "llama-cpp"
