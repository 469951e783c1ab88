"""Examples in the documents run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def examples(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text("utf-8"), re.M | re.S)


@pytest.mark.parametrize(
    ("name", "number", "expected"),
    [
        ("docs/embedding.md", 0, "这是熊猫。\n"),
        ("docs/embedding.md", 1, "loading 100%\n"),
        ("docs/embedding.md", 2, ""),
        ("docs/embedding.md", 3, "这是熊猫。\n"),
    ],
)
def test_examples_run(name: str, number: int, expected: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", examples(name)[number]],
        capture_output=True, text=True, encoding="utf-8", timeout=60, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert expected in done.stdout


def test_no_example_is_forgotten() -> None:
    assert len(examples("docs/embedding.md")) == 4
