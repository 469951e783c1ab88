"""The built-in model's recipe: consistent facts, training text as the runtime writes it."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import seechat_lite as sl
from seechat_lite.conversation import FORMATS, Turn, render
from seechat_lite.prompt import build, position_ids
from seechat_lite.tokenizer import Tokenizer
from seechat_weights.builtin import BUILTIN

RECIPE = Path(__file__).parents[1] / "recipes" / "builtin"


@pytest.fixture(autouse=True)
def recipe_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RECIPE))


@pytest.fixture
def author():
    from concepts import load_concepts
    from dialogues import Author

    return Author(np.random.default_rng(0), load_concepts())


def scene(author, layout: str):
    from scenes import LAYOUTS, Picture, Thing

    number = len(author.concepts)
    things = [
        Thing(int(author.rng.integers(number)), place, int(author.rng.integers(11)))
        for place in LAYOUTS[layout]
    ]
    return Picture("icons", layout, tuple(things))


def test_concepts_have_distinct_names_and_drawings(author) -> None:
    concepts = author.concepts
    assert len(concepts) >= 400
    for names in ([c.zh for c in concepts], [c.en for c in concepts]):
        assert len(set(names)) == len(concepts)
    drawings = [d for c in concepts for d in c.drawings]
    assert len(set(drawings)) == len(drawings)


def test_every_question_is_complete_and_every_answer_plain(author) -> None:
    for i in range(400):
        layout = ("one", "row2", "column2", "row3", "four")[i % 5]
        rounds = author.one_picture(scene(author, layout), turns=1 + i % 3)
        rounds += author.two_pictures(scene(author, "one"), scene(author, "one"))
        rounds += author.without_picture()
        for r in rounds:
            assert r.question.strip() and not re.search(r"[{}\[\]|]", r.question)
            assert r.answer and "，" not in r.answer and "None" not in r.answer


def test_training_ids_are_the_runtimes_own(author) -> None:
    from batches import encode
    from vision import TOKENS

    tokenizer = Tokenizer(BUILTIN / "ice_text.model")
    rounds = author.one_picture(scene(author, "four"), turns=3)
    sample = encode(tokenizer, rounds, [7])
    turns = [Turn(r.question, r.answer, ("p",) if r.pictures else ()) for r in rounds]
    turns[-1] = Turn(turns[-1].question, None, turns[-1].images)
    embeds = {"p": np.zeros((TOKENS, 4), np.float32)}
    prompt = build(tokenizer, render(FORMATS["seechat"], turns), embeds)
    answer = tokenizer.encode(rounds[-1].answer)
    assert sample.ids == [*prompt.ids, *answer, tokenizer.eos_id]
    assert sample.images == [(prompt.images[0][0], 7)]
    assert sample.ids[sample.context] == tokenizer.bos_id


def test_a_category_is_told_with_the_name_of_the_thing(author) -> None:
    thing = scene(author, "one").things[0]
    concept = author.concepts[thing.concept]
    for lang, category in (("zh", concept.category.zh), ("en", concept.category.en)):
        answer = author.say_category(thing, lang)
        assert concept.name(lang) in answer and answer.rstrip("。.").endswith(category)


@pytest.mark.parametrize(("kind", "pictures"), [("about", 1), ("two_pictures", 2)])
def test_samples_of_one_kind_hold_their_pictures(author, kind: str, pictures: int) -> None:
    from batches import Sampler

    shown = [scene(author, "one") for _ in range(5)]
    sampler = Sampler(author, Tokenizer(BUILTIN / "ice_text.model"), shown)
    batch = next(sampler.batches(4, pool=3, make=getattr(sampler, kind)))
    assert batch.rows.tolist() == [row for row in range(4) for _ in range(pictures)]
    assert (batch.starts < batch.context[batch.rows]).all()


def test_training_positions_are_the_runtimes_own() -> None:
    from batches import positions

    ids = [9, 8, 7, 1, 2, 5, 6]  # [gMASK] is 1, <sop> is 2
    expected = position_ids(ids, gmask_id=1, mask_id=0, bos_id=2)
    found = positions(torch.tensor([4]), len(ids))[0]
    np.testing.assert_array_equal(found, expected)


def test_regions_are_averages_and_cover_their_part() -> None:
    from vision import REGIONS, region_weights

    for grid in (7, 8):
        weights = region_weights(grid)
        assert torch.allclose(weights.sum(1), torch.ones(len(REGIONS)))
        left = weights[1].reshape(grid, grid)
        assert left[:, : grid // 2].gt(0).all() and left[:, -(grid // 2) :].eq(0).all()


def test_colours_have_their_names() -> None:
    from colours import COLOURS, colour_masks, dominant_colour

    swatches = {
        "red": (221, 46, 68), "orange": (244, 144, 12), "yellow": (255, 204, 77),
        "green": (119, 178, 85), "blue": (85, 172, 238), "purple": (146, 102, 204),
        "brown": (138, 75, 56), "black": (41, 47, 51), "white": (245, 248, 250),
        "grey": (153, 170, 181), "pink": (244, 171, 186),
    }  # fmt: skip
    names = [key for key, _, _ in COLOURS]
    for name, rgb in swatches.items():
        pixels = torch.tensor(rgb).float().expand(50, 3) / 255
        assert names[dominant_colour(pixels)] == name
    everything = torch.rand(1000, 3, generator=torch.Generator().manual_seed(0))
    assert colour_masks(everything).sum(-1).le(1).all()


def test_the_shipped_bundle_is_the_recipes_model() -> None:
    from concepts import load_concepts
    from vision import TOKENS

    with sl.load(context=256) as model:
        assert model.manifest.vision.tokens == TOKENS
        assert model.manifest.provenance["concepts"] == len(load_concepts())
        assert sum(f.bytes for f in model.manifest.files.values()) < 15_000_000


# --- the thousand classes of the expert's head


def test_photo_classes_have_names_of_their_own_in_both_languages() -> None:
    from photo_classes import CLASSES, load_classes

    classes = load_classes()
    assert len(classes) == CLASSES
    # two classes share a name only if they are one thing: then they share it in both languages
    assert len({c.zh for c in classes}) == len({c.en for c in classes})
    assert len({(c.zh, c.en) for c in classes}) == len({c.zh for c in classes})
    for c in classes:
        assert re.fullmatch(r"[A-Za-z][A-Za-z' -]*[A-Za-z]", c.en), c
        assert re.fullmatch(r"(?:[\u3400-\u9fff]|CD|T(?=恤|型))+", c.zh), c
        assert re.fullmatch(r"[\u4e00-\u9fff]", c.measure), c
        for own, others in ((c.zh, c.also_zh), (c.en, c.also_en)):
            assert others and own not in others and len(set(others)) == len(others), c
            assert all(name and name == name.strip() for name in others), c


def test_a_photo_class_and_a_drawing_of_one_name_are_one_thing() -> None:
    from concepts import load_concepts
    from photo_classes import PHOTO_TRAITS, load_classes, load_things

    drawn = load_concepts()
    things, of_class = load_things()
    classes = load_classes()
    assert things[: len(drawn)] == drawn and set(of_class) >= set(range(len(drawn), len(things)))
    for names in ([t.zh for t in things], [t.en for t in things]):
        assert len(set(names)) == len(things)
    for c in classes:
        thing = things[of_class[c.index]]
        assert (thing.zh, thing.en) == (c.zh, c.en)
        if thing.drawings:
            # facts do not depend on how a thing is shown; the class may say less
            asked = set(PHOTO_TRAITS) - thing.unasked - c.unasked - {"wheels", "big"}
            assert {t for t in asked if (t in thing.traits) != (t in c.traits)} == set(), c


def test_kinds_have_distinct_names_and_members() -> None:
    from concepts import load_concepts
    from photo_classes import load_classes, load_kinds

    kinds = load_kinds().values()
    assert {c.kind.key for c in load_classes()} == {k.key for k in kinds}
    assert len({k.zh for k in kinds}) == len({k.en for k in kinds}) == len(kinds)
    drawn = {c.zh: c.en for c in load_concepts()}
    assert all(drawn.get(k.zh, k.en) == k.en for k in kinds)
    for k in kinds:
        assert not k.traits & k.unasked, k


def test_a_broken_row_of_classes_is_named(tmp_path: Path) -> None:
    from photo_classes import load_classes

    text = (RECIPE / "photo_classes.tsv").read_text("utf-8")
    line = next(line for line in text.splitlines() if line.startswith("207\t"))
    number = text.splitlines().index(line) + 1
    for broken, told in (
        (line.replace("\tdog\t", "\tdoge\t"), "unknown kind 'doge'"),
        (line.replace("\t-\t-\t", "\t-\t+glow\t"), "unknown trait 'glow'"),
        (line.replace("golden retriever", ""), "none empty"),
        (line.replace("207", "208"), "expected class 207, got 208"),
    ):
        path = tmp_path / "classes.tsv"
        path.write_text(text.replace(line, broken), "utf-8")
        with pytest.raises(ValueError, match=rf"{number}: .*{told}"):
            load_classes(path)


# --- photographs: the head's verdicts, and what the decoder is shown


def toy_head(**options):
    """A head over four features, which stand for tabby, golden retriever, beagle and nothing."""
    from verdict import Head

    weight = torch.zeros(1000, 4)
    for feature, cls in enumerate((281, 207, 162)):
        weight[cls, feature] = 1.0
    return Head(weight, torch.zeros(1000), **options)


def test_verdicts_number_every_thing_kind_and_category_once() -> None:
    from photo_classes import load_classes, load_things
    from verdict import load_verdicts

    verdicts, classes, (things, of_class) = load_verdicts(), load_classes(), load_things()
    assert sorted(verdicts.order) == list(range(len(classes)))
    assert sum(verdicts.levels) + 1 == len(verdicts.meanings) and verdicts.meanings[-1] is None
    assert verdicts.unsure == sum(verdicts.levels)
    for (start, end), meaning in zip(verdicts.spans, verdicts.meanings, strict=False):
        for i in verdicts.order[start:end]:
            c = classes[i]
            assert meaning in (things[of_class[i]], c.kind, c.kind.category)
    by_level = np.split(np.array([e - s for s, e in verdicts.spans]), np.cumsum(verdicts.levels))
    assert [int(level.sum()) for level in by_level[:3]] == [1000, 1000, 1000]


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ((20.0, 0, 0, 0), "tabby cat"),
        ((0, 15.0, 15.2, 0), "beagle"),  # 45 and 55 %
        ((14.0, 14.0, 14.0, 0), "dog"),  # a third each: two of three are dogs
        ((7.8, 7.53, 6.84, 0), "mammal"),  # 39 % a cat, 45 % one of two dogs
        ((0, 0, 0, 9.0), None),
    ],
)
def test_the_narrowest_level_that_is_sure_is_named(features, expected) -> None:
    head = toy_head()
    verdict, best = head(torch.tensor([features]))
    meaning = head.verdicts.meanings[int(verdict)]
    assert (meaning.en if meaning else None) == expected
    assert int(best) == int(head.linear(torch.tensor([features])).argmax())


def test_a_photograph_is_shown_as_a_drawing_that_the_decoder_knows() -> None:
    from borrow import lookalikes, shipped_bridge
    from verdict import load_verdicts

    verdicts = load_verdicts()
    shown = dict(zip(verdicts.meanings, lookalikes(verdicts), strict=True))
    called = {m.en if m else None: c.en if c else None for m, c in shown.items()}
    assert called["koala"] == "koala" and called["golden retriever"] == "dog"
    assert called["tabby cat"] == "cat" and called["dog"] == "dog"
    assert called["espresso"] == "coffee" and called[None] is None
    known = [c for c in shown.values() if c]
    bridge = shipped_bridge(BUILTIN / "vision.onnx")
    assert bridge.expert.weight.abs().sum() > 0 and not bridge.nothing.requires_grad
    assert len(known) > 500 and all(c.drawings for c in known)


def test_shares_of_a_level_are_the_classes_probabilities_summed() -> None:
    head = toy_head()
    features = torch.randn(3, 12, 4, generator=torch.Generator().manual_seed(0)) * 8
    shares = head.shares(features)
    first = 0
    for size in head.verdicts.levels:
        assert torch.allclose(shares[..., first : first + size].sum(-1), torch.ones(3, 12))
        first += size
    # twice the same thing in the head's list is one thing: both pairs of sunglasses
    at = [i for i, m in enumerate(head.verdicts.meanings) if m and m.en == "sunglasses"]
    assert len(at) == 1
    p = head.linear(features).softmax(-1)
    both = [k for k, i in enumerate(head.verdicts.order) if i in (836, 837)]
    assert torch.allclose(shares[..., at[0]], p[..., both].sum(-1), atol=1e-6)


def photo_network(hidden: int = 8):
    """Vision with the way of photographs, of random weights, the router set by hand."""
    from sights import Looker, PhotoBridge, Photos, Router
    from tower import FEATURES, EfficientNetLite0
    from verdict import Head
    from vision import Bridge, Features, Vision

    torch.manual_seed(0)
    head = Head(torch.randn(1000, FEATURES), torch.zeros(1000))
    photos = Photos(Looker(head), Router(), PhotoBridge(len(head.verdicts.meanings), hidden))
    network = Vision(Features(EfficientNetLite0()), Bridge(hidden, width=16), photos)
    return network.eval().requires_grad_(False)


def test_the_router_chooses_between_drawings_photographs_and_nothing() -> None:
    from sights import DRAWING, NOTHING, PHOTO
    from vision import TOKENS, Vision

    network = photo_network()
    photos = network.photos
    pixels = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(1)) * 2 - 1
    cells = network.features.cells(pixels)
    sights = photos.looker(pixels, cells)
    unsure = photos.looker.head.verdicts.unsure
    nothing = torch.cat([torch.full_like(sights[:, :TOKENS], unsure), sights[:, TOKENS:]], 1)
    expected = {
        DRAWING: Vision(network.features, network.bridge)(pixels),
        PHOTO: photos.bridge(sights),
        NOTHING: photos.bridge(nothing),
    }
    for kind, embeds in expected.items():
        torch.nn.init.zeros_(photos.router.linear.weight)
        photos.router.linear.bias.data = torch.eye(3)[kind] * 9
        assert torch.equal(network(pixels), embeds)


def test_the_router_learns_to_tell_its_examples_apart() -> None:
    from sights import Router
    from tower import FEATURES

    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, FEATURES, generator=generator)
    examples = [c + torch.randn(40 + 20 * i, FEATURES, generator=generator) for i, c in
                enumerate(centres)]  # fmt: skip
    router = Router()
    router.fit(*examples)
    for number, x in enumerate(examples):
        assert router(x).argmax(-1).eq(number).float().mean() > 0.95


def test_a_sight_tells_the_colours_of_thing_and_surroundings() -> None:
    from colours import COLOURS
    from sights import GRID, LIGHTS, NO_COLOUR, Looker, Sight
    from tower import FEATURES, MEAN, STD
    from verdict import Head

    head = Head(torch.eye(1000, FEATURES), torch.zeros(1000))
    looker = Looker(head)
    # class 207 is seen in the middle cells; they are red, everything else is green
    cells = torch.zeros(1, GRID, GRID, FEATURES)
    cells[0, 2:5, 2:5, 207] = 300.0
    rgb = torch.tensor((0.2, 0.7, 0.2)).expand(224, 224, 3).clone()
    rgb[64:160, 64:160] = torch.tensor((0.8, 0.1, 0.1))
    pixels = ((rgb.permute(2, 0, 1) - MEAN) / STD)[None]
    sight = Sight.of(looker(pixels, cells.flatten(1, 2))[0].tolist())
    names = [key for key, *_ in COLOURS]
    assert names[sight.colour] == "red" and names[sight.ground] == "green"
    assert head.verdicts.meanings[sight.verdicts[0]].en == "golden retriever"
    assert LIGHTS[sight.light][0] == "medium"
    assert Sight.of(sight.numbers()) == sight
    padded = pixels.clone()
    padded[..., :60, :] = padded[..., -60:, :] = (1 - MEAN) / STD  # as a wide photograph is
    assert Sight.of(looker(padded, cells.flatten(1, 2))[0].tolist()).ground == sight.ground
    shades = ((0.2, 0.2, 0.8), (0.8, 0.2, 0.2), (0.9, 0.9, 0.1), (0.2, 0.7, 0.2))
    for quarter, shade in enumerate(shades):
        y, x = divmod(quarter, 2)
        rgb[y * 112 : y * 112 + 112, x * 112 : x * 112 + 112] = torch.tensor(shade)
    pixels = ((rgb.permute(2, 0, 1) - MEAN) / STD)[None]
    sight = Sight.of(looker(pixels, cells.flatten(1, 2))[0].tolist())
    assert sight.colour == sight.ground == NO_COLOUR


def test_the_graph_with_photographs_computes_what_torch_does(tmp_path: Path) -> None:
    import onnx_ir as ir
    from publish import PIXELS, VISION_GRAPH, round_to_int8, store_as_int8
    from vision import TOKENS

    from seechat_export.vision_graph import export_vision
    from seechat_lite.onnx_runtime import ort
    from seechat_weights.bundle.onnx_graph import VISION_OPERATORS
    from seechat_weights.config import VisionConfig

    network = photo_network()
    round_to_int8(network)
    config = VisionConfig(
        graph=VISION_GRAPH, tokens=TOKENS, tower="efficientnet-lite0",
        bridge="regions + verdicts", pixels=PIXELS,
    )  # fmt: skip
    path = tmp_path / VISION_GRAPH
    export_vision(network, config, path, precision="fp32")
    store_as_int8(path)
    written = {(n.domain, n.op_type) for n in ir.load(path).graph.all_nodes()}
    assert written <= VISION_OPERATORS  # or no bundle with it can be loaded
    session = ort.InferenceSession(path)
    pixels = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(1)) * 2 - 1
    (embeds,) = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
    assert embeds.shape == (2, TOKENS, 8)
    np.testing.assert_allclose(embeds, network(pixels).numpy(), atol=2e-3)


# --- what counts as right


def test_answers_are_read_as_what_they_name_first() -> None:
    from evaluate_photos import what_was_said

    for answer, expected in {
        "这是金毛寻回犬。": "golden retriever",
        "这是一种狗。": "dog",
        "This is a kind of dog.": "dog",
        "These are sunglasses.": "sunglasses",
        "I see strawberries.": "strawberry",
        "图里有猫和狗。": "cat",
        "It is a cat, category mammal.": "cat",
        "This is a catamaran.": "catamaran",
        "我不确定这是什么。": None,
        "I am not sure.": None,
        "": None,
    }.items():
        said = what_was_said(answer)
        assert (said.en if said else None) == expected, answer


@pytest.mark.parametrize(
    ("names", "answer", "outcome"),
    [
        ("dog", "这是金毛寻回犬。", "right"),
        ("golden retriever", "这是一种狗。", "right kind"),
        ("golden retriever", "这是狗。", "right kind"),
        ("golden retriever", "这是拉布拉多犬。", "right kind"),
        ("golden retriever", "这是虎斑猫。", "wrong"),
        ("bird", "这是一种鸟。", "right"),
        ("owl", "这是猫头鹰。", "right"),
        ("orange", "This is a tangerine.", "right"),
        ("car", "这是出租车。", "right"),
        ("car", "我不确定。", "refused"),
    ],
)
def test_less_exact_names_are_not_wrong(names: str, answer: str, outcome: str) -> None:
    from evaluate_photos import what_was_said
    from photo_truth import truth

    assert truth(names, "-").judge(what_was_said(answer)) == outcome


def test_every_line_of_labels_can_be_judged(tmp_path: Path) -> None:
    from photo_truth import labels, pictures, truth

    lines = {name: labels(name) for name in ("photos", "scenes", "stamps")}
    assert all(len({p for p, _ in found}) == len(found) > 5 for found in lines.values())
    assert sum("/" in p for p, _ in lines["stamps"]) == len(lines["stamps"]) >= 150
    with pytest.raises(ValueError, match="nothing is called"):
        truth("gryphon", "-")
    for name in ("cat_3.jpg", "cat_7.png", "animals/birds/owl.png", "owl.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = {f.name: t for f, t in pictures(tmp_path, "photos")}
    assert set(found) == {"cat_3.jpg", "cat_7.png", "owl.png"}
    assert "lynx" in found["cat_3.jpg"].names and "lynx" not in found["cat_7.png"].names
    assert [f.name for f, _ in pictures(tmp_path, "stamps")] == ["owl.png"]


# --- how people ask


def as_pattern(wording: str) -> re.Pattern[str]:
    """Everything that a line of wordings.txt can become."""
    parts = re.split(r"\[([^\[\]]*)\]", wording)
    for i, part in enumerate(parts):
        choices = part.split("|") if i % 2 else [part]
        parts[i] = "(?:" + "|".join(re.escape(plain(c)) for c in choices) + ")"
    return re.compile("".join(parts))


def plain(text: str) -> str:
    return re.sub(r"[\s，,。.？?！!]", "", text).lower()


def test_the_wordings_of_the_evaluation_are_not_trained_on() -> None:
    from dialogues import load_wordings

    trained = load_wordings()
    apart = load_wordings(RECIPE / "untrained_wordings.txt")
    for intent, wordings in apart.items():
        assert len({plain(w) for w in wordings}) == len(wordings) >= 20, intent
        patterns = [as_pattern(w) for w in trained[intent]]
        for wording in wordings:
            assert not re.search(r"[\[\]|]", wording)
            assert [p.pattern for p in patterns if p.fullmatch(plain(wording))] == [], wording
    assert len(apart["name", "zh"]) == len(apart["name", "en"]) == 40


def test_careless_questions_still_ask_the_same() -> None:
    import unicodedata

    from careless import careless, instructions

    assert not set(instructions("train")) & set(instructions("test"))
    rng = np.random.default_rng(0)
    seen = set()
    for i in range(3000):
        question = ("这是什么？", "What is this?", "第2张图里有 T恤 吗")[i % 3]
        asked = careless(rng, question)
        seen.add(asked)
        for _ in range(2):
            before = [text for text in instructions("train") if asked.startswith(text)]
            asked = asked.removeprefix(max(before, key=len, default="")).lstrip(" \n")
        assert plain(unicodedata.normalize("NFKC", asked)) == plain(question)
    assert {"这是什么？", "这是什么?", "WHAT IS THIS?", "what is this?"} <= seen
    assert any(s.endswith("\n") for s in seen) and len(seen) > 300


# --- other styles of drawing


def test_a_drawing_keeps_its_shape_in_every_style() -> None:
    from styles import STYLES, restyle

    icon = np.zeros((144, 144, 4), np.uint8)
    icon[30:110, 30:110] = (220, 40, 40, 255)
    icon[50:90, 50:90] = (250, 220, 60, 255)
    rng = np.random.default_rng(0)
    for style in STYLES:
        for _ in range(5):
            drawn = restyle(rng, icon, style)
            assert drawn.shape == icon.shape and drawn.dtype == np.uint8
            covered = (drawn[..., 3] > 127) & (icon[..., 3] > 127)
            assert covered.sum() / (icon[..., 3] > 127).sum() > 0.95, style
            assert (drawn[..., 3] > 127).mean() < 0.45, style
    lines = restyle(rng, icon, "lines")
    seen = lines[30:110, 30:110, :3].max(-1)
    assert seen[48:52, 48:52].min() == 255 and seen[20, 20:60].max() < 60  # paper, ink between
    grey = restyle(rng, icon, "grey")
    assert (grey[..., 0] == grey[..., 1]).all() and (grey[..., 1] == grey[..., 2]).all()


class Recorder:
    """Stands for a model: notes down how it is asked, and says nothing."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict]] = []

    def chat(self) -> "Recorder":
        return self

    def ask(self, question: str, **options) -> str:
        self.asked.append((question, options))
        return ""


@pytest.mark.parametrize("asked", ["plain", "untrained", "instructions", "blanks"])
def test_the_evaluation_asks_as_it_is_told(asked: str) -> None:
    from careless import instructions
    from dialogues import load_wordings
    from evaluate import PLAIN, Test
    from scenes import Icons

    pixels = np.full((8, 32, 32, 4), 255, np.uint8)
    model = Recorder()
    test = Test(model, Icons(pixels, np.arange(8)), asked=asked, temperature=0.5)
    for i in range(8):
        for case in (test.naming("zh"), test.naming("en"), test.category, test.yes_no, test.count,
                     test.where, test.at, test.follow_up):  # fmt: skip
            case(i)
    assert all(o["temperature"] == 0.5 and o["seed"] for _, o in model.asked)
    questions = [q for q, _ in model.asked]
    apart = load_wordings(RECIPE / "untrained_wordings.txt")
    if asked == "untrained":
        first = {w for (_, _), ways in PLAIN.items() for w in ways if "{" not in w}
        assert {q for q in questions if q in first} <= {"那它会飞吗？"}
        assert sum(q in apart["name", "zh"] + apart["name", "en"] for q in questions) == 16
    elif asked == "instructions":
        before = instructions("test")
        assert all(q.startswith(before) and "\n" in q for q in questions)
    elif asked == "blanks":
        assert all(q != q.strip() and q.strip() for q in questions)
    else:
        assert all(q == q.strip() for q in questions)


# --- training, at toy size


def test_the_quick_attention_computes_what_the_reference_does(
    author, monkeypatch: pytest.MonkeyPatch
) -> None:
    from batches import Sampler
    from quick import quicken
    from train import Settings, language_config, language_loss, new_language_model

    from seechat_export.reference_chatglm import Attention

    monkeypatch.setattr(Attention, "forward", Attention.forward)  # put back afterwards
    torch.manual_seed(0)
    tokenizer = Tokenizer(BUILTIN / "ice_text.model")
    settings = Settings(hidden=32, layers=2, heads=2)
    lm = new_language_model(language_config(tokenizer, settings))
    batch = next(Sampler(author, tokenizer, [scene(author, "one")], text_only=True).batches(6))
    found = []
    for change in (lambda: None, quicken):
        change()
        lm.zero_grad()
        loss = language_loss(lm, batch, None)
        loss.backward()
        grads = [p.grad.clone() for p in lm.parameters() if p.grad is not None]
        found.append([loss.detach(), *grads])
    for expected, quick in zip(*found, strict=True):
        assert torch.allclose(quick, expected, rtol=1e-3, atol=1e-5)


def toy_parts(author, hidden: int = 32):
    from batches import Sampler
    from scenes import Picture
    from sights import PhotoBridge
    from train import Parts, Readers, Settings, language_config, new_language_model
    from verdict import load_verdicts
    from vision import Bridge

    torch.manual_seed(0)
    tokenizer = Tokenizer(BUILTIN / "ice_text.model")
    settings = Settings(hidden=hidden, layers=1, heads=2, rate=1e-2)
    parts = Parts(
        new_language_model(language_config(tokenizer, settings)),
        Bridge(hidden, width=16),
        PhotoBridge(len(load_verdicts().meanings), hidden),
        Readers(tokenizer, author.concepts),
    )
    shown = [scene(author, layout) for layout in ("one", "row2", "four", "one")]
    shown.append(Picture("texture", "one", ()))
    return settings, parts, Sampler(author, tokenizer, shown)


def random_features(numbers: np.ndarray):
    from tower import FEATURES
    from vision import LOW, TOKENS

    generator = torch.Generator().manual_seed(int(numbers.sum()))
    n = len(numbers)
    return torch.rand(n, TOKENS, FEATURES, generator=generator), torch.rand(
        n, TOKENS, LOW, generator=generator
    )


@pytest.fixture
def photo_author():
    from photo_dialogues import PhotoAuthor

    return PhotoAuthor(np.random.default_rng(0))


def test_every_answer_about_a_photograph_follows_from_its_sight(photo_author) -> None:
    from evaluate_photos import what_was_said
    from sights import Sight

    author = photo_author
    for i in range(1500):
        sight = author.deal()
        assert Sight.of(sight.numbers()) == sight
        for r in author.photo(sight, turns=1 + i % 3) + author.several([sight, author.deal()]):
            assert r.question.strip() and not re.search(r"[{}\[\]|]", r.question)
            assert r.answer and "，" not in r.answer
            assert not re.search("None(?! of them)", r.answer)
            assert "  " not in r.answer and r.answer == r.answer.strip()
        for lang in ("zh", "en"):
            said = what_was_said(author.say_seen(sight, lang))
            main = author.main(sight)
            assert (said and said.zh) == (main and main.zh)
            told = author.describe(sight, lang)
            assert (main is not None or author.things_in(sight)) or what_was_said(told) is None


def test_a_kind_is_neither_denied_nor_made_up(photo_author) -> None:
    from photo_classes import load_kinds
    from sights import Sight
    from vision import TOKENS

    author = photo_author
    dog = load_kinds()["dog"]
    thing = {c.en: c for c in author.concepts}
    sight = Sight((author.number[dog],) * TOKENS)
    assert author.say_is(sight, dog, "zh") == "是的。这是一种狗。"
    assert author.say_is(sight, thing["dog"], "zh") == "是的。这是一种狗。"
    assert author.say_is(sight, thing["golden retriever"], "zh") == "可能是。这是一种狗。"
    assert author.say_is(sight, thing["tabby cat"], "zh") == "不是。这是一种狗。"
    golden = Sight((author.number[thing["golden retriever"]],) * TOKENS, 7, 3)
    assert author.say_is(golden, thing["dog"], "en").startswith("Yes. ")
    assert author.describe(golden, "zh") == "图里有一只金毛寻回犬。背景主要是绿色。"
    for seen, trait, verdict in (
        (load_kinds()["bicycle"], "wheels", "有轮子"),
        (thing["canoe"], "wheels", "没有轮子"),
        (thing["panda"], "big", "比人大"),
        (thing["tabby cat"], "big", "不比人大"),
    ):
        shown = Sight((author.number[seen],) * TOKENS)
        assert author.say_photo_trait(shown, trait, "zh").startswith(f"{verdict}。")
    unsure = Sight((author.verdicts.unsure,) * TOKENS, ground=4)
    assert author.say_seen(unsure, "zh") == "我不确定这是什么。图片主要是蓝色。"
    assert author.say_is(unsure, dog, "zh") == author.say_seen(unsure, "zh")


def test_where_and_what_else_are_told_from_the_regions(photo_author) -> None:
    from photo_classes import load_kinds
    from photo_dialogues import PART
    from sights import Sight
    from vision import TOKENS

    author = photo_author
    thing = {c.en: c for c in author.concepts}
    dog, ball = thing["golden retriever"], thing["tennis ball"]
    unsure = author.verdicts.unsure

    def sight(whole, **parts) -> Sight:
        seen = [author.number[whole] if whole else unsure] * TOKENS
        for place, meaning in parts.items():
            seen[PART[place.replace("_", " ")]] = author.number[meaning]
        return Sight(tuple(seen))

    alone = sight(dog)
    assert author.say_spot(alone, dog, "zh") == "金毛寻回犬在中间。"
    assert author.say_spot(alone, ball, "zh") == "没看到网球。"
    assert author.say_rest(alone, dog, "en") == "I see nothing else."
    beside = sight(dog, right=ball, bottom_right=ball)
    assert author.say_spot(beside, ball, "en") == "The tennis ball is on the right."
    assert author.say_rest(beside, dog, "zh") == "还有一个网球。"
    assert author.say_spot(sight(dog, right=ball, top=ball), ball, "zh") == "网球在右上角。"
    assert author.say_spot(sight(None, top_left=ball), ball, "zh") == "网球在左上角。"
    assert author.say_spot(sight(None), ball, "zh") == "我不确定这是什么。"
    kind = load_kinds()["dog"]
    assert author.shown(sight(kind)) == [kind] and author.shown(beside) == [dog, ball]


def test_several_pictures_are_told_apart_by_their_numbers(photo_author) -> None:
    from concepts import load_concepts
    from photo_classes import load_kinds
    from scenes import Thing
    from sights import Sight
    from vision import TOKENS

    author = photo_author
    thing = {c.en: c for c in author.concepts}
    drawn = {c.en: c.index for c in load_concepts()}

    def photo(meaning) -> Sight:
        return Sight((author.number[meaning],) * TOKENS)

    golden, beagle = photo(thing["golden retriever"]), photo(thing["beagle"])
    dog, unsure = photo(load_kinds()["dog"]), photo(None)
    apple = Thing(drawn["red apple"], "middle", 0)
    views = [golden, apple, dog, unsure, beagle]
    assert author.say_nth(views, 1, "zh") == "第二张图是红苹果。"
    assert author.say_nth(views, 2, "zh") == "第三张图是一种狗。"
    assert author.say_nth(views, 3, "en") == "I am not sure what the fourth picture shows."
    assert author.say_which(views, load_kinds()["dog"], "zh") == "第一张图、第三张图和第五张图。"
    assert author.say_which(views, thing["beagle"], "en") == "The fifth picture."
    assert author.say_which(views, thing["tabby cat"], "zh") == "都不是。"
    assert author.say_which([golden, beagle], thing["dog"], "zh") == "两张都是。"
    assert author.say_same([golden, golden], "zh") == "一样。都是金毛寻回犬。"
    assert author.say_same([golden, beagle], "zh").startswith("不一样。第一张图是金毛寻回犬。")
    assert author.say_same([golden, dog], "zh").startswith("我不确定。")
    assert author.say_same([dog, dog], "en") == "I am not sure. Both show a kind of dog."


def test_batches_hold_drawings_and_photographs_side_by_side(photo_author) -> None:
    from sights import Sight

    _, parts, sampler = toy_parts(photo_author)
    parts.bridge.eval()
    batch = next(sampler.batches(48, pool=2))
    drawn = batch.pictures >= 0
    assert drawn.any() and not drawn.all()
    embeds, what = parts.embed(batch, random_features)
    features = random_features(batch.pictures[drawn])
    assert torch.allclose(embeds[drawn], parts.bridge(*features)) and len(what) == drawn.sum()
    assert torch.equal(embeds[~drawn], parts.photos(batch.sights[~drawn]))
    for numbers in batch.sights[~drawn].tolist():
        assert max(Sight.of(numbers).verdicts) <= photo_author.verdicts.unsure


def test_training_learns_photographs_by_heart(photo_author, tmp_path: Path) -> None:
    from train import Trainer, tune, tuning_groups

    settings, parts, sampler = toy_parts(photo_author)
    sights = [photo_author.deal() for _ in range(12)]
    samples = iter([sampler.written(photo_author.photo(s, turns=1), [s]) for s in sights])
    batch = next(sampler.batches(12, pool=1, make=lambda: next(samples)))
    assert (batch.pictures < 0).all()
    groups = tuning_groups(settings, parts, 1.0)
    trainer = Trainer(tmp_path, "toy", groups, parts.modules(), 120, warm=5)
    before = parts.photos.verdict.weight.detach().clone()
    while not trainer.finished:
        tune(trainer, parts, batch, random_features, sampler.pictures.__getitem__)
    assert trainer.losses[-1] < trainer.losses[0] / 3
    assert not torch.equal(parts.photos.verdict.weight, before)


def test_a_verdict_begins_as_the_words_for_it(photo_author) -> None:
    from train import name_verdicts

    _, parts, _ = toy_parts(photo_author)
    verdicts = photo_author.verdicts
    table = parts.lm.word_embeddings.weight.detach()
    name_verdicts(parts.photos, parts.readers, table, verdicts)
    rows = parts.photos.verdict.weight.detach()[:-1]
    names = parts.readers.words(
        table, [parts.readers.ids(m.zh, m.en) for m in verdicts.meanings[:-1]]
    )
    names = names - names.mean(0)
    cosine = torch.nn.functional.normalize(rows) @ torch.nn.functional.normalize(names).t()
    # things and categories of one name (a person is both kind and category) cannot be told apart
    assert (cosine.argmax(1) == torch.arange(len(rows))).float().mean() > 0.97


def test_calibration_makes_answers_surer_and_leaves_the_best_alone(photo_author, tmp_path) -> None:
    from itertools import repeat
    from types import SimpleNamespace

    from train import FACTORS, Trainer, calibrate, tune, tuning_groups

    settings, parts, sampler = toy_parts(photo_author)
    samples = iter([sampler.photographs(turns=1) for _ in range(6)])
    batch = next(sampler.batches(6, pool=1, make=lambda: next(samples)))
    groups = tuning_groups(settings, parts, 1.0)
    trainer = Trainer(tmp_path, "toy", groups, parts.modules(), 200, warm=5)
    while not trainer.finished:
        tune(trainer, parts, batch, random_features, sampler.pictures.__getitem__)
    one_batch = SimpleNamespace(author=photo_author, batches=lambda *_, **__: repeat(batch))
    ids, places = torch.arange(40)[None], torch.zeros(1, 2, 40, dtype=torch.long)

    def logits() -> torch.Tensor:
        x = parts.lm.word_embeddings(ids)
        return parts.lm.lm_head(parts.lm.hidden_states(x, places, mask=None)[-1])

    with torch.no_grad():
        for value in (parts.lm.final_layernorm.weight, parts.lm.final_layernorm.bias):
            value *= 0.6  # it knows the answers, and is not sure enough of them
        before = logits()
        factor = calibrate(parts, random_features, one_batch, seed=1, batches=1)
        assert factor > FACTORS[0]
        assert torch.allclose(logits(), factor * before, rtol=1e-4, atol=1e-4)
        assert calibrate(parts, random_features, one_batch, seed=1, batches=1) <= factor
