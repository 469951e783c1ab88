"""The shapes of networks, as manifests and checkpoints state them."""

import math
from dataclasses import dataclass

MAX_LAYERS = 1024  # of any network; more would fill the memory with names before it is refused


# the residual of ChatGLM's layers is scaled by it; the published code uses 28 layers, however many
# there are
ALPHA = math.sqrt(2 * 28)


@dataclass(frozen=True)
class LMConfig:
    """Shape of a decoder; the defaults are those of the published ChatGLM-6B.

    family: a name of lm_families.LM_FAMILIES, which says how the decoder computes. pad_id, mask_id
    and gmask_id are ChatGLM's; num_kv_heads, rope_theta and rope_factor are LLaMA's.
    """

    vocab_size: int = 130528
    hidden_size: int = 4096
    num_layers: int = 28
    num_heads: int = 32
    inner_size: int = 16384
    layernorm_epsilon: float = 1e-5
    max_sequence_length: int = 2048
    pad_id: int = 3
    mask_id: int = 130000
    gmask_id: int = 130001
    bos_id: int = 130004  # <sop>: the first token of an answer
    eos_id: int = 130005  # <eop>: ends an answer
    family: str = "chatglm"
    num_kv_heads: int = 0  # heads of keys and values; 0: as many as of queries
    rope_theta: float = 10000.0
    rope_factor: float = 1.0  # positions are divided by it

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values; each serves as many heads of queries as the others."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def padded_head_size(self) -> int:
        """Size of a head in a bundle and its cache: the next multiple of 8, as runtimes want it."""
        return -(-self.head_size // 8) * 8
