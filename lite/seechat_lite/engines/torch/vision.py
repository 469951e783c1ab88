"""Runs the vision network in torch, on the language model's device or another."""

import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from seechat_lite.engines.torch.ops import owned
from seechat_lite.engines.torch.settings import torch_settings
from seechat_lite.memory import KEPT_VISION
from seechat_lite.native import Native, guarded
from seechat_lite.nn.layer_streaming import Streamed
from seechat_weights.errors import EngineError
from seechat_weights.files.in_use import FilesInUse
from seechat_weights.libraries import import_error
from seechat_weights.vision.weights import VisionWeights


class TorchVision(Native):
    """Runs a vision network. The first picture builds it: text alone needs none of it."""

    def __init__(
        self,
        weights: VisionWeights,
        *,
        device: torch.device,
        dtype: torch.dtype,
        keep: bool | None,
        files: FilesInUse | None = None,
    ) -> None:
        """Prepare; nothing is loaded yet.

        weights: the network and its weights.
        device: where it runs.
        dtype: what it computes in.
        keep: hold the weights on the device, or bring them there layer by layer for every picture.
            None brings a large network's weights each time on the CPU.
        files: the files that the weights are in.
        """
        self.device = device
        self._weights = weights
        self._files = files
        self._dtype = dtype
        size = weights.numbers * dtype.itemsize
        self._keep = keep if keep is not None else device.type != "cpu" or size <= KEPT_VISION
        self.held = size if self._keep else 0  # bytes on the device between pictures
        self._network: nn.Module | None = None

    @guarded
    @torch.inference_mode()
    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Compute the embeddings of pictures, float32 [n, tokens, hidden].

        pixels: float32 [n, 3, S, S].

        Returns what read_question() takes if the embeddings depend on the question.
        """
        return self._computed("" if self._weights.config.question is None else "tower", pixels)

    @guarded
    @torch.inference_mode()
    def read_question(self, seen: np.ndarray, question_ids: Sequence[int]) -> np.ndarray:
        """Compute the embeddings of a picture for a question, float32 [tokens, hidden].

        seen: float32 [positions, width], one picture of encode().
        question_ids: the question's pieces.
        """
        ids = torch.tensor([question_ids], device=self.device)
        return self._computed("bridge", seen[None], ids)[0]

    def _computed(self, part: str, numbers: np.ndarray, *others: torch.Tensor) -> np.ndarray:
        """Run a part of the network by its name; "" for all of it."""
        if self._files:
            held = self._network is not None and self._keep
            self._files.check() if held else self._files.check_places()
        if self._network is None:
            self._network = self._built()
        given = torch.from_numpy(np.ascontiguousarray(numbers, np.float32))
        given = given.to(self.device).to(self._dtype)
        with torch_settings(threads=0, on_gpu=self.device.type == "cuda"):
            if isinstance(self._network, Streamed):
                found = self._network(given, *others, part=part)
            else:
                found = self._network.get_submodule(part)(given, *others)
            return owned(found.float())

    def unload(self) -> None:
        """Free the network; the next picture builds it again."""
        self._network = None

    def _release(self) -> None:
        self.unload()

    def _built(self) -> nn.Module:
        try:
            # takes seconds: it imports the transformers library
            from seechat_lite.nn.vision import streamed

            network = streamed(self._weights, self.device, self._dtype)
        except ImportError as e:
            needed, install = "pictures need it with the engine 'torch'", '"seechat-lite[torch]"'
            raise import_error(EngineError, e, needed=needed, install=install) from None
        network = network.loaded() if self._keep else network
        here = weakref.ref(self)  # the hooks must not keep this object alive

        def raise_if_closed(*_: object) -> None:
            if vision := here():
                vision.check_open()

        # a picture takes seconds: close() ends it between two modules
        for module in network.modules():
            module.register_forward_pre_hook(raise_if_closed)
        return network
