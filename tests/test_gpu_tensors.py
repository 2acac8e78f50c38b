"""Tensors on a GPU outside the native engines (gpu_tensor_cases.py): on the machine's GPU, else on a pretended one.

The pretended one runs in a process of its own: torch keeps such a backend until the process ends, and its autograd
threads cannot always be ended in order.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from cpu_cases import isolated_environment

if torch.cuda.is_available():
    from gpu_tensor_cases import *  # noqa: F403
else:

    def test_on_a_pretended_gpu():
        cases = Path(__file__).with_name("gpu_tensor_cases.py")
        arguments = [str(cases), "-q", "-x", "-p", "no:cacheprovider", "--no-header", "--tb=short"]
        code = f"import os, sys, pytest; r = pytest.main({arguments!r}); sys.stdout.flush(); os._exit(r)"
        command = [sys.executable, "-P", "-c", code]
        result = subprocess.run(command, env=isolated_environment(), capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
