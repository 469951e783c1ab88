"""Runs networks whose weights stay in the checkpoint; every call reads them layer by layer."""

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from seechat_weights.errors import CheckpointError

Read = Callable[[str], np.ndarray]  # a parameter's name -> its value, in any float dtype


class Streamed(nn.Module):
    """Runs a network that was built on the meta device, in the memory of its largest layer.

    When a module is called, its own parameters are brought to `device` as `dtype`; when it is done,
    they are freed. `network` itself stays without weights: it tells the names and shapes of the
    parameters, and can be traced.

    network: built on the meta device.
    read: returns a parameter by its name.
    device: where the network runs; None for the CPU.
    dtype: what it computes in.
    where: the files of the parameters, for errors.
    """

    def __init__(
        self,
        network: nn.Module,
        read: Read,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        where: str = "the network",
    ) -> None:
        """Prepare `network` to be run or traced; no weights are read."""
        super().__init__()
        # this type even without weights: networks ask for it
        self.network = network.to(dtype).eval().requires_grad_(False)
        self.read = read
        self.device = device or torch.device("cpu")
        self.dtype = dtype
        self.where = where
        for module in network.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))
        self.training = False

    def forward(self, *inputs: Tensor, part: str = "") -> Tensor:
        """Run the network, or a part of it by its name."""
        hooks = []
        for prefix, module in self.network.named_modules():
            absent = dict(module.named_parameters(recurse=False))
            if absent:
                loads = _Loads(self, f"{prefix}." if prefix else "", absent)
                hooks.append(module.register_forward_pre_hook(loads.load))
                hooks.append(module.register_forward_hook(loads.drop, always_call=True))
        try:
            return self.network.get_submodule(part)(*inputs)
        finally:
            for hook in hooks:
                hook.remove()

    def part(self, name: str) -> "Streamed":
        """A part of the network, whose parameters keep the names that they have in the whole.

        name: an attribute of the network.
        """
        part = _Part(name, self.network.get_submodule(name))
        return Streamed(part, self.read, device=self.device, dtype=self.dtype)

    def loaded(self) -> nn.Module:
        """Return a copy of the network that holds all of its weights."""
        network = copy.deepcopy(self.network)
        state = {name: self.parameter(name) for name, _ in network.named_parameters()}
        network.load_state_dict(state, assign=True, strict=False)  # buffers are there already
        return network.requires_grad_(False)

    def parameter(self, name: str) -> nn.Parameter:
        """Read a parameter onto the device.

        name: the parameter's name in the whole network.

        Raises CheckpointError for numbers that are too large for float16.
        """
        value = self.read(name)
        # writeable arrays are private views of a mapped file; moved to the device as stored,
        # converted and reordered only there
        tensor = torch.from_numpy(value if value.flags.writeable else value.copy())
        tensor = tensor.to(self.device).to(self.dtype).contiguous()
        half = self.dtype == torch.float16 and value.dtype != np.float16
        if half and not tensor.is_meta and not tensor.isfinite().all():
            raise CheckpointError(
                f"{self.where}: {name} has numbers beyond 65504, the end of float16; expected "
                "smaller ones: compute in float32",
                options={"dtype": "fp32"},
            )
        return nn.Parameter(tensor, requires_grad=False)


class _Part(nn.Module):
    """Runs one module under the name that it has in a larger network."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self._name = name
        self.add_module(name, module)

    def forward(self, given: Tensor, question_ids: Tensor | None = None) -> Tensor:
        others = () if question_ids is None else (question_ids,)  # torch.export takes no *inputs
        return self.get_submodule(self._name)(given, *others)


class _Loads:
    """The hooks of one module."""

    def __init__(self, streamed: Streamed, prefix: str, absent: dict[str, nn.Parameter]) -> None:
        self.streamed, self.prefix, self.absent = streamed, prefix, absent

    def load(self, module: nn.Module, inputs: object) -> None:
        for name in self.absent:
            setattr(module, name, self.streamed.parameter(self.prefix + name))

    def drop(self, module: nn.Module, inputs: object, output: object) -> None:
        for name, parameter in self.absent.items():
            setattr(module, name, parameter)
