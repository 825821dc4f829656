"""Processes of a study are forked from one that has imported the libraries: it must have left the GPU alone."""

import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
FORKED = """
import os
import llama_lab.sweep.warm
import torch
if torch.cuda.is_initialized():
    raise SystemExit(2)
if (child := os.fork()) == 0:
    os._exit(0 if torch.ones(3, device="cuda").sum() == 3 else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_has_the_gpu():
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=120)
