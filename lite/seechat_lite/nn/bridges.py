"""Bridges in torch, from a vision tower's patch tokens to the LM's embeddings.

A new bridge needs a class and a row here, its tensors in seechat_weights/vision/network.py, and a
test row.
"""

from collections.abc import Callable

from torch import nn


class MLP2xGELU(nn.Sequential):
    """Linear, exact GELU, linear (LLaVA 1.5): [n, tokens, inputs] -> [n, tokens, outputs]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.Linear(inputs, outputs), nn.GELU(), nn.Linear(outputs, outputs))


# (inputs, outputs) -> module
BRIDGES: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": nn.Linear,  # LLaVA v1, SEEChat's llama_proj
    "mlp2x_gelu": MLP2xGELU,
}
