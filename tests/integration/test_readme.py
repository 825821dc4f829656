"""Every command that the README and the pages of docs/ show is one that works."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from llama_lab.cli import VERBS

from .conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGES = [README, *(path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "docs").glob("*.md")))]
SHOWN = [
    shlex.split(line.split("  #")[0])[3:]
    for page in PAGES
    for block in re.findall(r"```bash\n(.*?)```", page, flags=re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("python -m llama_lab")
]
COMMANDS = [words for at, words in enumerate(SHOWN) if words not in SHOWN[:at]]
"""Each once, on however many pages it stands."""


def test_the_two_commands_stand_at_the_top():
    assert re.search(r"```bash\nmake demo\b.*\nmake test\b", README[:1500])


@pytest.fixture(scope="module")
def own_run(tiny_run, tmp_path_factory) -> Path:
    """A copy of the tiny run: some commands write into it or beside it."""
    return Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("outputs") / "run"))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_command_of_the_readme(lab, own_run, tmp_path, words):
    for name in ("my_rows.jsonl", "my.jsonl"):
        rows = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(30)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    if words[:1] == ["plan"]:
        done = lab(*words, cwd=tmp_path, HF_HUB_OFFLINE="1")
        assert "RTX 3090" in done.stdout, done.stderr  # of a model on the hub, whose tokenizer is not here, the memory
        assert done.returncode == (2 if "model=llama2_7b" in words else 0)
        return
    if words and words[0] in VERBS:
        words = [str(own_run) if word == "outputs" or word.startswith("outputs/") else word for word in words]
        done = lab(*words, cwd=tmp_path, stdin="hello\n/exit\n")
        if "--wandb-report" in words:
            assert "needs a W&B account, and no key is set" in done.stderr
            return
    elif any(word.startswith("resume=") for word in words):
        done = lab(f"resume={own_run}", cwd=tmp_path)
    else:
        if "-m" in words:  # --cfg shows one run: the first of the grid; what a study chooses is left out
            words = [word.split(",")[0] for word in words if word != "-m" and "(" not in word]
        (tmp_path / "my_conf").mkdir()
        done = lab(*words, "--cfg", "job", cwd=tmp_path)
        if "pip install hydra-" in done.stderr:  # a launcher that is not installed says what to type
            assert done.returncode == 2
            return
    assert done.returncode == 0, done.stderr


def test_every_block_of_numbers_is_what_its_files_hold():
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, REPOSITORY / "docs" / "render.py", "--check"], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stdout + done.stderr
