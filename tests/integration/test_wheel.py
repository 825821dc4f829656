"""The wheel carries everything: installed into an empty venv, it works from any folder."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from .conftest import REPOSITORY


@pytest.fixture(scope="module")
def installed(tmp_path_factory, environment) -> tuple[Path, dict[str, str]]:
    """The `bin` folder of a venv that holds the wheel; its dependencies are read from this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, REPOSITORY], check=True)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    wheel = next(folder.glob("llama_lab-*.whl"))
    subprocess.run([*pip, "--python", python, "install", "--no-deps", wheel], check=True)
    env = {k: v for k, v in environment.items() if k != "PYTHONPATH"} | {"PYTHONPATH": sysconfig.get_path("purelib")}
    return python.parent, env


def test_wheel_holds_groups_templates_and_rows(installed):
    listed = subprocess.run(
        [installed[0] / "python", "-c", "import llama_lab, pathlib; print(pathlib.Path(llama_lab.__file__).parent)"],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
        env=installed[1],
    )
    package = Path(listed.stdout.strip())
    assert REPOSITORY not in package.parents
    groups = {path.relative_to(REPOSITORY / "conf") for path in (REPOSITORY / "conf").rglob("*.yaml")}
    assert groups == {path.relative_to(package / "conf") for path in (package / "conf").rglob("*.yaml")}
    assert (package / "data" / "templates" / "llama2.jinja").is_file()
    assert (package / "data" / "sample_train.jsonl").is_file()


def test_console_script_and_module_run_from_another_folder(installed, tmp_path):
    words = ["model=tiny", "dataset.max_train_rows=16", "dataset.max_eval_rows=2", "tracking=none"]
    run = {"cwd": tmp_path, "env": installed[1], "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([installed[0] / "llama-lab", *words, "hydra.run.dir=run"], **run)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "result.json").is_file()
    module = [installed[0] / "python", "-m", "llama_lab"]
    done = subprocess.run([*module, *words, "--cfg", "job"], **run)
    assert done.returncode == 0, done.stderr
    assert "name: tiny" in done.stdout
    done = subprocess.run([*module, "generate", "run", "hello", "--max-new-tokens", "2"], **run)
    assert done.returncode == 0, done.stderr


def test_the_sweeper_is_found_from_another_folder(installed, tmp_path):
    words = ["-m", "search=lora_quant", "model=tiny", "lora.r=choice(8,0)"]
    done = subprocess.run(
        [installed[0] / "llama-lab", *words], cwd=tmp_path, env=installed[1], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "lora.r=0 is out of range" in done.stderr
