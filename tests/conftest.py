"""Settings and fixtures shared by all tests."""

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from reference import data, load_chatglm
from seechat_export.export import export_bundle
from seechat_lite.eyes import load_clip
from seechat_lite.nn.chatglm import ChatGLM
from seechat_lite.tokenizer import Tokenizer

# the same examples in every run and on every machine, however slow it is
settings.register_profile(
    "fixed",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("fixed")


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(data("chatglm_tiny/ice_text.model"))


@pytest.fixture(scope="session")
def chatglm_tiny() -> ChatGLM:
    return load_chatglm("chatglm_tiny")


@pytest.fixture(scope="session")
def text_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny ChatGLM at fp32, without eyes; copy it before changing anything in it."""
    out = tmp_path_factory.mktemp("bundles") / "tiny-text"
    export_bundle(lm=data("chatglm_tiny"), out=out, precision="fp32")
    return out


@pytest.fixture(scope="session")
def vision_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny ChatGLM at fp32 behind a tiny CLIP (56 x 56 pixels to 16 tokens)."""
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
