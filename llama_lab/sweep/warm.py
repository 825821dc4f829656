"""What the process that trials are forked from imports: the libraries, once for all trials.

Where there is a GPU only those that leave it alone: a process forked after CUDA has begun cannot use it, and the
trainer of transformers imports bitsandbytes, which asks the GPU what it can. What the libraries print is left out here,
and what goes wrong, too: a trial imports them again and says so in its own output.
"""

import gc
import os
from contextlib import suppress
from importlib import import_module

from llama_lab.sweep.slots import has_gpu

BESIDE_A_GPU = (
    *("torch", "transformers", "datasets", "accelerate", "trl", "wandb"),
    *("transformers.models.llama.modeling_llama", "torch._inductor.compile_fx"),  # most of what is left then
)

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # is_available() then asks the driver without CUDA
_nowhere = os.open(os.devnull, os.O_WRONLY)
for _stream in (1, 2):
    os.dup2(_nowhere, _stream)
for _name in BESIDE_A_GPU if has_gpu() else ("llama_lab.runner", "llama_lab.trainer"):
    with suppress(Exception):
        import_module(_name)
gc.collect()
gc.freeze()  # so that a trial copies no memory only to look for garbage in it
