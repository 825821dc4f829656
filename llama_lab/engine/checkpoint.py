"""Checkpoints of a flat adapter, written beside the training: PEFT's files, optimizer states, place in the data."""

from __future__ import annotations

import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama_lab.engine.adapter import Adapter
from llama_lab.engine.optimizer import FlatAdamW
from llama_lab.training import FLAT_STATE, PARTIAL, Recorder


@dataclass(kw_only=True)
class _Writing:
    step: int
    thread: threading.Thread
    errors: list[BaseException]


class Writer:
    """Copies the state off the device and lets a thread write it, while training goes on."""

    def __init__(self, model: Any, adapter: Adapter, optimizer: FlatAdamW, recorder: Recorder) -> None:
        self.model, self.adapter, self.optimizer, self.recorder = model, adapter, optimizer, recorder
        self.on_gpu = adapter.master_KS.is_cuda
        # taken at once: to take memory that a GPU copies to is slow, and would hold up the first checkpoint
        shape, kind = (3, *adapter.master_KS.shape), adapter.master_KS.dtype
        wanted = bool(recorder.settings.trainer.save_steps)
        self.host = torch.empty(shape, dtype=kind, pin_memory=self.on_gpu) if wanted else None
        self.writing: _Writing | None = None

    def save(self, step: int) -> None:
        """Begin to write the state of now."""
        self.wait()
        copied = self._copy()
        errors: list[BaseException] = []

        def work() -> None:
            try:
                if copied is not None:
                    copied.synchronize()
                self._write(step)
                self.recorder.complete(step)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=work)
        self.writing = _Writing(step=step, thread=thread, errors=errors)
        thread.start()

    def poll(self) -> None:
        """Tell of a checkpoint that has become complete."""
        if self.writing is not None and not self.writing.thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for the checkpoint under way; raises what went wrong with it."""
        done, self.writing = self.writing, None
        if done is None:
            return
        done.thread.join()
        for error in done.errors:
            raise error
        self.recorder.listener.saved(done.step, self.recorder.settings.checkpoints / f"checkpoint-{done.step}")

    def _copy(self) -> Any:
        """Masters and optimizer states onto the host; an event to wait for where that takes its time."""
        states = (self.adapter.master_KS, self.optimizer.m_KS, self.optimizer.v_KS)
        assert self.host is not None
        for to, state in zip(self.host, states, strict=True):
            to.copy_(state, non_blocking=self.on_gpu)
        if not self.on_gpu:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def _write(self, step: int) -> None:
        assert self.host is not None
        folder = self.recorder.settings.checkpoints / PARTIAL / f"checkpoint-{step}"
        shutil.rmtree(folder, ignore_errors=True)
        self.model.save_pretrained(str(folder), state_dict=self._named(self.host[0]), save_embedding_layers=False)
        np.save(folder / FLAT_STATE, self.host[1:].numpy())  # numpy lets the loop go on while it writes

    def _named(self, master_KS: Tensor) -> dict[str, Tensor]:
        """The parameters by PEFT's names, out of a copy of the flat masters."""
        found = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                start = parameter.data.storage_offset()
                flat = master_KS[0, start : start + parameter.numel()]
                found[name] = flat.view(parameter.shape).clone()
        return found


def load(checkpoint: Path, model: Any, adapter: Adapter, optimizer: FlatAdamW) -> None:
    """Put back what a Writer wrote."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(checkpoint / "adapter_model.safetensors"))
    m, v = torch.from_numpy(np.load(checkpoint / FLAT_STATE))
    optimizer.m_KS.copy_(m)
    optimizer.v_KS.copy_(v)
    adapter.refresh()
