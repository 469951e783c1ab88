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
