"""Weights that are rounded for what their layers see."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import seechat_lite as sl
from llama_reference import LLAMA, needs_llama_reference
from reference import data
from seechat_export import calibration, error_feedback
from seechat_export.error_feedback import Moments, rounded_blocks
from seechat_export.export import export_bundle
from seechat_lite.nn.block_quantization import dequantize_blocks, quantize_blocks
from seechat_weights.bundle.layout import reordered
from seechat_weights.bundle.manifest import read_manifest
from seechat_weights.errors import CheckpointError, OptionError
from seechat_weights.vision.weights import load_clip

LM = data("chatglm_tiny")


def moments_of(x: Tensor) -> Moments:
    moments = Moments(x.shape[1])
    moments.add(x)
    return moments


def cost(weight: Tensor, arrays: tuple[Tensor, Tensor], x: Tensor) -> float:
    """The squared error of the product with x."""
    restored = dequantize_blocks(*arrays, bits=4, inputs=weight.shape[1])
    return float(((weight - restored) @ x.t()).double().square().sum())


@given(st.integers(0, 2**32 - 1), st.sampled_from([20, 64, 96]), st.sampled_from([32, 64]))
def test_inputs_that_do_not_go_along_are_rounded_as_ever(
    seed: int, inputs: int, block: int
) -> None:
    """Nothing can be made up for then; also where inputs do not fill a block."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, inputs, generator=generator)
    moments = Moments(inputs)
    moments.spans = [torch.eye(inputs) * 3]
    codes, scales = rounded_blocks(weight, moments, bits=4, block_size=block)
    expected = quantize_blocks(weight, bits=4, block_size=block)
    assert torch.equal(codes, expected[0])
    assert torch.allclose(scales, expected[1], rtol=1e-5)


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_products_keep_more_of_what_they_were(seed: int, narrow: bool) -> None:
    """Also of spans that are taken apart, and of fewer inputs seen than there are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(96, 96, generator=generator)
    x = torch.randn(60 if narrow else 400, 96, generator=generator) @ mixing
    weight = torch.randn(24, 96, generator=generator)
    plain = cost(weight, quantize_blocks(weight, bits=4, block_size=32), x)
    assert (
        cost(weight, rounded_blocks(weight, moments_of(x), bits=4, block_size=32), x) < 0.8 * plain
    )


def test_inputs_that_never_come_do_no_harm() -> None:
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    x[:, 10:40] = 0
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    codes, scales = rounded_blocks(weight, moments_of(x), bits=4, block_size=32)
    restored = dequantize_blocks(codes, scales, bits=4, inputs=64)
    assert (restored - weight)[:, 10:32].abs().max() < 1  # they may come one day
    for silent in (torch.zeros(3, 64), torch.full((3, 64), 1e20)):
        found = rounded_blocks(weight, moments_of(silent), bits=4, block_size=32)
        assert all(bool(a.float().isfinite().all()) for a in found)


def test_moments_follow_the_order_of_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """With places for padding, and across spans where they stay within one."""
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    order = np.array([0, 2, 1, 3, -1, -1, 4, 6, 5, 7, -1, -1])
    for span in (100, 6):
        monkeypatch.setattr(error_feedback, "SPAN", span)
        moved = moments_of(x).reordered(torch.from_numpy(order))
        expected = moments_of(torch.from_numpy(reordered(x.numpy(), order, axis=1)))
        if span == 100:
            assert torch.allclose(moved.spans[0], expected.spans[0])
        for found, right in zip(moved.spans, expected.spans, strict=True):
            assert torch.allclose(found.diag(), right.diag())


# --- exports ------------------------------------------------------------------------------------


class StopHere(Exception):  # noqa: N818
    pass


def weights(folder: Path) -> bytes:
    return (folder / "decoder.onnx.data").read_bytes()


@pytest.mark.export
def test_an_interrupted_export_continues_with_the_same_bytes(tmp_path: Path) -> None:
    """At any layer: what earlier layers make of the texts is found out from what was written."""
    manifest = export_bundle(lm=LM, out=tmp_path / "whole", calibrate=True, block_size=32)
    facts = manifest.provenance["calibration"]
    assert facts["tokens"] > 500 and facts["pictures"] == 0
    report = json.loads((tmp_path / "whole" / "parity.json").read_text())
    assert report["against_checkpoint"]["top1_agreement"] > 0
    export_bundle(lm=LM, out=tmp_path / "plain", block_size=32)
    assert weights(tmp_path / "plain") != weights(tmp_path / "whole")

    for stop_at in (0.2, 0.5, 0.9):

        def interrupt(stage: str, done: int, total: int, at: float = stop_at) -> None:
            if stage == "weights" and done >= at * total:
                raise StopHere

        out = tmp_path / f"b{stop_at}"
        asked = {"lm": LM, "out": out, "calibrate": True, "block_size": 32}
        with pytest.raises(StopHere):
            export_bundle(**asked, progress=interrupt)
        export_bundle(**asked)
        assert weights(out) == weights(tmp_path / "whole")


@pytest.mark.export
def test_texts_and_pictures_of_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A picture is seen by the model's own vision network; what is neither is passed over."""
    folder = tmp_path / "seen"
    (folder / "more").mkdir(parents=True)
    (folder / "a.md").write_text("一段文字。A text.\n" * 200, "utf-8")
    (folder / "b.txt").write_bytes(b"\xff\xfe not UTF-8 \xe4")
    (folder / "c.json").write_text("{}")
    Image.effect_noise((40, 30), 60).save(folder / "more" / "p.png")
    vision = load_clip(
        clip=data("vision/clip_open_clip"), projector=data("vision/mm_projector_linear.bin")
    )
    found = {}
    for name, seeing in (("texts", None), ("both", vision)):
        out = tmp_path / name
        manifest = export_bundle(lm=LM, out=out, vision=seeing, calibrate=folder, block_size=32)
        found[name] = manifest.provenance["calibration"]
        with sl.load(out, context=64) as model:
            assert model.chat().ask("你好", max_new_tokens=2) is not None
    assert (found["texts"]["pictures"], found["both"]["pictures"]) == (0, 1)
    assert found["both"]["tokens"] > found["texts"]["tokens"] > 500
    assert ["c.json" in r.message for r in caplog.records if "calibration" in r.message] == [True]


@pytest.mark.export
def test_what_it_cannot_be_calibrated_with_is_said(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "none.txt").touch()
    for place in (empty, tmp_path / "nothing.txt", tmp_path / "none.txt", tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match="calibrate with"):
            export_bundle(lm=LM, out=tmp_path / "b", calibrate=place)
    for precision in ("int8", "fp16", "fp32"):
        with pytest.raises(OptionError, match="calibrate"):
            export_bundle(lm=LM, out=tmp_path / "b", calibrate=True, precision=precision)
    assert not list(tmp_path.glob("b*"))


@pytest.mark.export
def test_what_the_authors_quantized_is_kept(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="as their authors quantized them"):
        export_bundle(
            lm=data("quantized/int4"),
            tokenizer=LM / "ice_text.model",
            out=tmp_path / "b",
            calibrate=True,
        )


@needs_llama_reference
@pytest.mark.export
def test_a_llama_as_well(tmp_path: Path) -> None:
    for folder in sorted(f for f in LLAMA.glob("*/") if (f / "config.json").is_file())[:2]:
        out = tmp_path / folder.name
        export_bundle(lm=folder, out=out, calibrate=True, block_size=32)
        assert read_manifest(out).provenance["calibration"]["tokens"] > 500
        shutil.rmtree(out)


@pytest.mark.export
def test_there_is_an_end_to_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is given, so many tokens run at most."""
    (tmp_path / "long.txt").write_text("word " * 20_000)
    monkeypatch.setattr(calibration, "MOST_TOKENS", 400)
    manifest = export_bundle(
        lm=LM, out=tmp_path / "b", calibrate=tmp_path / "long.txt", block_size=32
    )
    assert 100 < manifest.provenance["calibration"]["tokens"] <= 400
