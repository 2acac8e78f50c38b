"""The README's Python runs, block after block in one session, and its printed report is what the code prints."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

from sparseflow_kernels import build_info

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_every_block_runs_and_prints_what_it_says():
    blocks = BLOCK.findall(README.read_text())
    namespace, printed, compared = {}, "", 0
    for language, text in blocks:
        if language == "python":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(text, f"{README.name}: {text.splitlines()[0]}", "exec"), namespace)
            printed = output.getvalue()
        elif language == "text" and build_info()["cpu"]["built"]:
            assert printed.strip() == text.strip(), "README.md: replace the text block by what the code above it prints"
            compared += 1
    assert sum(language == "python" for language, _ in blocks) >= 5
    assert namespace["handed"].stats.reason == "func is not a compiled field"  # as the comment there says
    assert namespace["native"].shape == (5, 8, 21) and bool(torch.isfinite(namespace["density"]).all())
    if not compared:
        pytest.skip("without the CPU extension the printed report names another engine")


def test_local_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        if not target.startswith("https://"):
            assert (README.parent / target).exists(), target
