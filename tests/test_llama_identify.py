"""`seechat info` of LLaVA, MiniGPT-4 and InstructBLIP: what each file is, lacks and goes with."""

from pathlib import Path

import pytest

import llama_reference as golden
from seechat_weights.errors import CheckpointError
from seechat_weights.identify import check_given, identify

pytestmark = golden.needs_llama_reference

# path, kind, a part of the title, what is missing, the arguments of an export
KNOWN = [
    (golden.LLAVA / "llava_v1", "llama", "LLaVA", set(), {"lm"}),
    (golden.LLAVA / "llava_v15", "llama", "LLaVA", set(), {"lm"}),
    (golden.LLAVA / "hf_old", "llama", "LLaVA", set(), {"lm"}),
    (golden.LLAVA / "hf_new", "llama", "LLaVA", set(), {"lm"}),
    (golden.LLAVA / "llava_lora", "lora", "LLaVA", {"a LLaMA folder"}, {"lm", "adapter"}),
    (
        golden.LLAVA / "llava_projector_only", "projector", "LLaVA",
        {"a LLaMA folder"}, {"lm", "projector"},
    ),
    (
        golden.MINIGPT4 / "pretrained_minigpt4_tiny.pth", "minigpt4", "MiniGPT-4",
        {"a Vicuna folder", "eva_vit_g.pth", "blip2_pretrained_flant5xxl.pth"},
        {"lm", "eva", "qformer", "checkpoint"},
    ),
    (
        golden.MINIGPT4 / "pretrained_minigpt4_llama2_tiny.pth", "minigpt4", "Llama 2",
        {"a Llama 2 folder", "eva_vit_g.pth"}, {"lm", "eva", "checkpoint"},
    ),
    (
        golden.INSTRUCTBLIP / "instruct_blip_vicuna_tiny_trimmed.pth", "instructblip",
        "InstructBLIP", {"a Vicuna 1.1 folder", "vocab.txt"}, {"lm", "checkpoint", "wordpiece"},
    ),
    (golden.INSTRUCTBLIP / "hf", "llama", "InstructBLIP", set(), {"lm"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "kind", "title", "missing", "options"), KNOWN, ids=lambda v: getattr(v, "name", None)
)
def test_published_files(
    path: Path, kind: str, title: str, missing: set[str], options: set[str]
) -> None:
    found = identify(path)
    assert found.kind == kind and title in found.title and found.usable
    assert found.missing.keys() == missing
    assert found.options.keys() == options
    assert found.runs == (not missing)


def test_the_licence_is_said() -> None:
    for name in ("instruct_blip_vicuna_tiny_trimmed.pth", "hf"):
        assert "research" in identify(golden.INSTRUCTBLIP / name).facts["licence"]


@pytest.mark.parametrize(
    ("option", "path"),
    [
        ("projector", golden.LLAVA / "llava_projector_only"),
        ("projector", golden.LLAVA / "llava_projector_only" / "mm_projector.bin"),
        ("adapter", golden.LLAVA / "llava_lora"),
        ("checkpoint", golden.MINIGPT4 / "pretrained_minigpt4_tiny.pth"),
        ("checkpoint", golden.INSTRUCTBLIP / "instruct_blip_vicuna_tiny_trimmed.pth"),
        ("qformer", golden.INSTRUCTBLIP / "instruct_blip_vicuna_tiny_trimmed.pth"),
        ("lm", golden.LLAVA / "llava_v15"),
        ("clip", golden.LLAVA / "clip_v15"),
    ],
)
def test_what_an_export_takes(option: str, path: Path) -> None:
    check_given(option, path)


@pytest.mark.parametrize(
    ("option", "path", "owner"),
    [
        ("lm", golden.LLAVA / "llava_lora", "adapter"),
        ("eva", golden.MINIGPT4 / "pretrained_minigpt4_tiny.pth", "checkpoint"),
        ("projector", golden.LLAVA / "clip_v15", "clip"),
    ],
)
def test_what_belongs_elsewhere(option: str, path: Path, owner: str) -> None:
    with pytest.raises(CheckpointError, match=f"name it as {owner}"):
        check_given(option, path)
