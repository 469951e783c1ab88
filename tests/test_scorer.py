"""Chinese-CLIP: both published forms, its five sizes, its export, and the command that scores."""

import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file
from transformers import ChineseCLIPConfig, ChineseCLIPModel

import chinese_clip
from chinese_clip import FEATURES, PIECES
from llama_reference import ROOT, needs_llama_reference
from reference import data
from seechat_export.scorer import export_scorer
from seechat_lite.cli.main import main
from seechat_lite.images import load_image, pixels
from seechat_lite.loading import load
from seechat_lite.nn.scorer import streamed_towers
from seechat_lite.scoring.scorer import Scorer
from seechat_weights.bundle.manifest import MANIFEST
from seechat_weights.errors import (
    BundleError,
    CheckpointError,
    EngineError,
    OptionError,
)
from seechat_weights.files.tensor_view import TensorInfo
from seechat_weights.identify import identify
from seechat_weights.scorer.network import PUBLISHED, ResNetSizes
from seechat_weights.scorer.weights import ScorerWeights, open_scorer

TEXTS = [
    "一只猫在草地上",
    "两只狗",
    "a photo of a cat",
    "",
    "[SEP] [PAD]",
    "这是一个很长的描述，" * 8,
    "2023年！",
    "两只狗",
]
PICTURES = ["01_rgb.png", "03_gray_L.png", "09_wide_600x20.png", "14_exact_224.png"]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[ChineseCLIPModel, Path]:
    """A small random model and its folder from Hugging Face."""
    model = chinese_clip.random_model()
    return model, chinese_clip.write_hugging_face(model, tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def scorer(published: tuple[ChineseCLIPModel, Path], tmp_path_factory: Any) -> Path:
    """Its export."""
    out = tmp_path_factory.mktemp("scorers") / "tiny"
    manifest = export_scorer(scorer=published[1], out=out)
    assert manifest.precision == "fp16"  # loses nothing
    return out


# --- against transformers


def test_cosines_are_those_of_transformers(
    published: tuple[ChineseCLIPModel, Path], scorer: Path
) -> None:
    with Scorer(scorer, threads=1) as judge:
        pixels = np.stack([judge.picture(data("images") / name) for name in PICTURES])
        features, cut = judge.texts(TEXTS)
        found = judge.images(pixels) @ features.T
        ids = [judge._encode(text)[0] for text in TEXTS]
    assert cut == [False] * 5 + [True, False, False]
    assert ids[3] == [PIECES.index("[CLS]"), PIECES.index("[SEP]")]
    assert len(ids[5]) == 52 and max(len(text) for text in ids) == 52
    assert PIECES.index("[PAD]") not in ids[4]  # in a text it is no special piece
    expected = chinese_clip.cosines_by_transformers(published[0], pixels, ids)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert np.ptp(expected) > 0.3
    np.testing.assert_array_equal(features[1], features[7])  # equal texts tie


OPAQUE = [
    *("01_rgb.png", "03_gray_L.png", "05_cmyk.jpg", "06_gray16.png", "07_exif_rot6.jpg"),
    *("09_wide_600x20.png", "12_bilevel.png", "14_exact_224.png", "16_1x1.png", "17_gray.jpg"),
]


def test_pixels_are_those_of_transformers(
    published: tuple[ChineseCLIPModel, Path], tmp_path: Path
) -> None:
    """For pictures without transparency, on which its versions differ."""
    from PIL import Image
    from transformers import AutoImageProcessor

    given = json.loads((published[1] / "preprocessor_config.json").read_text("utf-8"))
    given["image_processor_type"] = "ChineseCLIPImageProcessor"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(given), "utf-8")
    processor = AutoImageProcessor.from_pretrained(str(tmp_path), backend="pil")
    spec = open_scorer(published[1]).pixels
    for name in OPAQUE:
        with Image.open(data("images") / name) as image:
            expected = processor(image, return_tensors="np")["pixel_values"][0]
        found = pixels(load_image(data("images") / name).image, spec)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def same_weights(a: ScorerWeights, b: ScorerWeights) -> None:
    for one, other in ((a.image_tower, b.image_tower), (a.text_tower, b.text_tower)):
        assert one.sizes == other.sizes
        for name, shape in one.sizes.items():
            assert one.read(name).shape == shape
            np.testing.assert_array_equal(one.read(name), other.read(name))


def test_both_forms_are_one_model(published: tuple[ChineseCLIPModel, Path], tmp_path: Path) -> None:
    state = {k: v.half() for k, v in chinese_clip.original_state(published[0]).items()}
    file = chinese_clip.write_original(state, tmp_path / "x.pt", chinese_clip.settings())
    original, other = open_scorer(file), open_scorer(published[1])
    same_weights(original, other)
    assert original.image == other.image and original.text == other.text
    assert original.pixels == other.pixels
    assert original.logit_scale == pytest.approx(other.logit_scale)
    assert set(original.ignored) == {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    flat = chinese_clip.settings()["vision"] | chinese_clip.settings_of_text()
    (tmp_path / "x.config.json").write_text(json.dumps(flat), "utf-8")
    assert open_scorer(file).image == original.image


# --- the ResNet, which transformers lacks


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], Path]:
    folder = tmp_path_factory.mktemp("resnet")
    state = chinese_clip.random_resnet(8, (1, 2, 1, 1), 64)
    whole = {k: v for k, v in chinese_clip.original_state(chinese_clip.random_model()).items()
             if not k.startswith("visual.")}  # fmt: skip
    settings = chinese_clip.settings_of_text() | {"embed_dim": FEATURES, "image_resolution": 64}
    whole |= {f"visual.{k}": v for k, v in state.items()}
    return state, chinese_clip.write_original(whole, folder / "rn.pt", settings)


def test_the_resnet_computes_what_it_should(
    resnet: tuple[dict[str, torch.Tensor], Path], tmp_path: Path
) -> None:
    """By torch's own batch norm and multi-head attention; and its graph agrees."""
    state, file = resnet
    weights = open_scorer(file)
    assert weights.image == ResNetSizes(8, (1, 2, 1, 1)) and not weights.halves
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = chinese_clip.resnet_features(state, pixels)
        found = streamed_towers(weights)[0](pixels)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert float(expected.std()) > 0.01
    manifest = export_scorer(scorer=file, out=tmp_path / "rn")
    assert manifest.precision == "fp32" and "ResNet, 5 blocks" in manifest.image.network
    with Scorer(tmp_path / "rn", threads=1) as judge:
        features = judge.images(pixels.numpy())
    length = expected.norm(dim=1, keepdim=True)
    np.testing.assert_allclose(features, (expected / length).numpy(), rtol=0, atol=1e-5)


# --- the published sizes


class Headers:
    """A checkpoint of which only names and shapes are there."""

    def __init__(self, shapes: dict[str, TensorInfo]) -> None:
        self.shapes = shapes

    def read(self, key: str) -> np.ndarray:
        assert key == "logit_scale"
        return np.array(4.6, np.float16)

    def source(self, key: str) -> Path:
        return Path("x.pt")


SIZES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "ViT-B-16": ({"patch_size": 16}, {}, 512),
    "ViT-L-14": ({"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                  "num_attention_heads": 16, "patch_size": 14}, {}, 768),
    "ViT-L-14-336": ({"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                      "num_attention_heads": 16, "patch_size": 14, "image_size": 336}, {}, 768),
    "ViT-H-14": ({"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
                  "num_attention_heads": 16, "patch_size": 14},
                 {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                  "num_attention_heads": 16}, 1024),
    "RN50": ({}, {"num_hidden_layers": 3}, 1024),
}  # fmt: skip


def infos(state: dict[str, torch.Tensor]) -> dict[str, TensorInfo]:
    return {k: TensorInfo(tuple(v.shape), "float16") for k, v in state.items()}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary of the published length."""
    file = tmp_path_factory.mktemp("words") / "vocab.txt"
    pieces = [*PIECES, *(f"[unused{i}]" for i in range(2, 21130 - len(PIECES)))]
    file.write_text("\n".join(pieces) + "\n", "utf-8")
    return file


@pytest.mark.parametrize("form", ["original", "huggingface"])
@pytest.mark.parametrize("size", SIZES)
def test_the_published_sizes(
    size: str, form: str, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vision, text, features = SIZES[size]
    if size == "RN50" and form == "huggingface":
        pytest.skip("published by its authors alone")
    config: dict[str, Any] = {
        "projection_dim": features,
        "vision_config": {"image_size": 224, **vision},
        "text_config": {"vocab_size": 21128, **text},
    }
    with torch.device("meta"):
        model = ChineseCLIPModel(ChineseCLIPConfig(**config))
    place = tmp_path / "x.pt"
    if form == "huggingface":
        shapes, place = infos(model.state_dict()), tmp_path
        (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    else:
        shapes = infos(chinese_clip.original_state(model))
        if size == "RN50":
            monkeypatch.setattr(chinese_clip, "FEATURES", features)
            with torch.device("meta"):
                state = chinese_clip.random_resnet(64, (3, 4, 6, 3), 224)
            shapes = {k: v for k, v in shapes.items() if not k.startswith("visual.")}
            shapes |= {f"visual.{k}": v for k, v in infos(state).items()}
    found = open_scorer(place, vocabulary=words, opener=lambda path: Headers(shapes))  # pyright: ignore
    assert found.size == size and found.features == features
    assert found.text.heads == model.config.text_config.num_attention_heads
    heads = next(p.heads for p in PUBLISHED if p.name == size)
    if isinstance(found.image, ResNetSizes):
        assert found.image.heads == 32
    else:
        assert found.image.heads == heads == model.config.vision_config.num_attention_heads
        assert found.image.activation == "quick_gelu"
    towers = streamed_towers(found)  # the networks have these parameters
    numbers = sum(p.numel() for tower in towers for p in tower.network.parameters())
    millions = {"RN50": 77, "ViT-B-16": 188, "ViT-L-14": 406, "ViT-L-14-336": 407, "ViT-H-14": 958}
    assert round(numbers / 1e6) == pytest.approx(millions[size], abs=1)


@needs_llama_reference
@pytest.mark.parametrize("size", ["base-patch16", "large-patch14", "huge-patch14"])
def test_the_published_keys(size: str, words: Path, tmp_path: Path) -> None:
    """Names and shapes as the authors' models on Hugging Face have them."""
    keys = json.loads((ROOT / "manifests/full_size_keys.json").read_text("utf-8"))
    folded = keys[f"chinese-clip-vit-{size} (HF)"]["keys"]
    shapes = {}
    for key, shape in folded.items():
        start, brace, rest = key.partition("{0..")
        count = int(rest.partition("}")[0]) + 1 if brace else 1
        for i in range(count):
            name = f"{start}{i}{rest.partition('}')[2]}" if brace else key
            shapes[name] = TensorInfo(tuple(shape), "float32")
    named = {"base": "ViT-B-16", "large": "ViT-L-14", "huge": "ViT-H-14"}[size.partition("-")[0]]
    vision, text, features = SIZES[named]
    config = {"vision_config": vision | {"image_size": 224}, "projection_dim": features}
    config["text_config"] = {"vocab_size": 21128, **text}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    found = open_scorer(tmp_path, vocabulary=words, opener=lambda path: Headers(shapes))  # pyright: ignore
    assert found.size == named and not found.halves


# --- golden data of the original code

GOLDEN = ROOT / "chinese_clip_tiny"


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("golden") / "tiny"
    export_scorer(
        scorer=GOLDEN / "clip_cn_vit_tiny.pt", vocabulary=GOLDEN / "hf/vocab.txt", out=out
    )
    return out


@needs_llama_reference
def test_golden_scores(golden: Path) -> None:
    cases = load_file(GOLDEN / "cases.safetensors")
    said = json.loads((GOLDEN / "cases.json").read_text("utf-8"))
    with Scorer(golden, threads=1) as judge:
        texts, cut = judge.texts(said["captions"])
        np.testing.assert_allclose(texts, cases["text_features_normalised"], rtol=0, atol=1e-5)
        assert cut == said["cut"]
        spec = judge.manifest.image.pixels
        mean, std = (np.array(v)[:, None, None] for v in (spec.mean, spec.std))
        found = []
        for name in said["pictures"]:
            pixels = judge.picture(ROOT / "pictures" / name)
            first = f"{name}.u8_if_converted_to_rgb_first"  # as transformers does
            levels = cases[first if first in cases else f"{name}.u8"]
            np.testing.assert_array_equal(np.rint((pixels * std + mean) * 255), levels)
            # the scores are of the authors' code, which resizes palettes without their colours
            levels = cases[f"{name}.u8"].astype(np.float32) / 255
            found.append((levels - mean.astype(np.float32)) / std.astype(np.float32))
        images = judge.images(np.stack(found).astype(np.float32))
    np.testing.assert_allclose(images, cases["image_features_normalised"], rtol=0, atol=1e-5)
    logits = np.exp(judge.manifest.logit_scale) * images @ texts.T
    np.testing.assert_allclose(logits, cases["logits_per_image"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(
        images @ texts.T, cases["logits_per_image"] / said["exp_logit_scale"], rtol=0, atol=1e-5
    )


@needs_llama_reference
def test_golden_word_pieces(golden: Path) -> None:
    said = json.loads((GOLDEN / "wordpiece_cases.json").read_text("utf-8"))
    with Scorer(golden) as judge:
        for case in said["cases"]:
            assert judge._encode(case["text"])[0] == case["ids"], case["text"]


@needs_llama_reference
def test_golden_forms_are_one_model() -> None:
    words = GOLDEN / "hf/vocab.txt"
    original = open_scorer(GOLDEN / "clip_cn_vit_tiny.pt", vocabulary=words)
    same_weights(original, open_scorer(GOLDEN / "hf"))


# --- what is refused


def without(key: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda state: state.pop(key)


def extra(state: dict[str, torch.Tensor]) -> None:
    state["bert.encoder.layer.0.adapter.weight"] = torch.ones(1)


def misshapen(state: dict[str, torch.Tensor]) -> None:
    state["visual.proj"] = torch.ones(FEATURES, 3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("text_projection"), "lacks text_projection"),
        (without("logit_scale"), "lacks logit_scale"),
        (without("visual.proj"), "1 missing (visual.proj)"),
        (without("bert.embeddings.LayerNorm.bias"), "missing (bert.embeddings.LayerNorm.bias)"),
        (without("bert.embeddings.word_embeddings.weight"), "holds no Chinese-CLIP"),
        (without("bert.encoder.layer.1.output.dense.bias"), "layer.1.output.dense.bias"),
        (extra, "not known (bert.encoder.layer.0.adapter.weight)"),
        (misshapen, f"visual.proj is [{FEATURES}, 3] instead of"),
    ],
)  # fmt: skip
def test_checkpoints_that_lack_something(
    change: Callable[[dict[str, torch.Tensor]], object], said: str, tmp_path: Path
) -> None:
    state = chinese_clip.original_state(chinese_clip.random_model())
    change(state)
    file = chinese_clip.write_original(state, tmp_path / "x.pt", chinese_clip.settings())
    with pytest.raises(CheckpointError) as e:
        open_scorer(file)
    assert said in str(e.value) and "expected" in str(e.value)


def test_settings_that_are_missing_or_wrong(tmp_path: Path) -> None:
    state = chinese_clip.original_state(chinese_clip.random_model())
    file = chinese_clip.write_original(state, tmp_path / "x.pt", chinese_clip.settings())
    beside = tmp_path / "x.config.json"
    for part, name, value in (
        ("vision", "vision_head_width", 7),
        ("vision", "vision_head_width", 0),
        ("vision", "vision_layers", 3),
        ("text", "text_num_attention_heads", "4"),
        ("text", "text_hidden_act", "relu"),
    ):
        given = chinese_clip.settings()
        given[part][name] = value
        beside.write_text(json.dumps(given), "utf-8")
        with pytest.raises(CheckpointError, match="put the file there that belongs"):
            open_scorer(file)
    beside.unlink()
    with pytest.raises(
        CheckpointError, match=r"expected one of RN50, ViT-B-16.* as x\.config\.json"
    ):
        open_scorer(file)
    (tmp_path / "vocab.txt").unlink()
    beside.write_text(json.dumps(chinese_clip.settings()), "utf-8")
    with pytest.raises(CheckpointError, match=r"holds no vocab\.txt") as e:
        open_scorer(file)
    assert "tokenizer" in e.value.options


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a\nb\n", "2 lines"),
        ("\n".join(["x", *PIECES[1:]]), "lacks [PAD]"),
        ("\n".join([*PIECES[:-1], "a"]), "'a' on two lines"),
        ("\n".join(PIECES).encode("utf-16"), "not UTF-8"),
    ],
)
def test_vocabularies_of_others(
    published: tuple[ChineseCLIPModel, Path], tmp_path: Path, text: str | bytes, said: str
) -> None:
    file = tmp_path / "words"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=r"take it from https"):
        open_scorer(published[1], vocabulary=file)
    with pytest.raises(CheckpointError) as e:
        open_scorer(published[1], vocabulary=file)
    assert said in str(e.value)


def test_weights_without_numbers(tmp_path: Path) -> None:
    state = chinese_clip.original_state(chinese_clip.random_model())
    state["bert.encoder.layer.1.output.dense.weight"][3, 2] = torch.nan
    file = chinese_clip.write_original(state, tmp_path / "x.pt", chinese_clip.settings())
    with pytest.raises(CheckpointError, match=r"output.dense.weight holds NaN"):
        export_scorer(scorer=file, out=tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["vocab.txt", "x.config.json", "x.pt"]


def copied(scorer: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(scorer, tmp_path / "copy"))


def test_a_scorer_that_was_changed(scorer: Path, tmp_path: Path) -> None:
    copy = copied(scorer, tmp_path)
    for name in ("image.onnx.data", "vocab.txt"):
        file, whole = copy / name, (copy / name).read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(BundleError, match="sha256"):
            Scorer(copy)
        file.write_bytes(whole[:-1])
        with pytest.raises(BundleError, match="bytes, the manifest says"):
            Scorer(copy)
        file.unlink()
        with pytest.raises(BundleError, match="missing"):
            Scorer(copy)
        file.write_bytes(whole)
    Scorer(copy).close()


def rehashed(copy: Path) -> None:
    """Make the manifest of a changed scorer right again, as somebody with bad intentions would."""
    from seechat_weights.bundle.manifest import sha256

    said = json.loads((copy / MANIFEST).read_text("utf-8"))
    for name in said["files"]:
        file = copy / name
        said["files"][name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    (copy / MANIFEST).write_text(json.dumps(said), "utf-8")


@pytest.mark.parametrize("graph", ["image.onnx", "text.onnx"])
def test_a_graph_that_no_export_writes(scorer: Path, tmp_path: Path, graph: str) -> None:
    copy = copied(scorer, tmp_path)
    model = onnx.load(copy / graph, load_external_data=False)
    model.graph.node.append(onnx.helper.make_node("RandomNormal", [], ["r"], shape=[1]))
    onnx.save(model, copy / graph)
    rehashed(copy)
    with pytest.raises(BundleError, match="the operator RandomNormal, which no export writes"):
        Scorer(copy)
    model = onnx.load(scorer / graph, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    next(e for e in tensor.external_data if e.key == "location").value = "/etc/passwd"
    onnx.save(model, copy / graph)
    rehashed(copy)
    with pytest.raises(BundleError, match="which the manifest does not list"):
        Scorer(copy)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("features", 0, "features is 0"),
        ("features", 11, "export the bundle again"),
        ("logit_scale", "x", "logit_scale is 'x'"),
        ("precision", "int4", "precision is 'int4'"),
        ("text.context", 2, "text.context is 2"),
        ("text.vocab_size", 5, "expected the 5 word pieces"),
        ("text.vocabulary", "../x", "a file in use is '../x'"),
        ("image.graph", "x.onnx", "a file in use is 'x.onnx'"),
        ("image.pixels.image_size", 5000, "pixels.image_size is 5000"),
        ("image.pixels.image_size", 40, "pixel_values is"),
        ("version", 2, "newer than this program"),
        ("extra", 1, "unknown fields ['extra']"),
    ],
)  # fmt: skip
def test_manifests(scorer: Path, tmp_path: Path, path: str, value: Any, said: str) -> None:
    copy = copied(scorer, tmp_path)
    found = at = json.loads((copy / MANIFEST).read_text("utf-8"))
    *parts, last = path.split(".")
    for part in parts:
        at = at[part]
    at[last] = value
    (copy / MANIFEST).write_text(json.dumps(found), "utf-8")
    with pytest.raises(BundleError) as e:
        Scorer(copy)
    assert said in str(e.value)


def test_one_kind_for_the_other(scorer: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="a scorer of captions; expected"):
        load(scorer)
    from seechat_weights.builtin import BUILTIN

    with pytest.raises(BundleError, match="a model's bundle; expected"):
        Scorer(BUILTIN)
    with pytest.raises(BundleError, match="no such folder"):
        Scorer(tmp_path / "none")
    with pytest.raises(OptionError, match="threads"):
        Scorer(scorer, threads=-1)


def test_a_closed_scorer(scorer: Path) -> None:
    judge = Scorer(scorer)
    judge.close()
    with pytest.raises(EngineError, match="closed"):
        judge.texts(["a"])


def test_it_is_said_what_it_is(
    scorer: Path, published: tuple[ChineseCLIPModel, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    assert identify(scorer).kind == "scorer"
    found = identify(published[1])
    assert found.kind == "chinese-clip" and found.options == {"scorer": published[1]}
    assert main(["info", str(published[1])]) == 0
    assert "seechat export --scorer" in " ".join(capfd.readouterr().out.split())
    assert main(["info", str(scorer), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["kind"] == "scorer"


# --- the commands


def test_export_by_command_refuses_what_does_not_go_together(
    published: tuple[ChineseCLIPModel, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    begin = ["export", "--scorer", str(published[1]), "--out", str(tmp_path / "x")]
    for more, said in (
        (["--precision", "int4"], "expected fp32 or fp16"),
        (["--block-size", "32"], "--block-size goes with --lm"),
        (["--eva", "x"], "--eva goes with --lm"),
        (["--lm", "x"], "not allowed with"),
    ):
        with pytest.raises(SystemExit) as e:
            main([*begin, *more])
        assert e.value.code == 2 and said in capfd.readouterr().err
    (tmp_path / "x").mkdir()
    assert main(begin) == 1
    assert "exists already" in capfd.readouterr().err


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Captions by three methods, in three forms."""
    texts = {
        "ours": ["一只猫", "两只狗", "草地", "a cat"],
        "web": ["两只狗", "一只猫在草地上", "a photo of a cat", "的"],
        "third": ["这是一个很长的描述，" * 8, "", "两只狗", "a photo"],
    }
    lines = [{"image": n, "caption": t} for n, t in zip(PICTURES, texts["ours"], strict=True)]
    tabs = [f"{n}\t{t}" for n, t in zip(PICTURES, texts["web"], strict=True)]
    whole = dict(zip(PICTURES, texts["third"], strict=True))
    contents = {"ours": "\n".join(map(json.dumps, lines)), "web": "\n".join(tabs),
                "third": json.dumps(whole)}  # fmt: skip
    found = {}
    for name, text in contents.items():
        found[name] = tmp_path / f"{name}.captions"
        found[name].write_text(text, "utf-8")
    return found


def test_the_command(
    scorer: Path, files: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pictures = tmp_path / "list.txt"
    pictures.write_text("\n".join(str(data("images") / n) for n in PICTURES), "utf-8")
    outs = {n: tmp_path / n for n in ("scores", "chart", "page")}
    command = ["eval", "caption", "--images", str(pictures), "--scorer", str(scorer), "--captions"]
    command += [f"{name}={file}" for name, file in files.items()]
    written = [part for name, file in outs.items() for part in (f"--{name}", str(file))]
    assert main([*command, *written, "--json", "--batch", "3"]) == 0
    captured = capfd.readouterr()
    report = json.loads(captured.out)
    assert "third has 1 empty caption, counted like others" in captured.err
    assert report["pictures"]["compared"] == 4 and not report["pictures"]["incomplete"]
    lines = [json.loads(line) for line in outs["scores"].read_text("utf-8").splitlines()]
    cosines = np.array([[line["cosine"][name] for name in files] for line in lines])
    methods = report["methods"]
    assert [m["name"] for m in methods] == list(files)
    np.testing.assert_allclose([m["cosine"] for m in methods], cosines.mean(0))
    wins = np.bincount(cosines.argmax(1), minlength=3) / 4
    np.testing.assert_allclose([m["wins"] for m in methods], wins)
    assert sum(m["wins"] for m in methods) == pytest.approx(1)
    assert [m["cut"] for m in methods] == [0, 0, 1]
    assert report["pairs"]["ours"]["web"]["wins"] + report["pairs"]["web"]["ours"]["wins"] == 1
    assert sum(report["published"]["shares"].values()) == pytest.approx(1)
    assert outs["chart"].read_text("utf-8").startswith("<svg")
    HTMLParser().feed(outs["page"].read_text("utf-8"))
    # scored by hand, through the library
    with Scorer(scorer) as judge:
        texts = [t for name in files for t in _texts(files[name])]
        pixels = np.stack([judge.picture(data("images") / n) for n in PICTURES])
        features = judge.texts(texts)[0].reshape(3, 4, -1)
        by_hand = np.einsum("pf,mpf->pm", judge.images(pixels), features)
    np.testing.assert_allclose(cosines, by_hand, atol=1e-6)
    # for people; nothing that is there is written over
    assert main(command) == 0
    printed = capfd.readouterr().out
    assert "4 pictures, judged by" in printed and "SEEChat 33, web text 23" in printed
    for name, file in outs.items():
        with pytest.raises(SystemExit):
            main([*command, f"--{name}", str(file)])
        assert "exists already" in capfd.readouterr().err


def _texts(file: Path) -> list[str]:
    from seechat_lite.scoring.captions import CaptionFile

    found = [CaptionFile("x", file).find([name], "") for name in PICTURES]
    return [text for text in found if text is not None]


def test_the_command_says_what_is_wrong(
    scorer: Path, files: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    begin = ["eval", "caption", "--images", str(data("images")), "--scorer", str(scorer)]
    ours = ["--captions", f"ours={files['ours']}"]
    for more in (["--captions", "x"], ["--captions", "=x"], [*ours, *ours],
                 ["--captions", f"a\x1b={files['ours']}"], [*ours, "--batch", "0"],
                 [*ours, "--shown", "-1"], [*ours, "--seed", "-1"], [*ours, "--threads", "-1"],
                 ):  # fmt: skip
        with pytest.raises(SystemExit) as e:
            main([*begin, *more])
        assert e.value.code == 2
        assert "\x1b" not in capfd.readouterr().err
    other = tmp_path / "other"
    other.write_text("nothing.png\tx", "utf-8")
    for more, said in (
        (["--captions", f"a={other}"], "has a caption by every method"),
        (["--captions", f"a={tmp_path / 'none'}"], "cannot be read"),
        ([*ours, "--device", "nowhere"], "device 'nowhere'"),
    ):
        assert main([*begin, *more]) == 1
        assert said in capfd.readouterr().err, more
    assert main([*begin, *ours]) == 0  # most pictures there have no caption
    assert "are left out" in capfd.readouterr().err
