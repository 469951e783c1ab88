"""Graphs that a bundle could hold, with all hashes right, and that are not loaded.

Each is made of a sound bundle by the onnx package, which the runtime does without.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

import seechat_lite as sl
from seechat_lite.cli.main import main
from seechat_weights.builtin import BUILTIN
from seechat_weights.bundle.manifest import MANIFEST, read_manifest, sha256
from seechat_weights.bundle.onnx_graph import check_decoder, check_graphs, check_vision, read_graph
from seechat_weights.errors import BundleError

DECODER, VISION = "decoder.onnx", "vision.onnx"


def hashed(folder: Path) -> None:
    """Make the manifest say of every listed file what it is."""
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    for name, entry in manifest["files"].items():
        file = folder / name
        entry |= {"bytes": file.stat().st_size, "sha256": sha256(file)}
    (folder / MANIFEST).write_text(json.dumps(manifest), "utf-8")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return shutil.copytree(BUILTIN, tmp_path / "b")


def change(folder: Path, graph: str, how: Callable[[onnx.ModelProto], object]) -> None:
    model = onnx.load(folder / graph, load_external_data=False)
    how(model)
    (folder / graph).write_bytes(model.SerializeToString())
    hashed(folder)


def refused(folder: Path, graph: str = DECODER) -> str:
    manifest = read_manifest(folder)
    check = check_vision if graph == VISION else check_decoder
    with pytest.raises(BundleError) as e:
        check(folder, manifest, graph)
    assert "\n" not in str(e.value)
    return str(e.value)


def external(model: onnx.ModelProto) -> TensorProto:
    return next(t for t in model.graph.initializer if t.external_data)


def entry(tensor: TensorProto, key: str) -> onnx.StringStringEntryProto:
    return next(e for e in tensor.external_data if e.key == key)


# where weights may not lie; the last is how ONNX Runtime names addresses in memory
PLACES = [
    "evil.data", "../evil.data", "/etc/passwd", "seechat.json", "./decoder.onnx.data",
    "decoder.onnx.data/", "c:\\evil", "", "x\x1b[2J", "*/_ORT_MEM_ADDR_/*",
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_weights_of_other_files(bundle: Path, place: str) -> None:
    if place == "evil.data":  # there, and not listed
        shutil.copy(bundle / "decoder.onnx.data", bundle / place)

    def move(model: onnx.ModelProto) -> None:
        entry(external(model), "location").value = place

    change(bundle, DECODER, move)
    assert "decoder.onnx: the graph has " in refused(bundle)
    with pytest.raises(BundleError, match="the graph has "):
        sl.load(bundle)


@pytest.mark.parametrize(
    ("key", "value"),
    [("offset", "4096"), ("offset", "-4096"), ("offset", "9" * 30), ("length", "64"),
     ("length", "1e3"), ("offset", ""), ("checksum", "x"), ("offset", "٣")],
)  # fmt: skip
def test_weights_at_other_places(bundle: Path, key: str, value: str) -> None:
    def move(model: onnx.ModelProto) -> None:
        tensor = external(model)
        if key == "checksum":
            tensor.external_data.add(key=key, value=value)
        else:
            entry(tensor, key).value = value

    change(bundle, DECODER, move)
    refused(bundle)


def shaped(model: onnx.ModelProto) -> None:
    external(model).dims[0] *= 2


def typed(model: onnx.ModelProto) -> None:
    external(model).data_type = TensorProto.INT32


def renamed(model: onnx.ModelProto) -> None:
    external(model).name = "another"


def said_twice(model: onnx.ModelProto) -> None:
    external(model).external_data.add(key="location", value="/etc/passwd")


def in_both(model: onnx.ModelProto) -> None:
    external(model).raw_data = b"\0" * 16


def large_constant(model: onnx.ModelProto) -> None:
    model.graph.initializer.add(
        name="z", dims=[1 << 20], data_type=TensorProto.FLOAT, raw_data=bytes(4 << 20)
    )


def promised_constant(model: onnx.ModelProto) -> None:
    model.graph.initializer.add(name="z", dims=[1 << 30], data_type=TensorProto.FLOAT)


def sparse(model: onnx.ModelProto) -> None:
    model.graph.sparse_initializer.add(dims=[1 << 40])


def loop(model: onnx.ModelProto) -> None:
    body = helper.make_graph([], "body", [], [])
    model.graph.node.append(helper.make_node("Loop", ["", ""], ["looped"], body=body))


def scan(model: onnx.ModelProto) -> None:
    body = helper.make_graph([], "body", [], [])
    model.graph.node.append(
        helper.make_node("Scan", ["a"], ["scanned"], body=body, num_scan_inputs=1)
    )


def nested(model: onnx.ModelProto) -> None:
    inner = helper.make_node(
        "If", ["a"], ["b"], then_branch=helper.make_graph([], "x", [], []),
        else_branch=helper.make_graph([], "y", [], []),
    )  # fmt: skip
    node = next(n for n in model.graph.node if n.op_type == "If")
    node.attribute[0].g.node.append(inner)


def graph_of_another(model: onnx.ModelProto) -> None:
    node = model.graph.node[0]
    node.attribute.append(helper.make_attribute("body", helper.make_graph([], "x", [], [])))


def graphs(model: onnx.ModelProto) -> None:
    made = [helper.make_graph([], "x", [], [])]
    model.graph.node[0].attribute.append(helper.make_attribute("bodies", made))


def weights_in_a_branch(model: onnx.ModelProto) -> None:
    node = next(n for n in model.graph.node if n.op_type == "If")
    tensor = node.attribute[0].g.initializer.add(
        name="z", dims=[4], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL
    )
    tensor.external_data.add(key="location", value="/etc/passwd")
    tensor.external_data.add(key="length", value="16")


def weights_in_an_attribute(model: onnx.ModelProto) -> None:
    tensor = TensorProto(
        name="z", dims=[4], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL
    )
    tensor.external_data.add(key="location", value="/etc/passwd")
    tensor.external_data.add(key="length", value="16")
    model.graph.node.append(helper.make_node("Constant", [], ["z"], value=tensor))


def another_operator(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("ConstantOfShape", ["s"], ["z"]))


def custom_operator(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("MatMul", ["s"], ["z"], domain="evil.ops"))


def microsofts_operator(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Tokenizer", ["s"], ["z"], domain="com.microsoft"))


def custom_domain(model: onnx.ModelProto) -> None:
    model.opset_import.add(domain="evil.ops", version=1)


def function(model: onnx.ModelProto) -> None:
    model.functions.add(name="MatMul", domain="")


def training(model: onnx.ModelProto) -> None:
    model.training_info.add()


def future(model: onnx.ModelProto) -> None:
    model.ir_version = 99


CHANGES = [
    shaped, typed, renamed, said_twice, in_both, large_constant, promised_constant, sparse, loop,
    scan, nested, graph_of_another, graphs, weights_in_a_branch, weights_in_an_attribute,
    another_operator, custom_operator, microsofts_operator, custom_domain, function, training,
    future,
]  # fmt: skip


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("graph", [DECODER, "decoder.fp16.onnx"])
def test_what_no_export_writes(
    bundle: Path, how: Callable[[onnx.ModelProto], object], graph: str
) -> None:
    if how in (nested, weights_in_a_branch) and "fp16" in graph:
        return  # which has no If
    change(bundle, graph, how)
    assert "export the model again" in refused(bundle, graph)


@pytest.mark.parametrize("how", [
    loop, scan, graph_of_another, weights_in_an_attribute, another_operator, custom_operator,
    function, sparse, promised_constant,
])  # fmt: skip
def test_what_no_vision_does(bundle: Path, how: Callable[[onnx.ModelProto], object]) -> None:
    change(bundle, VISION, how)
    refused(bundle, VISION)
    with sl.load(bundle) as model, pytest.raises(BundleError, match="the graph has "):
        model.encode_image(picture())


def picture() -> "object":
    from PIL import Image

    return Image.new("RGB", (32, 32))


@pytest.mark.parametrize("sizes", [[1 << 40], [1 << 20, 1 << 20], [-1, 1 << 30]])
@pytest.mark.parametrize("name", ["Expand", "Tile"])
def test_a_few_numbers_that_make_something_large(bundle: Path, sizes: list[int], name: str) -> None:
    def grow(model: onnx.ModelProto) -> None:
        shape = helper.make_tensor("sizes", TensorProto.INT64, [len(sizes)], sizes)
        model.graph.initializer.append(shape)
        model.graph.node.append(helper.make_node(name, ["pixel_values", "sizes"], ["grown"]))

    change(bundle, VISION, grow)
    assert "size" in refused(bundle, VISION)


def test_two_graphs_would_be_merged(bundle: Path) -> None:
    """Protobuf joins messages that come twice: what was checked would not be what is run."""
    content = (bundle / DECODER).read_bytes()
    more = onnx.ModelProto(graph=onnx.GraphProto(name="x")).SerializeToString()
    (bundle / DECODER).write_bytes(content + more)
    hashed(bundle)
    assert "two graphs" in refused(bundle)


def test_info_looks_at_all_graphs(bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change(bundle, "decoder.fp16.onnx", loop)
    assert main(["info", str(bundle)]) == 1
    assert "the graph has control flow" in capfd.readouterr().err


def test_sound_bundles(text_bundle: Path, vision_bundle: Path) -> None:
    for folder in (BUILTIN, text_bundle, vision_bundle):
        check_graphs(folder, read_manifest(folder))


@pytest.mark.parametrize("graph", [DECODER, VISION])
def test_changed_at_random(graph: str) -> None:
    """Refused or read, and nothing else; what is read names no more than what was there."""
    sound = (BUILTIN / graph).read_bytes()[:60_000]
    chance = random.Random(5)
    for _ in range(60):
        changed = bytearray(sound)
        for _ in range(chance.choice((1, 2, 8))):
            at = chance.randrange(len(changed))
            if chance.random() < 0.5:
                changed[at] = chance.randrange(256)
            else:
                del changed[at : at + chance.choice((1, 4, 300))]
        try:
            read_graph(bytes(changed), branches=True)
        except ValueError as e:
            assert len(str(e)) < 300


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"\x3a\xff\xff\xff\xff\x0f", b"\x0b", b"\xff" * 20]
)
def test_no_graph(bundle: Path, content: bytes) -> None:
    (bundle / DECODER).write_bytes(content)
    hashed(bundle)
    refused(bundle)
