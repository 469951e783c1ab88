"""LlamaIndex: python llama_index.py URL PICTURE-FILE; prints what came as JSON."""

import json
import sys
from pathlib import Path

from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.llms.openai_like import OpenAILike

url, picture = sys.argv[1:]
name = "seechat-lite-builtin"
shared = {"model": name, "api_base": f"{url}/v1", "api_key": "none", "max_retries": 0}
chat = OpenAILike(**shared, is_chat_model=True)
blocks = [ImageBlock(image=Path(picture).read_bytes()), TextBlock(text="这是什么？")]
asked = [ChatMessage(role="user", blocks=blocks)]
plain = OpenAILike(**shared, is_chat_model=False)  # its default
told = {
    "chat": chat.chat(asked).message.content,
    "stream": "".join(piece.delta or "" for piece in chat.stream_chat(asked)),
    "completion": plain.complete("你好").text,
    "completion_stream": "".join(piece.delta or "" for piece in plain.stream_complete("你好")),
}
print(json.dumps(told))
