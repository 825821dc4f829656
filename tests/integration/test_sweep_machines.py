"""Studies through other launchers than Hydra's own, and by several machines at once through their storage."""

import functools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from .conftest import LAUNCHERS
from .studies import LEAN, RANK, RATE, STUDY, folders


@pytest.fixture
def postgres(tmp_path) -> Iterator[str]:
    """Address of a PostgreSQL of the test's own, from the programs of Debian's package."""
    if not (LAUNCHERS / "psycopg").exists():
        pytest.skip("psycopg is not installed")
    programs = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    user = "postgres" if os.geteuid() == 0 else None  # it does not run as root
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        free.close()
        if user:
            shutil.chown(folder, user)
        data = ["-D", f"{folder}/data"]
        options = ["-o", f"-p {port} -k {folder}", "-l", f"{folder}/log", "-w"]
        run = functools.partial(subprocess.run, check=True, user=user, cwd="/", capture_output=True)
        run([programs / "initdb", *data, "-U", "lab", "--auth=trust"])
        run([programs / "pg_ctl", *data, *options, "start"])
        yield f"postgresql://lab@127.0.0.1:{port}/postgres"
        run([programs / "pg_ctl", *data, "-m", "immediate", "stop"])


def work_together(lab, cwd: Path, *words: str, **env: str) -> None:
    words = (*LEAN, RANK, RATE, "hydra.sweeper.n_trials=4", "trainer.max_steps=2", *words)
    both = [lab.start(*STUDY, *words, cwd=cwd, **env) for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, out + err
        assert "4 trials: 4 done" in out
    study = cwd / "outputs" / "study"
    assert folders(study) == list(range(4))
    assert all((study / str(n) / "output.log").read_text().count("Adapter: ") == 1 for n in range(4))  # none twice


def test_two_machines_work_on_one_journal(lab, tmp_path):
    work_together(lab, tmp_path)


@pytest.mark.slow
def test_two_machines_work_on_one_database(lab, tmp_path, postgres):
    work_together(lab, tmp_path, f"hydra.sweeper.storage={postgres}", **with_launchers(lab))


PROXY = """
import sys
from optuna.storages import run_grpc_proxy_server
from llama_lab.sweep.storage import open_storage
run_grpc_proxy_server(open_storage(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]))
"""


@pytest.mark.slow
def test_two_machines_work_through_one_grpc_proxy(lab, tmp_path):
    if not (LAUNCHERS / "grpc").exists():
        pytest.skip("grpcio is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = lab.environment | with_launchers(lab)
    server = subprocess.Popen([sys.executable, "-c", PROXY, str(tmp_path / "study.journal"), port], env=env)
    try:
        work_together(lab, tmp_path, f"hydra.sweeper.storage=grpc://127.0.0.1:{port}", **with_launchers(lab))
    finally:
        server.kill()
        server.wait()


def with_launchers(lab) -> dict[str, str]:
    return {"PYTHONPATH": f"{lab.environment['PYTHONPATH']}{os.pathsep}{LAUNCHERS}"}


ON_RAY = [f"hydra.launcher.ray.remote.{key}" for key in ("num_gpus=0", "num_cpus=1", "memory=1_000_000_000")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "package", "words"),
    [("joblib", "joblib", []), ("submitit_local", "submitit", []), ("ray", "ray", ON_RAY)],
)
def test_trials_run_through_any_launcher(lab, tmp_path, launcher, package, words):
    if not (LAUNCHERS / "hydra_plugins" / f"hydra_{package}_launcher").exists():
        pytest.skip(f"hydra-{package}-launcher is not installed")
    words = [
        *LEAN,
        RANK,
        "trainer.max_steps=2",
        f"hydra/launcher={launcher}",
        "hydra.sweeper.n_trials=2",
        "hydra.sweeper.n_jobs=2",
        *words,
    ]
    done = lab.fresh(*STUDY, *words, cwd=tmp_path, **with_launchers(lab))
    assert done.returncode == 0, done.stdout + done.stderr
    assert folders(tmp_path / "outputs" / "study") == [0, 1]
    assert "2 trials: 2 done" in done.stdout


def test_slurm_and_ray_give_each_trial_gpus_cpus_and_memory(lab, tmp_path):
    if not (LAUNCHERS / "hydra_plugins" / "hydra_submitit_launcher").exists():
        pytest.skip("hydra-submitit-launcher is not installed")
    words = ["search=lora_quant", "hydra.launcher.partition=gpu", "--cfg", "hydra", "-p", "hydra.launcher"]
    slurm = yaml.safe_load(lab(*words, "hydra/launcher=slurm", cwd=tmp_path, **with_launchers(lab)).stdout)
    assert slurm["_target_"].endswith("SlurmLauncher")
    assert [slurm[key] for key in ("gpus_per_node", "cpus_per_task", "mem_gb", "partition")] == [1, 8, 64, "gpu"]
    words = ["search=lora_quant", "--cfg", "hydra", "-p", "hydra.launcher", "hydra/launcher=ray"]
    ray = yaml.safe_load(lab(*words, cwd=tmp_path, **with_launchers(lab)).stdout)["ray"]["remote"]
    assert [ray[key] for key in ("num_gpus", "num_cpus", "memory")] == [1, 4, 8_000_000_000]


@pytest.mark.slow
@pytest.mark.parametrize("sweep", [["lora.r=4,8"], ["hydra/sweeper=optuna", "lora.r=choice(4,8)"]])
def test_ray_without_what_a_trial_asks_for_ends_at_once(lab, tmp_path, sweep):
    words = ["-m", "model=tiny", "hydra/launcher=ray", "hydra.launcher.ray.remote.num_gpus=99", *sweep]
    done = lab.fresh(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert "pip install hydra-ray-launcher" in done.stderr
    if (LAUNCHERS / "ray").exists():
        done = lab.fresh(*words, cwd=tmp_path, **with_launchers(lab))
        assert done.returncode == 2
        assert "hydra.launcher.ray.remote.num_gpus=" in done.stderr
