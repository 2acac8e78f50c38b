"""Examples of the README and the site: what a page says its code prints, it prints; and every public name has an entry with
an example."""

import contextlib
import doctest
import io
import re
from pathlib import Path

import pytest
import torch

import sparseflow_kernels
from sparseflow_kernels import data, flows, pruning, training

DOCS = Path(__file__).resolve().parents[1] / "docs"
BLOCK = re.compile(r"^(?<! -->\n)```\{?(\w+)\}?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEEDY = re.compile(r"^<!-- needs (\w+) -->\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)  # of a package that we do not need
API = sorted((DOCS / "api").glob("*.md"))
README = DOCS.parent / "README.md"
GUIDES = [README, DOCS / "getting_started.md", DOCS / "drop_in.md", DOCS / "faq.md", *sorted((DOCS / "how_to").glob("*.md"))]


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
    """Block after block in one session. A block of text behind one of Python is what that prints."""
    namespace: dict = {"__name__": path.stem}
    printed = ""
    for language, text in BLOCK.findall(path.read_text()):
        if language == "python":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(text, f"{path.name}: {text.splitlines()[0]}", "exec"), namespace)
            printed = output.getvalue()
        elif language == "text" and printed and sparseflow_kernels.build_info()["cpu"]["built"]:
            assert printed.strip() == text.strip(), f"{path}: replace the text block by what the code above it prints"


def scalars(folder: Path, **_) -> int:
    """Numbers of the NLL in TensorBoard's files below the folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "runs" / "flow")).Reload()
    return len(events.Scalars("nll"))


def runs(folder: Path, **_) -> int:
    import mlflow

    (run,) = mlflow.search_runs(output_format="list")
    return len(mlflow.MlflowClient().get_metric_history(run.info.run_id, "nll"))


def logged(folder: Path, lit=None, trainer=None, flow=None, **_) -> int:
    """Epochs of a CSV logger, or of a Trainer that has written its weights into the flow."""
    if lit is None:
        return len(next(folder.rglob("metrics.csv")).read_text().splitlines()) - 1
    known, y = flow.log_prob(torch.ones(1, 2)), lit.flow.log_prob(torch.ones(1, 2))
    return trainer.current_epoch if torch.allclose(known, y, rtol=1e-3) else 0


SEEN = {"tensorboard": scalars, "mlflow": runs, "lightning": logged}
NEEDING = [(path, needs, code) for path in GUIDES for needs, code in NEEDY.findall(path.read_text())]


@pytest.mark.parametrize("path, needs, code", NEEDING, ids=lambda value: value if str(value).isidentifier() else "")
def test_code_that_needs_another_package(path, needs, code, tmp_path, monkeypatch):
    """Behind the page's first block, where the package is installed: two epochs are noted."""
    pytest.importorskip(needs)
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": path.stem}
    for text in (blocks(path, "python")[0], code):
        exec(compile(text, f"{path.name}: {needs}", "exec"), namespace)
    assert SEEN[needs](tmp_path, **namespace) == 2


def test_local_links_and_pictures_exist():
    for page in (README, *GUIDES, *DOCS.glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                found = page.parent / target
                assert found.exists() or found.with_suffix(".ipynb").exists(), f"{page}: {target}"


def test_every_public_name_has_an_entry_and_an_example():
    pages = "\n".join(path.read_text() for path in API)
    entries = set(re.findall(r"^\.\. auto(?:function|class|data):: sparseflow_kernels\.(?:\w+\.)?(\w+)$", pages, re.MULTILINE))
    examples = "\n".join(text for path in API for text in blocks(path, "doctest"))
    for module in (sparseflow_kernels, flows, pruning, training, data):
        for name in module.__all__:
            assert name in entries, f"docs/api has no entry for {module.__name__}.{name}"
            assert re.search(rf"\.{name}\b", examples), f"docs/api has no example with {module.__name__}.{name}"
