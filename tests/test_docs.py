"""The site's examples: what a page prints is what its code prints, and every public name has an entry with an example."""

import doctest
import re
from pathlib import Path

import pytest
import torch

import sparseflow_kernels
from sparseflow_kernels import data, flows, pruning, training

DOCS = Path(__file__).resolve().parents[1] / "docs"
BLOCK = re.compile(r"^```\{?(\w+)\}?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
API = sorted((DOCS / "api").glob("*.md"))
GUIDES = [DOCS / "getting_started.md", DOCS / "drop_in.md", DOCS / "faq.md", *sorted((DOCS / "how_to").glob("*.md"))]


def blocks(path: Path, language: str) -> list[str]:
    return [text for name, text in BLOCK.findall(path.read_text()) if name == language]


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("path", API, ids=lambda path: path.stem)
def test_examples_of_the_reference(path):
    examples = doctest.DocTestParser().get_doctest("".join(blocks(path, "doctest")), {}, path.name, str(path), 0)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    said: list[str] = []
    threads = sparseflow_kernels.get_num_threads()
    runner = doctest.DocTestRunner(optionflags=flags)
    runner.run(examples, out=said.append)
    sparseflow_kernels.set_num_threads(threads)
    assert runner.tries and not runner.failures, "".join(said)


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_code_of_the_guides(path):
    namespace: dict = {"__name__": path.stem}
    for text in blocks(path, "python"):
        exec(compile(text, f"{path.name}: {text.splitlines()[0]}", "exec"), namespace)


def test_every_public_name_has_an_entry_and_an_example():
    pages = "\n".join(path.read_text() for path in API)
    entries = set(re.findall(r"^\.\. auto(?:function|class|data):: sparseflow_kernels\.(?:\w+\.)?(\w+)$", pages, re.MULTILINE))
    examples = "\n".join(text for path in API for text in blocks(path, "doctest"))
    for module in (sparseflow_kernels, flows, pruning, training, data):
        for name in module.__all__:
            assert name in entries, f"docs/api has no entry for {module.__name__}.{name}"
            assert re.search(rf"\.{name}\b", examples), f"docs/api has no example with {module.__name__}.{name}"
