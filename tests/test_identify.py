"""One look says what a folder or file is, by its content alone."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from reference import data, manifest
from seechat_lite.cli.main import main
from seechat_weights.errors import CheckpointError
from seechat_weights.files.reading import LFS_POINTER
from seechat_weights.identify import Identity, check_given, identify

POINTER = LFS_POINTER + b"/spec/v1\noid sha256:5e974d9a\nsize 2706249\n"
CLIP_NEEDS = ("a ChatGLM-6B folder", "a projector")
# torch and what comes with it cannot be imported
WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "safetensors", "seechat_export"):
    sys.modules[name] = None
from seechat_lite.cli.main import main
raise SystemExit(main(["info", sys.argv[1]]))
"""


def neutral(path: Path, tmp_path: Path) -> Path:
    """A copy under a name that says nothing."""
    copy = tmp_path / "x"
    shutil.copytree(path, copy) if path.is_dir() else shutil.copy(path, copy)
    return copy


@pytest.mark.parametrize(
    ("source", "kind", "facts", "missing"),
    [
        ("chatglm_tiny", "chatglm", {"precision": "float32", "vision": "none"}, ()),
        ("chatglm_bin", "chatglm", {"precision": "float16"}, ("config.json", "ice_text.model")),
        ("chatglm_tiny/ice_text.model", "tokenizer", {}, ("a ChatGLM-6B folder",)),
        (
            "vision/checkpoint_100.pth",
            "seechat",
            {"holds": "projector"},
            ("a ChatGLM-6B folder", "eva_vit_g.pth", "blip2_pretrained_flant5xxl.pth"),
        ),
        (
            "vision/checkpoint_trainable_qformer.pth",
            "seechat",
            {"holds": "ln_vision, Q-Former, queries, projector"},
            ("a ChatGLM-6B folder", "eva_vit_g.pth"),
        ),
        (
            "vision/open_clip_pytorch_model.bin",
            "clip",
            {"names": "open_clip", "vision": "4 layers, width 48, patches of 14"},
            CLIP_NEEDS,
        ),
        ("vision/clip_hf", "clip", {"names": "Hugging Face"}, CLIP_NEEDS),
        (
            "vision/mm_projector_mlp2x_gelu.bin",
            "projector",
            {"bridge": "mlp2x_gelu, 48 to 64"},
            ("a ChatGLM-6B folder", "a CLIP ViT-L/14"),
        ),
    ],
)  # fmt: skip
def test_fixtures(
    tmp_path: Path, source: str, kind: str, facts: dict[str, str], missing: tuple[str, ...]
) -> None:
    found = identify(neutral(data(source), tmp_path))
    assert (found.kind, found.usable, tuple(found.missing)) == (kind, True, missing)
    assert facts.items() <= found.facts.items()
    assert kind == "tokenizer" or found.path in found.options.values()


def of_keys(
    tmp_path: Path, keys: dict[str, tuple[int, ...]], config: dict | None = None
) -> Identity:
    save_file({k: torch.zeros(s) for k, s in keys.items()}, tmp_path / "model.safetensors")
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    return identify(tmp_path)


QKV = "transformer.layers.0.attention.query_key_value.weight"
LM = {
    "transformer.word_embeddings.weight": (9, 8),
    "transformer.layers.0.input_layernorm.weight": (8,),
}
SAT = {"mixins.chatglm-final.lm_head.weight": (9, 8), "mixins.eva.model.glm_proj.weight": (8, 4)}


@pytest.mark.parametrize(
    ("keys", "kind", "expected"),
    [
        (LM | {QKV: (24, 8), f"{QKV}_scale": (24,)}, "chatglm", "int8, the authors' own"),
        (LM | {QKV: (24, 4), f"{QKV}_scale": (24,)}, "chatglm", "int4, the authors' own"),
        (LM | {QKV: (24, 8), "image_encoder.vit.x": (1,)}, "visualglm", "EVA ViT-g + Q-Former"),
        (LM | {QKV: (24, 8)} | SAT, "visualglm", "SwissArmyTransformer"),
        (
            LM | {QKV: (24, 8), "transformer.prefix_encoder.embedding.weight": (7, 16)},
            "chatglm",
            "a prefix of 7 tokens",
        ),
        ({"transformer.prefix_encoder.embedding.weight": (7, 16)}, "ptuning", "7 tokens"),
        (
            {f"base_model.model.{QKV[:-7]}.lora_{m}.weight": (4, 4) for m in "AB"},
            "lora",
            "rank 4 on 1 linears",
        ),
        (
            {
                f"base_model.model.transformer.layers.3.mlp.dense_4h_to_h.lora_{m}.weight": (2, 2)
                for m in "AB"
            },
            "lora",
            "rank 2 on 1 linears",
        ),
        (
            {f"base_model.model.model.layers.0.q_proj.lora_{m}.weight": (4, 4) for m in "AB"},
            "other",
            "adapter of another model",
        ),
        ({"model.layers.0.self_attn.q_proj.weight": (4, 4)}, "llama", "a LLaMA"),
        ({"transformer.encoder.layers.0.x": (4, 4)}, "other", "ChatGLM2-6B or ChatGLM3-6B"),
        ({"bert.embeddings": (4, 4)}, "other", "not of this family"),
        ({"Qformer.bert.encoder.layer.0.x": (4,), "t5_proj.weight": (4,)}, "qformer", "Q-Former"),
        (
            {"blocks.0.attn.q_bias": (8,), "patch_embed.proj.weight": (8, 3, 14, 14)},
            "eva",
            "patches of 14",
        ),
    ],
)
def test_signatures(
    tmp_path: Path, keys: dict[str, tuple[int, ...]], kind: str, expected: str
) -> None:
    found = of_keys(tmp_path, keys)
    assert found.kind == kind and (found.usable or "cannot be used" in found.facts) == (
        kind != "other"
    )
    assert any(expected in text for text in (found.title, *found.facts.values()))
    if "int4" in expected:
        assert found.missing["config.json"].endswith("/chatglm-6b-int4")


def test_later_generations_are_named(tmp_path: Path) -> None:
    found = of_keys(
        tmp_path,
        {"transformer.encoder.layers.0.x": (4, 4)},
        {"model_type": "chatglm", "padded_vocab_size": 151552},
    )
    assert not found.usable and found.title.startswith("GLM-4:")


def test_published_shards_that_were_not_downloaded(tmp_path: Path) -> None:
    """What `git clone` without LFS leaves: pointers, all named with where to get them."""
    shutil.copytree(data("chatglm_bin"), tmp_path, dirs_exist_ok=True)
    config = {"model_type": "chatglm", "num_layers": 3, "quantization_bit": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "pytorch_model-00001-of-00003.bin").unlink()
    (tmp_path / "pytorch_model-00003-of-00003.bin").write_bytes(POINTER)
    (tmp_path / "ice_text.model").write_bytes(POINTER)
    found = identify(tmp_path)
    assert found.kind == "chatglm" and "3 layers" in found.facts["language model"]
    assert list(found.missing) == [
        "pytorch_model-00001-of-00003.bin",
        "pytorch_model-00003-of-00003.bin",
        "ice_text.model",
    ]
    assert set(found.missing.values()) == {"https://huggingface.co/THUDM/chatglm-6b-int4"}


def test_other_things(tmp_path: Path, text_bundle: Path) -> None:
    assert identify(text_bundle).kind == "bundle"
    (tmp_path / "pointer").write_bytes(POINTER)
    found = identify(tmp_path / "pointer")
    assert found.kind == "lfs-pointer" and "2706249" in found.facts["stands for"]
    shutil.copy(data("chatglm_tiny/config.json"), tmp_path / "config.json")
    assert list(identify(tmp_path).missing) == ["weights", "ice_text.model"]
    (tmp_path / "config.json").write_text('{"model_type": "opt"}')
    assert identify(tmp_path).title == "a opt model, not of this family"
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "weights" in identify(tmp_path).missing
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no seechat\.json, weights or tokenizer"):
        identify(tmp_path)
    (tmp_path / "a/b").mkdir(parents=True)
    shutil.copy(data("chatglm_tiny/config.json"), tmp_path / "a/b")
    with pytest.raises(CheckpointError, match=re.escape(f": name {tmp_path / 'a/b'}")):
        identify(tmp_path)
    for name in ("mm_projector_linear.bin", "checkpoint_100.pth"):
        shutil.copy(data(f"vision/{name}"), tmp_path)
    assert identify(tmp_path).kind == "several"


def test_a_bundle_says_what_it_is_made_of(tmp_path: Path, text_bundle: Path) -> None:
    folder = shutil.copytree(text_bundle, tmp_path / "b")
    written = json.loads((folder / "seechat.json").read_text("utf-8"))
    written["decoder"] |= {"precision": "int4", "block_size": 64, "head_bits": 8}
    shards = {f"pytorch_model-{i}.bin": {} for i in range(1, 9)}
    written["provenance"] = {
        "lm": shards,
        "adapter": {"adapter_model.bin": {"bytes": 3}},
        "prefix": ["of another form"],
        "downloads": {"lm": {"repository": "THUDM/chatglm-6b", "revision": "8b7d335"}},
        "license": "ChatGLM-6B\x1b[2J",
    }
    (folder / "seechat.json").write_text(json.dumps(written))
    facts = identify(folder).facts
    assert facts["precision"] == "int4, blocks of 64; the head int8; embeddings float32"
    expected = "lm pytorch_model-1.bin … (8 files), adapter adapter_model.bin"
    assert facts["made from"] == expected
    assert facts["downloaded lm"] == "THUDM/chatglm-6b at 8b7d335"
    assert facts["licence"] == r"ChatGLM-6B\x1b[2J"


def test_shards_are_missing_and_nothing_tells_whose(tmp_path: Path) -> None:
    shutil.copytree(data("chatglm_bin"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "pytorch_model-00002-of-00003.bin").unlink()
    found = identify(tmp_path)
    assert found.title == "weights of which some are missing" and not found.usable
    assert list(found.missing) == ["pytorch_model-00002-of-00003.bin", "config.json"]


@pytest.mark.parametrize(
    ("option", "source", "message"),
    [
        ("lm", "chatglm_tiny", ""),
        ("lm", "chatglm_bin", ""),
        ("lm", "prefix.bin", "a P-tuning prefix for ChatGLM-6B; expected ChatGLM-6B, VisualGLM-6B "
         "or a LLaMA as lm: name it as prefix"),
        ("lm", "vision/checkpoint_100.pth", "name it as checkpoint"),
        ("lm", "bundle", "a bundle: tiny-text; .*: a bundle is exported already"),
        ("lm", "nowhere", "no such file or folder; .*or name it on the Hub as owner/name"),
        ("prefix", "prefix.bin", ""),
        ("prefix", "chatglm_tiny", "name it as lm"),
        ("adapter", "prefix.bin", "expected a LoRA adapter as adapter: name it as prefix"),
        ("tokenizer", "chatglm_tiny/ice_text.model", ""),
        ("tokenizer", "chatglm_tiny", "expected the file ice_text.model .*: name .*ice_text.model"),
        ("eva", "vision/eva_vit_tiny.pth", ""),
        ("eva", "vision/blip2_tiny_flant5.pth", "is BLIP-2's Q-Former; expected EVA ViT-g as eva"
         ": name it as qformer"),
        ("qformer", "vision/eva_vit_tiny.pth", "name it as eva"),
        ("qformer", "vision/blip2_tiny_flant5.pth", ""),
        ("checkpoint", "vision/checkpoint_100_legacy_format.pth", ""),
        ("checkpoint", "vision/blip2_tiny_flant5.pth", ""),
        ("checkpoint", "chatglm_tiny", "name it as lm"),
        ("clip", "vision/clip_hf", ""),
        ("clip", "vision/mm_projector_linear.bin", "name it as projector"),
        ("projector", "vision/mm_projector_linear.bin", ""),
        ("projector", "vision/checkpoint_100.pth", ""),
        ("projector", "vision/clip_open_clip", "name it as clip"),
    ],
)  # fmt: skip
def test_what_is_given_to_another_option(
    option: str, source: str, message: str, text_bundle: Path
) -> None:
    names = {"prefix.bin": "chatglm_tiny/ptuning_embed_pytorch_model.bin"}
    path = text_bundle if source == "bundle" else data(names.get(source, source))
    if not message:
        check_given(option, path)
        return
    with pytest.raises(CheckpointError, match=message) as e:
        check_given(option, path)
    assert str(e.value).startswith(f"{path}: ")


def test_the_command_says_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    eva, qformer = (str(data(f"vision/{n}")) for n in ("eva_vit_tiny.pth", "blip2_tiny_flant5.pth"))
    files = ["--lm", str(data("chatglm_tiny")), "--eva", qformer, "--qformer", eva]
    assert main(["export", *files, "--out", str(tmp_path / "b")]) == 1
    assert "expected EVA ViT-g as eva: name it as qformer (--qformer " in capfd.readouterr().err


def test_a_training_runs_folder_is_an_adapter(tmp_path: Path) -> None:
    shutil.copy(data("chatglm_tiny/model.safetensors"), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    check_given("adapter", tmp_path)


@pytest.mark.parametrize("name", ["chatglm-6b", "chatglm-6b-150528"])
def test_published_sizes(tmp_path: Path, name: str) -> None:
    """The full-size table of contents, with nothing behind it but a hole."""
    header, at = {}, 0
    for key, (shape, dtype) in manifest(name).items():
        width, count = {"float16": ("F16", 2), "float32": ("F32", 4)}[dtype], 1
        for n in shape:
            count *= n
        end = at + count * width[1]
        header[key] = {"dtype": width[0], "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + at)
    found = identify(tmp_path)
    assert found.facts["language model"] == "28 layers, hidden 4096"
    assert ("the old one" in found.facts["vocabulary"]) == name.endswith("150528")
    assert found.facts["stored as"].startswith("float16 100%")


def test_info_prints_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = str(data("vision/checkpoint_100.pth"))
    assert main(["info", path]) == 0
    out = capfd.readouterr().out
    assert "a checkpoint of SEEChat" in out and "--eva eva_vit_g.pth" in " ".join(out.split())
    assert "https://storage.googleapis.com/sfr-vision-language-research/" in out
    assert main(["info", path, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["kind"] == "seechat"
    save_file({"bert.embeddings": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert main(["info", str(tmp_path)]) == 1
    assert "not of this family" in capfd.readouterr().out


def test_info_needs_no_torch() -> None:
    file = data("vision/checkpoint_100_legacy_format.pth")
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, file], capture_output=True, text=True
    )
    assert run.returncode == 0 and "SEEChat" in run.stdout, run.stderr
