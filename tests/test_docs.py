"""The documentation says what the code does."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def block(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n```\w+\n(.*?)```\n<!-- /{name} -->", README, re.DOTALL)
    assert found, name
    return found[1]


@pytest.mark.parametrize("page", ["README.md", "docs/models.md", "docs/operators.md"])
def test_generated_parts_of_a_page_are_current(page: str) -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert page in generate.BLOCKS
    assert generate.filled(page) == (ROOT / page).read_text(), "run `python docs/generate.py`"


@pytest.mark.slow
def test_the_python_example_runs_and_is_at_most_six_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    example = block("python-example")
    assert sum(bool(line.strip()) for line in example.splitlines()) <= 6
    monkeypatch.chdir(ROOT)
    names = {"images": np.load("models/mnist_samples.npy")}
    code = compile(example, "README.md", "exec")
    __import__("builtins").exec(code, names)
    expected = np.load("models/mnist_labels.npy")
    assert names["logits"].argmax(axis=1).tolist() == expected.tolist()


def test_every_relative_link_leads_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
