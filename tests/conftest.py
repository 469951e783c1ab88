"""Settings, markers and fixtures shared by all tests; importing it needs no torch."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

import lanes
from reference import data
from seechat_lite.tokenizer import Tokenizer

if TYPE_CHECKING:
    from seechat_export.reference_chatglm import ChatGLM

# the same examples in every run and on every machine, however slow it is
settings.register_profile(
    "fixed",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("few", settings.get_profile("fixed"), max_examples=50)
settings.load_profile("fixed")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not import a file of which no test is wanted, or which needs what is not installed."""
    if not lanes.is_test_file(collection_path):
        return None
    needs = lanes.needs_of_file(collection_path)
    return (
        not lanes.may_be_wanted(needs, config.option.markexpr) or bool(lanes.lacks(needs)) or None
    )


def pytest_report_header(config: pytest.Config) -> list[str]:
    lacking = lanes.lacks(lanes.REQUIRES)
    return [f"not installed, so tests of {', '.join(lacking)} are left out"] if lacking else []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with what it needs: see lanes.py."""
    for item in items:
        needs = lanes.needs_of_item(item)
        for name in sorted(needs):
            item.add_marker(name)
        if lacking := lanes.lacks(needs):
            item.add_marker(pytest.mark.skip(reason=f"needs what is not installed: {lacking}"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium; see browsing.py."""
    from browsing import chromium

    with chromium() as browser:
        yield browser


@pytest.fixture
def open_tab(browser: Any) -> Iterator[Any]:
    """Opens watched tabs: open_tab(server)."""
    from browsing import tabs

    with tabs(browser) as open_:
        yield open_


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(data("chatglm_tiny/ice_text.model"))


@pytest.fixture(scope="session")
def llama_reference() -> Path:
    """Golden data of LLaMA, LLaVA and others, made by running the original code."""
    beside = Path(__file__).parents[1].parent / "shared" / "reference"
    folder = Path(os.environ.get("SEECHAT_REFERENCE", beside)) / "llama"
    if not folder.is_dir():
        pytest.skip(f"no golden data in {folder}")
    return folder


@pytest.fixture(scope="session")
def chatglm_tiny() -> "ChatGLM":
    from networks import load_chatglm

    return load_chatglm("chatglm_tiny")


@pytest.fixture(scope="session")
def text_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny ChatGLM at fp32, without vision; copy it before changing anything in it."""
    from seechat_export.export import export_bundle

    out = tmp_path_factory.mktemp("bundles") / "tiny-text"
    export_bundle(lm=data("chatglm_tiny"), out=out, precision="fp32")
    return out


@pytest.fixture(scope="session")
def vision_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny ChatGLM at fp32 behind a tiny CLIP (56 x 56 pixels to 16 tokens)."""
    from seechat_export.export import export_bundle
    from seechat_weights.vision.weights import load_clip

    out = tmp_path_factory.mktemp("bundles") / "tiny-vision"
    vision = load_clip(
        clip=data("vision/clip_open_clip"), projector=data("vision/mm_projector_linear.bin")
    )
    export_bundle(
        lm=data("chatglm_tiny"), out=out, precision="fp32", vision=vision, vision_precision="fp32"
    )
    return out


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint's configuration and weights that a test may change."""
    folder = tmp_path / "base"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "ice_text.model"):
        shutil.copy(data("chatglm_tiny") / name, folder)
    return folder
