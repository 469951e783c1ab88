"""LiteLLM, its bridge for Anthropic's clients too: python lite_llm.py URL PICTURE-FILE."""

import asyncio
import base64
import json
import sys
from pathlib import Path
from typing import Any

import litellm
from litellm.anthropic_interface import messages

url, picture = sys.argv[1:]
data = base64.b64encode(Path(picture).read_bytes()).decode()
shown = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
asked: list[Any] = [{"role": "user", "content": [shown, {"type": "text", "text": "这是什么？"}]}]
openai: dict[str, Any] = {
    "model": "openai/seechat-lite-builtin",
    "api_base": f"{url}/v1",
    "api_key": "none",
    "num_retries": 0,
}
told = {
    "chat": litellm.completion(**openai, messages=asked).choices[0].message.content,
    "stream": "".join(
        piece.choices[0].delta.content or ""
        for piece in litellm.completion(**openai, messages=asked, stream=True)
    ),
    "responses": litellm.responses(**openai, input="你好").output[0].content[0].text,
    "ollama": litellm.completion(
        model="ollama_chat/seechat-lite-builtin", api_base=url, messages=asked
    )
    .choices[0]
    .message.content,
}
source = {"type": "base64", "media_type": "image/png", "data": data}
anthropic: list[Any] = [
    {
        "role": "user",
        "content": [{"type": "image", "source": source}, {"type": "text", "text": "这是什么？"}],
    }
]
answer = asyncio.run(messages.acreate(**openai, messages=anthropic, max_tokens=50))
told["anthropic"] = answer["content"][0]["text"]
print(json.dumps(told))
