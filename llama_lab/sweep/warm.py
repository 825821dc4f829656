"""What the process that trials are forked from imports: the libraries, once for all trials.

Where there is a GPU only those that leave it alone: a process forked after CUDA has begun cannot use it, and the
trainer of transformers imports bitsandbytes, which asks the GPU what it can. What the libraries print is left out here,
and what goes wrong, too: a trial imports them again and says so in its own output.
"""

import gc
import os
import threading
from contextlib import suppress
from importlib import import_module

from llama_lab.sweep.slots import has_gpu

BESIDE_A_GPU = (
    *("torch", "transformers", "datasets", "accelerate", "trl", "wandb"),
    *("transformers.models.llama.modeling_llama", "torch._inductor.compile_fx"),  # most of what is left then
)

_STUDY = os.getppid()
_imported = threading.Event()


def _end_with_study() -> None:
    """Of a study that was killed nothing is left; multiprocessing looks for its end only once all is imported."""
    while not _imported.wait(0.2):
        if os.getppid() != _STUDY:
            os._exit(1)


_watch = threading.Thread(target=_end_with_study, daemon=True)
_watch.start()
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # is_available() then asks the driver without CUDA
_nowhere = os.open(os.devnull, os.O_WRONLY)
for _stream in (1, 2):
    os.dup2(_nowhere, _stream)
for _name in BESIDE_A_GPU if has_gpu() else ("llama_lab.runner", "llama_lab.trainer"):
    with suppress(Exception):
        import_module(_name)
_imported.set()
_watch.join()  # a process is forked from one that has no threads
gc.collect()
gc.freeze()  # so that a trial copies no memory only to look for garbage in it
