"""Small random Chinese-CLIPs in both published forms, for tests."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import ChineseCLIPConfig, ChineseCLIPModel

SIZE, PATCH, WIDTH, FEATURES = 32, 8, 24, 10
TEXT_WIDTH, POSITIONS = 16, 60
PIECES = [
    *("[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ca", "##t", "photo", "of"),
    *("##a", "##b", "##c", "20", "##23", *"abc!，。一只猫狗两在草地上的这是个很长描述年"),
]
CONFIG: dict[str, Any] = {
    "projection_dim": FEATURES,
    "vision_config": {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": SIZE,
        "patch_size": PATCH,
    },
    "text_config": {
        "vocab_size": len(PIECES),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
    },
}


def random_model(seed: int = 0) -> ChineseCLIPModel:
    """A model whose every parameter matters."""
    torch.manual_seed(seed)
    model = ChineseCLIPModel(ChineseCLIPConfig(**CONFIG)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            near = 1.0 if re.search(r"norm\d?\.weight$", name, re.IGNORECASE) else 0.0
            parameter.copy_(near + 0.2 * torch.randn_like(parameter))
        elif parameter.ndim > 1:
            parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
        parameter.copy_(parameter.half())  # published as float16
    return model


def write_vocabulary(folder: Path) -> Path:
    """The file of word pieces."""
    file = folder / "vocab.txt"
    file.write_text("\n".join(PIECES) + "\n", "utf-8")
    return file


def write_hugging_face(model: ChineseCLIPModel, folder: Path) -> Path:
    """A folder as Hugging Face has it."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.contiguous().half() for k, v in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps(CONFIG | {"model_type": "chinese_clip"}), "utf-8"
    )
    write_vocabulary(folder)
    preparation = {
        "do_center_crop": False,
        "size": {"height": SIZE, "width": SIZE},
        "crop_size": {"height": SIZE, "width": SIZE},
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preparation), "utf-8")
    return folder


_NAMES = (
    (r"vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
    (r"vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"vision_model\.embeddings\.patch_embedding\.weight", "visual.conv1.weight"),
    (r"vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"\.layer_norm1\.", ".ln_1."),
    (r"\.layer_norm2\.", ".ln_2."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"text_model\.", "bert."),
)


def original_state(model: ChineseCLIPModel) -> dict[str, torch.Tensor]:
    """The same weights under the names of the authors' own file."""
    found: dict[str, torch.Tensor] = {}
    state = dict(model.named_parameters())
    for name, value in state.items():
        if name in ("visual_projection.weight", "text_projection.weight"):
            target = "visual.proj" if name.startswith("visual") else "text_projection"
            found[target] = value.T.contiguous()
            continue
        if fused := re.fullmatch(r"(.*)self_attn\.q_proj\.(weight|bias)", name):
            parts = [state[f"{fused[1]}self_attn.{p}_proj.{fused[2]}"] for p in "qkv"]
            name, value = f"{fused[1]}attn.in_proj_{fused[2]}", torch.cat(parts)
        elif re.search(r"self_attn\.[kv]_proj", name):
            continue
        for old, new in _NAMES:
            name = re.sub(old, new, name)
        found[name] = value
    for part, shape in (("weight", (TEXT_WIDTH, TEXT_WIDTH)), ("bias", (TEXT_WIDTH,))):
        found[f"bert.pooler.dense.{part}"] = torch.ones(shape)
    return found


def write_original(state: dict[str, torch.Tensor], file: Path, settings: dict[str, Any]) -> Path:
    """The authors' own kind of file, with settings beside it."""
    wrapped = {"epoch": 1, "step": 2, "name": "x"}
    wrapped["state_dict"] = {f"module.{k}": v for k, v in state.items()}
    torch.save(wrapped, file)
    file.with_name(f"{file.stem}.config.json").write_text(json.dumps(settings), "utf-8")
    write_vocabulary(file.parent)
    return file


def settings_of_text() -> dict[str, Any]:
    """cn_clip's settings of the text tower."""
    text = CONFIG["text_config"]
    return {
        "vocab_size": text["vocab_size"],
        "text_hidden_size": text["hidden_size"],
        "text_num_hidden_layers": text["num_hidden_layers"],
        "text_num_attention_heads": text["num_attention_heads"],
        "text_intermediate_size": text["intermediate_size"],
        "text_hidden_act": "gelu",
    }


def settings() -> dict[str, Any]:
    """cn_clip's settings of both towers, in two objects."""
    return {
        "vision": {
            "embed_dim": FEATURES,
            "image_resolution": SIZE,
            "vision_layers": 2,
            "vision_width": WIDTH,
            "vision_patch_size": PATCH,
            "vision_head_width": WIDTH // 3,
        },
        "text": settings_of_text(),
    }


def cosines_by_transformers(
    model: ChineseCLIPModel, pixels: np.ndarray, ids: list[list[int]]
) -> np.ndarray:
    """Cosines [pictures, texts]; texts are padded with 0 to 52, and masked."""
    padded = torch.zeros(len(ids), 52, dtype=torch.long)
    for row, text in zip(padded, ids, strict=True):
        row[: len(text)] = torch.tensor(text)
    with torch.inference_mode():
        out = model(
            input_ids=padded, attention_mask=(padded != 0).long(),
            pixel_values=torch.from_numpy(pixels),
        )  # fmt: skip
        return (out.logits_per_image / model.logit_scale.exp()).numpy()


# --- CLIP's own ResNet, as its published code computes it, with batch norms


def random_resnet(width: int, stages: tuple[int, ...], side: int) -> dict[str, torch.Tensor]:
    """Random weights of a ResNet under the published names, without a prefix."""
    torch.manual_seed(3)
    found: dict[str, torch.Tensor] = {}

    def convolution(name: str, norm: str, inputs: int, outputs: int, size: int) -> None:
        scale = (inputs * size * size) ** -0.5
        found[f"{name}.weight"] = torch.randn(outputs, inputs, size, size) * scale
        found[f"{norm}.weight"] = 1 + 0.2 * torch.randn(outputs)
        found[f"{norm}.bias"] = 0.2 * torch.randn(outputs)
        found[f"{norm}.running_mean"] = 0.2 * torch.randn(outputs)
        found[f"{norm}.running_var"] = 0.5 + torch.rand(outputs)
        found[f"{norm}.num_batches_tracked"] = torch.tensor(5)

    convolution("conv1", "bn1", 3, width // 2, 3)
    convolution("conv2", "bn2", width // 2, width // 2, 3)
    convolution("conv3", "bn3", width // 2, width, 3)
    inputs = width
    for stage, blocks in enumerate(stages):
        planes = width * 2**stage
        for block in range(blocks):
            at = f"layer{stage + 1}.{block}"
            convolution(f"{at}.conv1", f"{at}.bn1", inputs, planes, 1)
            convolution(f"{at}.conv2", f"{at}.bn2", planes, planes, 3)
            convolution(f"{at}.conv3", f"{at}.bn3", planes, 4 * planes, 1)
            if block == 0:
                convolution(f"{at}.downsample.0", f"{at}.downsample.1", inputs, 4 * planes, 1)
            inputs = 4 * planes
    positions = (side // 32) ** 2 + 1
    found["attnpool.positional_embedding"] = torch.randn(positions, inputs) * inputs**-0.5
    for name in ("q_proj", "k_proj", "v_proj", "c_proj"):
        outputs = FEATURES if name == "c_proj" else inputs
        found[f"attnpool.{name}.weight"] = torch.randn(outputs, inputs) * inputs**-0.5
        found[f"attnpool.{name}.bias"] = 0.1 * torch.randn(outputs)
    return found


def resnet_features(state: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """What a ResNet makes of pixels, by torch's own batch norm and multi-head attention."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        parts = (state[f"{name}.{p}"] for p in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts)

    def convolve(x: torch.Tensor, name: str, **options: int) -> torch.Tensor:
        return F.conv2d(x, state[f"{name}.weight"], **options)

    x = F.relu(norm(convolve(pixels, "conv1", stride=2, padding=1), "bn1"))
    x = F.relu(norm(convolve(x, "conv2", padding=1), "bn2"))
    x = F.avg_pool2d(F.relu(norm(convolve(x, "conv3", padding=1), "bn3")), 2)
    names = [key.removesuffix(".conv1.weight") for key in state if key.endswith(".conv1.weight")]
    for at in names:
        stride = 2 if at.endswith(".0") and not at.startswith("layer1.") else 1
        y = F.relu(norm(convolve(x, f"{at}.conv1"), f"{at}.bn1"))
        y = F.relu(norm(convolve(y, f"{at}.conv2", padding=1), f"{at}.bn2"))
        y = norm(convolve(F.avg_pool2d(y, stride), f"{at}.conv3"), f"{at}.bn3")
        if f"{at}.downsample.0.weight" in state:
            around = convolve(F.avg_pool2d(x, stride), f"{at}.downsample.0")
            x = norm(around, f"{at}.downsample.1")
        x = F.relu(y + x)
    x = x.flatten(2).permute(2, 0, 1)
    x = torch.cat([x.mean(0, keepdim=True), x]) + state["attnpool.positional_embedding"][:, None]
    bias = torch.cat([state[f"attnpool.{p}_proj.bias"] for p in "qkv"])
    attended, _ = F.multi_head_attention_forward(
        x, x, x, x.shape[-1], x.shape[-1] // 64, None, bias, None, None, False, 0.0,
        state["attnpool.c_proj.weight"], state["attnpool.c_proj.bias"], training=False,
        need_weights=False, use_separate_proj_weight=True,
        q_proj_weight=state["attnpool.q_proj.weight"],
        k_proj_weight=state["attnpool.k_proj.weight"],
        v_proj_weight=state["attnpool.v_proj.weight"],
    )  # fmt: skip
    return attended[0]
