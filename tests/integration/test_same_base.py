"""A base folder whose weights were exchanged behind a run is told: where the run goes on, is used, or is done again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from llama_lab.config import ModelSettings
from llama_lab.same_base import fingerprint, was_exchanged

from .conftest import TINY, read_json

WORDS = ["model.source=hub", "tracking=none", "trainer.max_steps=2", "dataset.metrics=[]", "model.package=null"]


def exchange(base: Path, tensor: str = "model.norm.weight") -> None:
    """Other weights of the same shapes: one tensor is changed."""
    weights = load_file(base / "model.safetensors")
    weights[tensor] = weights[tensor] * 1.5
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def begun(lab, tiny_run, shared, tmp_path_factory) -> tuple[Path, Path]:
    """A finished run on a base in a folder, and that folder."""
    (tiny,) = (shared / "llama_lab_cache").glob("tiny-*")
    base = tmp_path_factory.mktemp("same_base") / "base"
    shutil.copytree(tiny, base)
    return lab.run(base.parent / "run", *TINY, f"model.name={base}", *WORDS), base


@pytest.fixture
def exchanged(begun, tmp_path) -> tuple[Path, Path]:
    """The same run and base, which holds other weights now; afterwards it is what it was."""
    run, base = begun
    weights = (base / "model.safetensors").read_bytes()
    exchange(base)
    yield shutil.copytree(run, tmp_path / "run"), base
    (base / "model.safetensors").write_bytes(weights)


def test_fingerprint_follows_the_content_alone(begun, tmp_path):
    run, base = begun
    known = read_json(run / "run.json")["model"]["fingerprint"]
    copy = shutil.copytree(base, tmp_path / "copy")
    assert known == fingerprint(ModelSettings(name=str(copy)))
    tensors = list(load_file(copy / "model.safetensors"))
    seen = {known}
    for tensor in tensors:
        exchange(copy, tensor)
        seen.add(fingerprint(ModelSettings(name=str(copy))))
    config = read_json(copy / "config.json") | {"rms_norm_eps": 0.01}
    (copy / "config.json").write_text(json.dumps(config))
    seen.add(fingerprint(ModelSettings(name=str(copy))))
    assert len(seen) == len(tensors) + 2
    (copy / "model.safetensors").write_bytes(b"short")
    assert fingerprint(ModelSettings(name=str(copy))) is None


def test_a_base_that_is_saved_in_another_way_is_the_same(begun, tmp_path):
    run, base = begun
    known = read_json(run / "run.json")["model"]["fingerprint"]
    copy = shutil.copytree(base, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = weights["model.norm.weight"]  # as Llama-2's files have it
    (copy / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(weights)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in weights if files[name] == file}, copy / file)
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (copy / "adapter_model.safetensors").write_bytes(b"of something else")
    config = read_json(copy / "config.json")
    rope = config.pop("rope_parameters")  # as transformers 4 writes it
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": None, "transformers_version": "4.31.0"}
    (copy / "config.json").write_text(json.dumps(config, indent=4))
    assert known == fingerprint(ModelSettings(name=str(copy)))


def test_a_run_does_not_go_on_with_other_weights(lab, exchanged):
    run, base = exchanged
    (run / "result.json").unlink()
    lock = read_json(run / "run.json")
    done = lab(f"resume={run}", cwd=run.parent)
    assert done.returncode == 2
    assert f"The base is not the one that {run} began with: the fingerprint of {base} was" in done.stderr
    assert "Bring its folder back as it was, or start a new run." in done.stderr
    assert read_json(run / "run.json") == lock
    lock["model"]["fingerprint"] = "b6191ed13e9e8afb"  # as of a run that began when they were made in another way
    assert was_exchanged(lock, ModelSettings(name=str(base))) is None
    del lock["model"]["fingerprint"]  # as of a run that began before there were fingerprints
    (run / "run.json").write_text(json.dumps(lock))
    done = lab(f"resume={run}", cwd=run.parent)
    assert done.returncode == 0, done.stderr


def test_a_verb_takes_other_weights_only_where_they_are_typed(lab, exchanged):
    run, base = exchanged
    ask = ["generate", run, "Train it.", "--max-new-tokens", "3"]
    done = lab(*ask, cwd=run.parent)
    assert done.returncode == 2
    assert f"model.name={base} is not the base that {run} was trained on" in done.stderr
    done = lab(*ask, f"model.name={base}", cwd=run.parent)
    assert done.returncode == 0, done.stderr
    assert f"Note: {run} was trained on another base: the fingerprint of {base} was" in done.stderr


def test_another_run_does_not_begin_with_its_adapter(lab, exchanged):
    run, base = exchanged
    done = lab(*TINY, f"model.name={base}", *WORDS, f"model.adapter={run}", cwd=run.parent)
    assert done.returncode == 2
    assert f"model.adapter={run} was trained on another base: the fingerprint of {base} was" in done.stderr


def test_repro_says_that_the_base_is_another(lab, begun, exchanged):
    run, _ = exchanged
    done = lab("repro", run, "--check", cwd=run.parent)
    assert done.returncode == 1
    assert "model.fingerprint: " in done.stdout
