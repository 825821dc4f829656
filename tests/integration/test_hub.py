"""The real names load by repository id, as on a user's machine: here from a hub cache that the test makes on disk."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import Lab, read_json

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put_into_cache(hub: Path, kind: str, repository: str, files: dict[str, bytes]) -> None:
    """Lay out one repository at one commit as huggingface_hub does after a download."""
    folder = hub / f"{kind}s--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(COMMIT)
    for name, content in files.items():
        path = folder / "snapshots" / COMMIT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@pytest.fixture(scope="module")
def tiny_llama(environment) -> dict[str, bytes]:
    """The files of a tiny Llama, tokenizer included."""
    import os

    os.environ["LLAMA_LAB_CACHE"] = environment["LLAMA_LAB_CACHE"]
    from llama_lab.compose import compose_words
    from llama_lab.embedded import materialise

    folder = materialise(compose_words(["model=tiny"]).model)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def offline(environment, lab, tiny_llama) -> Iterator[Lab]:
    """Commands whose hub cache holds, for these tests, a Llama-2 and the blog's data set; they are to stay offline."""
    hub = Path(environment["HF_HOME"]) / "hub"
    for repository in ("meta-llama/Llama-2-7b-hf", "NousResearch/Llama-2-7b-chat-hf"):
        put_into_cache(hub, "model", repository, tiny_llama)
    files = {"data/train-00000-of-00001.parquet": parquet(guanaco_rows(40))}
    files["README.md"] = b"---\ndataset_info: {}\n---\n"
    put_into_cache(hub, "dataset", "mlabonne/guanaco-llama2-1k", files)
    yield Lab(environment | {"HF_HUB_OFFLINE": "1"}, lab.nest)
    shutil.rmtree(hub)


def guanaco_rows(count: int) -> list[dict[str, str]]:
    return [{"text": f"<s>[INST] Say {i} [/INST] Here it is: {i} </s>"} for i in range(count)]


def parquet(rows: list[dict[str, str]]) -> bytes:
    import io

    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def test_llama2_7b_by_its_repository_id(offline, tmp_path):
    words = ["model=llama2_7b", "lora.r=64", "dataset.max_train_rows=16", "tracking=none", "dataset.max_eval_rows=2"]
    folder = offline.run(tmp_path / "run", *words, fresh=True)
    lock = read_json(folder / "run.json")
    assert lock["model"]["name"] == "meta-llama/Llama-2-7b-hf"
    assert lock["model"]["commit"] == COMMIT
    adapter = read_json(folder / "adapter" / "adapter_config.json")
    assert adapter["base_model_name_or_path"] == "meta-llama/Llama-2-7b-hf"
    assert adapter["r"] == 64


def test_a_branch_that_moves_on_takes_no_run_and_no_verb_along(offline, tmp_path, tiny_llama):
    words = ["model=llama2_7b", "dataset.max_train_rows=16", "tracking=none", "dataset.max_eval_rows=2"]
    folder = offline.run(tmp_path / "run", *words, "trainer.max_steps=1", fresh=True)
    main = Path(offline.environment["HF_HOME"]) / "hub" / "models--meta-llama--Llama-2-7b-hf" / "refs" / "main"
    newer = main.parent.parent / "snapshots" / COMMIT[::-1]
    newer.mkdir()
    for name in tiny_llama:
        (newer / name).write_bytes(b"nothing that could be loaded")
    main.write_text(newer.name)
    try:
        (folder / "result.json").unlink()
        again = offline(f"resume={folder}", cwd=tmp_path)
        asked = offline("generate", str(folder), "List three colours.", cwd=tmp_path)
        moved = offline("generate", str(folder), "List three colours.", "model.revision=main", cwd=tmp_path)
    finally:
        main.write_text(COMMIT)
        shutil.rmtree(newer)
    assert (again.returncode, asked.returncode) == (0, 0), again.stderr + asked.stderr
    assert read_json(folder / "run.json")["model"]["commit"] == COMMIT
    assert moved.returncode == 2


def test_the_blogs_run_by_its_repository_ids(offline, tmp_path):
    folder = offline.run(tmp_path / "run", "experiment=seed_guanaco", "tracking=none")
    lock, result = read_json(folder / "run.json"), read_json(folder / "result.json")
    assert lock["dataset"]["format"] == "text"
    assert lock["dataset"]["num_train_rows"] == 39  # eval_fraction 0.01 of 40, at least one
    assert result["num_steps"] == 10
    assert "How do I use the OpenAI API?" in (folder / "samples.md").read_text()


def test_model_that_is_not_in_the_cache_is_one_message(offline, tmp_path):
    done = offline("model=llama2_13b", "tracking=none", "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 2
    assert "meta-llama/Llama-2-13b-hf" in done.stderr
    assert "HF_HUB_OFFLINE" in done.stderr
    assert "Traceback" not in done.stderr
    assert read_json(tmp_path / "run" / "result.json")["status"] == "failed"


def test_data_set_that_is_not_in_the_cache_is_one_message(offline, tmp_path):
    done = offline("model=tiny", "dataset=guanaco", "tracking=none", "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 2
    assert "timdettmers/openassistant-guanaco" in done.stderr
    assert "Traceback" not in done.stderr


def test_revision_that_is_not_there_is_one_message(offline, tmp_path):
    words = ["model=llama2_7b", "model.revision=v9", "tracking=none", "hydra.run.dir=run"]
    done = offline(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("llama_lab: ")]) == 1


def test_hub_errors_say_what_to_do():
    import httpx
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    from llama_lab.hub import explain_hub

    response = httpx.Response(403, request=httpx.Request("GET", "https://example.org"))
    for error, words in (
        (GatedRepoError("gated", response=response), ["gated", "HF_TOKEN", "licence"]),
        (RepositoryNotFoundError("absent", response=response), ["was not found", "spelling"]),
        (RevisionNotFoundError("absent", response=response), ["revision", "model.revision=main"]),
    ):
        wrapped = OSError("transformers wraps it")
        wrapped.__cause__ = error
        message = str(explain_hub(wrapped, "meta-llama/Llama-2-7b-hf", "model.name"))
        assert "meta-llama/Llama-2-7b-hf" in message
        assert [word for word in words if word not in message] == []


def test_default_run_never_looks_up_a_host(lab, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import socket\n"
        "def refuse(*a, **k): open('looked_up', 'a').write(repr(a)); raise OSError('no network in this test')\n"
        "socket.getaddrinfo = refuse\n"
        "connect = socket.socket.connect\n"
        "def local_only(self, address):\n"
        "    is_here = self.family == socket.AF_UNIX or address[0] in ('127.0.0.1', '::1', 'localhost')\n"
        "    if not is_here: refuse(address)\n"
        "    return connect(self, address)\n"
        "socket.socket.connect = local_only\n"
    )
    path = f"{tmp_path}:{lab.environment['PYTHONPATH']}"
    words = ["model=tiny", "dataset.max_train_rows=16", "dataset.max_eval_rows=2", "hydra.run.dir=run"]
    done = lab(*words, cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    looked_up = (tmp_path / "looked_up").read_text() if (tmp_path / "looked_up").exists() else ""
    assert [line for line in looked_up.splitlines() if "127.0.0.1" not in line and "localhost" not in line] == []
