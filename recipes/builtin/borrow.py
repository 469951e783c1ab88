"""Show photographs to weights that were trained on drawings alone.

    python recipes/builtin/borrow.py          # the shipped bundle, its vision graph rewritten

The expert's head says what a photograph shows (verdict.py). Where the decoder knows this, or what
it is a kind of, as a drawing, the graph hands it what drawings of this thing look like,
in the colour that the photograph's thing has; else what it was trained to be unsure of. Nothing is
trained: the bridge is read from the shipped graph, everything else comes from the bank of pictures.
"""

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import onnx_ir as ir
import torch
from concepts import Concept, load_concepts
from photo_classes import Kind, load_classes
from PIL import Image
from publish import round_to_int8, store_as_int8
from sights import DRAWING, NO_COLOUR, PHOTO, Looker, Router, margins
from torch import Tensor, nn
from tower import FEATURES, load_expert
from train import Bank, fit_router
from verdict import Verdicts, load_head
from vision import CELLS, LOW, TOKENS, Bridge, Features, Vision

import seechat_lite as sl
from seechat_export.vision_graph import export_vision
from seechat_lite.engines.onnx.vision import OnnxVision
from seechat_weights.builtin import BUILTIN
from seechat_weights.bundle.manifest import MANIFEST, FileHash, Manifest, sha256

WIDTH, GATE = 384, 128  # of the bridge's layers, which the exporter leaves without names


def shipped_bridge(graph: Path, hidden: int = 256) -> Bridge:
    """The bridge out of a vision graph whose weights are stored at 8 bits."""
    weights = {n: v.const_value for n, v in ir.load(graph).graph.initializers.items()}
    arrays = {n: v.numpy() for n, v in weights.items() if v is not None}

    state = {}
    for name, array in arrays.items():  # photos.bridge.mean in a graph that was rewritten before
        own = name.rpartition("bridge.")[2]
        if own != name and array.ndim and (own == "scale" or not own.endswith((".int8", ".scale"))):
            state[own] = torch.from_numpy(array.copy())
    linear = {
        (WIDTH, FEATURES): "expert",
        (WIDTH, LOW): "low",
        (hidden, WIDTH): "out",
        (GATE, CELLS * CELLS): "gate.0",
        (GATE, GATE): "gate.2",
    }
    for name, codes in arrays.items():
        if not name.endswith(".int8") or codes.ndim != 2:
            continue
        scale = arrays[f"{name.removesuffix('.int8')}.scale"]
        weight = codes.astype(np.float32) * scale
        if scale.shape[0] == 1:  # one for each output: the exporter has turned it around
            weight = weight.T
        if layer := linear.get(weight.shape):
            state[f"{layer}.weight"] = torch.from_numpy(weight.copy())
    bridge = Bridge(hidden, WIDTH)
    bridge.load_state_dict(state)
    return bridge.eval().requires_grad_(False)


def lookalikes(verdicts: Verdicts) -> list[Concept | None]:
    """For every verdict the drawn thing to be shown for it: itself, or what it is a kind of."""
    drawn = {c.zh: c for c in load_concepts()}
    classes = {c.zh: c for c in load_classes()}
    found: list[Concept | None] = []
    for meaning in verdicts.meanings:
        names: tuple[str, ...] = ()
        if isinstance(meaning, Kind):
            names = (meaning.zh,)
        elif isinstance(meaning, Concept):
            c = classes[meaning.zh]
            names = (meaning.zh, *c.also_zh, c.kind.zh)
        found.append(next((drawn[n] for n in names if n in drawn), None))
    return found


class Borrowed(nn.Module):
    """Where the router says photograph: the drawing of what the head sees, or of nothing."""

    def __init__(self, looker: Looker, router: Router, bridge: Bridge, bank: Bank) -> None:
        super().__init__()
        self.looker, self.router, self.bridge = looker, router, bridge
        shown = lookalikes(looker.head.verdicts)
        used = sorted({c.index for c in shown if c})
        place = {index: row for row, index in enumerate(used)}
        # the last row stands for nothing
        self.register_buffer(
            "row", torch.tensor([place[c.index] if c else len(used) for c in shown])
        )
        single = [
            (i, p.things[0])
            for i, p in enumerate(bank.pictures)
            if p.layout == "one" and len(p.things) == 1
        ]
        of = np.array([t.concept for _, t in single])
        colour = np.array([NO_COLOUR if t.colour is None else t.colour for _, t in single])
        numbers = np.array([i for i, _ in single])
        self.seen = nn.Embedding(len(used) + 1, FEATURES)
        self.low = nn.Embedding(NO_COLOUR + 1, LOW)
        self.things: list[tuple[str, int, Tensor]] = []  # name, its usual colour, ways to show it
        names = {c.index: c.zh for c in shown if c}
        for row, index in enumerate(used):
            own = of == index
            seen = torch.from_numpy(np.asarray(bank.seen[numbers[own], 0], np.float32))
            mean = seen.mean(0)
            self.seen.weight.data[row] = mean
            nearest = (seen - mean).square().sum(1).argsort()
            usual = int(np.bincount(colour[own]).argmax())
            self.things.append((names[index], usual, torch.cat([mean[None], seen[nearest]])))
        for c in range(NO_COLOUR + 1):
            chosen = numbers[colour == c] if (colour == c).any() else numbers
            low = np.asarray(bank.low[chosen, 0], np.float32)
            self.low.weight.data[c] = torch.from_numpy(low).mean(0)
        texture = [i for i, p in enumerate(bank.pictures) if p.kind == "texture"]
        self.register_buffer("nothing", bridge(*bank(np.array(texture))).mean(0))  # [12, hidden]

    def show(self, seen: Tensor, colour: int) -> Tensor:
        """Embeddings [12, hidden] of features [1280] in a colour."""
        low = self.low.weight[colour].expand(1, TOKENS, -1)
        return self.bridge(seen.expand(1, TOKENS, -1), low)[0]

    def choose(self, name: Callable[[Tensor], str], most: int = 8) -> int:
        """Show every thing so that the decoder names it; returns how many it never does.

        name: what the decoder calls embeddings [12, hidden]. The mean is tried first, then others.
        """
        lost = 0
        for row, (wanted, usual, ways) in enumerate(self.things):
            for way in ways[:most]:
                if all(name(self.show(way, c)) == wanted for c in (usual, NO_COLOUR)):
                    self.seen.weight.data[row] = way
                    break
            else:
                lost += 1
        return lost

    def forward(self, pixel_values: Tensor, cells: Tensor, drawn: Tensor) -> Tensor:
        """Pixels, cells [n, 49, 1280], embeddings of a drawing [n, 12, hidden]: the embeddings."""
        sights = self.looker(pixel_values, cells)
        whole = cells.mean(1)
        kind = (self.router(whole) - margins(self.looker.head, whole)).argmax(-1)
        row = self.row[sights[:, 0]]  # [n]
        seen = self.seen(row)[:, None].expand(-1, TOKENS, -1)
        low = self.low(sights[:, TOKENS])[:, None].expand(-1, TOKENS, -1)
        shown = self.bridge(seen, low)
        known = ((kind == PHOTO) & (row < self.seen.num_embeddings - 1))[:, None, None]
        shown = torch.where(known, shown, self.nothing)
        return torch.where((kind == DRAWING)[:, None, None], drawn, shown)


@contextmanager
def namer(bundle: Path) -> Iterator[Callable[[Tensor], str]]:
    """What a bundle's decoder calls the thing of which it is given the embeddings."""
    shown: list[np.ndarray] = []
    with (
        mock.patch.object(OnnxVision, "encode", lambda *_: shown[-1]),
        sl.load(bundle, context=256) as model,
    ):

        def name(embeds: Tensor) -> str:
            shown.append(embeds.numpy()[None])
            number = len(shown)
            image = Image.new("RGB", (8, 8), (number >> 16 & 255, number >> 8 & 255, number & 255))
            return model.chat().ask("这是什么？", image=image, max_new_tokens=16)[2:-1]

        yield name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    here = Path(__file__).parent
    parser.add_argument("--work", type=Path, default=here / "work", help="of train.py: pictures")
    parser.add_argument("--bundle", type=Path, default=BUILTIN, help="what to rewrite")
    args = parser.parse_args()
    file = args.bundle / MANIFEST
    manifest = Manifest.from_json(file.read_text("utf-8"), str(file))
    assert manifest.vision
    graph = args.bundle / manifest.vision.graph
    bank, bridge = Bank(args.work / "bank"), shipped_bridge(graph)
    photos = Borrowed(Looker(load_head()), fit_router(bank), bridge, bank)
    with torch.no_grad(), namer(args.bundle) as name:
        print(f"{photos.choose(name)} of {len(photos.things)} things are never named right")
    network = Vision(Features(load_expert()), bridge, photos).eval().requires_grad_(False)
    round_to_int8(network)
    described = dataclasses.replace(manifest.vision, bridge="regions + mlp2x_gelu, borrowed")
    export_vision(network, described, graph, precision="fp32")
    store_as_int8(graph)
    files = {**manifest.files, graph.name: FileHash(graph.stat().st_size, sha256(graph))}
    manifest = dataclasses.replace(manifest, vision=described, files=files)
    file.write_text(manifest.to_json(), "utf-8")
    print(f"wrote {graph}, {graph.stat().st_size} bytes")


if __name__ == "__main__":
    main()
