"""The one decode loop: prefill, then choose a token and step, until something ends the answer."""

from collections.abc import Callable, Iterator

from seechat_lite.engines.base import Engine
from seechat_lite.errors import SeechatError
from seechat_lite.prompt import Prompt
from seechat_lite.sampling import Sampler, Sampling


def generate(
    engine: Engine,
    prompt: Prompt,
    sampling: Sampling,
    *,
    max_new_tokens: int,
    eos_id: int,
    stopped: Callable[[], bool],
) -> Iterator[int]:
    """Yield the answer's token ids, at most `max_new_tokens`, never the eos.

    `stopped` is asked before and after every call of the engine, so that an answer ends within one
    token of its becoming true. Closing the iterator at any time is fine: nothing is kept outside
    it, and the engine's next prefill starts afresh. Raises EngineError if the logits are no
    numbers.
    """
    if max_new_tokens < 1:
        raise SeechatError(f"max_new_tokens is {max_new_tokens}; expected at least 1: change it")
    if stopped():
        return
    sampler = Sampler(sampling, prompt.ids, eos_id=eos_id)
    logits = engine.prefill(prompt)  # [vocab]
    for remaining in range(max_new_tokens, 0, -1):
        if stopped():
            return
        token = sampler.next(logits)
        if token == eos_id:
            return
        yield token
        if remaining == 1 or stopped():
            return
        logits = engine.step(token)
