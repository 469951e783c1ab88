"""Settings and fixtures shared by all tests."""

import pytest
from hypothesis import settings

from reference import data, load_chatglm
from seechat_lite.nn.chatglm import ChatGLM
from seechat_lite.tokenizer import Tokenizer

# the same examples in every run and on every machine
settings.register_profile("fixed", derandomize=True, deadline=None, database=None, max_examples=300)
settings.load_profile("fixed")


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(data("chatglm_tiny/ice_text.model"))


@pytest.fixture(scope="session")
def chatglm_tiny() -> ChatGLM:
    return load_chatglm("chatglm_tiny")
