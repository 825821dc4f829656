"""Checkpoints of a flat adapter, written beside the training: PEFT's files, optimizer states, place in the data."""

from __future__ import annotations

import copy
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama_lab.checkpoints import FLAT_STATE, PARTIAL, WEIGHTS
from llama_lab.engine.adapter import Adapter, lora_layers
from llama_lab.engine.optimizer import FlatAdamW
from llama_lab.training import Recorder


@dataclass(kw_only=True)
class _Writing:
    step: int
    thread: threading.Thread
    errors: list[BaseException]


class Writer:
    """Copies the state of one adapter off the device and lets a thread write it, while training goes on.

    What it writes depends on the adapter alone, not on those that train beside it or on the slot it is in.
    """

    def __init__(self, model: Any, name: str, adapter: Adapter, optimizer: FlatAdamW, recorder: Recorder) -> None:
        self.name, self.adapter, self.optimizer, self.recorder = name, adapter, optimizer, recorder
        self.on_gpu = adapter.master_KS.is_cuda
        # taken at once: to take memory that a GPU copies to is slow, and would hold up the first checkpoint
        shape, kind = (3, adapter.layout.size), adapter.master_KS.dtype
        wanted = bool(recorder.settings.trainer.save_steps)
        self.host = torch.empty(shape, dtype=kind, pin_memory=self.on_gpu) if wanted else None
        self.config = peft_config(model, name)
        self.keys = _peft_keys(model, name, adapter)
        self.writing: _Writing | None = None

    def save(self, step: int, k: int) -> None:
        """Begin to write the state that slot `k` has now."""
        self.wait()
        copied = self._copy(k)
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

    @property
    def is_busy(self) -> bool:
        """A checkpoint is not complete yet."""
        return self.writing is not None and self.writing.thread.is_alive()

    def poll(self) -> None:
        """Tell of a checkpoint that has become complete."""
        if not self.is_busy:
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

    def abandon(self) -> None:
        """Let the checkpoint under way become complete; nobody is told."""
        done, self.writing = self.writing, None
        if done is not None:
            done.thread.join()

    def _copy(self, k: int) -> Any:
        """Masters and optimizer states onto the host; an event to wait for where that takes its time."""
        states = (self.adapter.master_KS, self.optimizer.m_KS, self.optimizer.v_KS)
        assert self.host is not None
        for to, state in zip(self.host, states, strict=True):
            to.copy_(state[k], non_blocking=self.on_gpu)
        if not self.on_gpu:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def _write(self, step: int) -> None:
        assert self.host is not None
        folder = self.recorder.settings.checkpoints / PARTIAL / f"checkpoint-{step}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        masters = self.adapter.matrices(self.host[:1], 0, self.name)
        tensors = {key: value.contiguous() for key, value in zip(self.keys, masters, strict=True)}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        self.config.save_pretrained(str(folder))
        np.save(folder / FLAT_STATE, self._moments().numpy())  # numpy lets the loop go on while it writes

    def _moments(self) -> Tensor:
        """(2, 1, S) in the layout of the adapter alone."""
        assert self.host is not None
        layout = self.adapter.own_layout(self.name)
        if layout == self.adapter.layout:
            return self.host[1:, None]
        own = torch.zeros(2, 1, layout.size, dtype=self.host.dtype)
        for flat, state in zip(own[:, 0], self.host[1:], strict=True):
            for to, value in zip(
                self.adapter.own_matrices(flat, self.name),
                self.adapter.matrices(state[None], 0, self.name),
                strict=True,
            ):
                to.copy_(value)
        return own


def peft_config(model: Any, name: str) -> Any:
    """What PEFT saves beside the weights of an adapter."""
    config = copy.deepcopy(model.peft_config[name])
    config.inference_mode = True
    config.base_model_name_or_path = config.base_model_name_or_path or model.get_base_model().name_or_path or None
    return config


def load_weights(checkpoint: Path, model: Any, name: str) -> None:
    """Put back into PEFT's parameters what a Writer wrote."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, load_file(checkpoint / WEIGHTS), adapter_name=name)


def load_moments(checkpoint: Path, adapter: Adapter, optimizer: FlatAdamW, k: int, name: str) -> None:
    """Put back into slot `k` the optimizer's states that a Writer wrote."""
    written = torch.from_numpy(np.load(checkpoint / FLAT_STATE))
    for flat, state_KS in zip(written[:, 0], (optimizer.m_KS, optimizer.v_KS), strict=True):
        if adapter.own_layout(name) == adapter.layout:
            state_KS[k].copy_(flat)
            continue
        for to, value in zip(adapter.matrices(state_KS, k, name), adapter.own_matrices(flat, name), strict=True):
            to.copy_(value)


def _peft_keys(model: Any, name: str, adapter: Adapter) -> list[str]:
    """PEFT's names of A and B of each layer, in the order of Adapter.matrices."""
    paths = {id(layer): path for path, layer in lora_layers(model, name).items()}
    layers = [layer for layers in adapter.layers for layer in layers if id(layer) in paths]
    return [f"{paths[id(layer)]}.{matrix}.weight" for layer in layers for matrix in ("lora_A", "lora_B")]
