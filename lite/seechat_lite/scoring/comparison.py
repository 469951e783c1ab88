"""Scores what several methods say about the same pictures, a few pictures at a time."""

import heapq
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from seechat_lite.images import ImageSource, Picture, load_image, thumbnail
from seechat_lite.scoring.captions import CaptionFile
from seechat_lite.scoring.win_table import WinTable, win_table
from seechat_weights.arguments import check_integer
from seechat_weights.errors import ImageError, OptionError

BATCH, MAX_BATCH = 8, 1024  # pictures
MAX_METHODS = 32
MAX_PICTURES = 1_000_000
MAX_SHOWN = 10_000  # pictures on a page
THUMBNAIL = (320, 320)  # pixels
NAMED = 20  # pictures that could not be read, by name


class Judge(Protocol):
    """What a comparison needs of a Scorer."""

    def picture(self, source: ImageSource) -> np.ndarray: ...
    def images(self, pictures: np.ndarray) -> np.ndarray: ...
    def texts(self, texts: Sequence[str]) -> tuple[np.ndarray, list[bool]]: ...


@dataclass(frozen=True)
class Candidate:
    """A picture that may be compared.

    name: for people.
    names: what files of captions may call it.
    take: reads it; may raise ImageError.
    """

    name: str
    names: Sequence[str]
    take: Callable[[], ImageSource]


@dataclass(frozen=True)
class Example:
    """A picture with its captions and scores, to look at.

    thumbnail: a JPEG.
    """

    name: str
    captions: tuple[str, ...]
    scores: tuple[float, ...]
    thumbnail: bytes

    @property
    def disagreement(self) -> float:
        """How far the scores of its captions are apart."""
        return max(self.scores) - min(self.scores)


@dataclass
class Method:
    """What is known of one method beside its scores.

    name, path: of its captions.
    missing: pictures that it has no caption for.
    failed: errors in its file, in the place of captions.
    empty: captions without a character.
    cut: captions that were longer than the judge reads.
    unused: captions of pictures that are not among those compared.
    unused_name: what one of these pictures is called.
    """

    name: str
    path: str
    missing: int = 0
    empty: int = 0
    cut: int = 0
    failed: int = 0
    unused: int = 0
    unused_name: str = ""


@dataclass
class Comparison:
    """The result.

    methods: in the order given.
    table: None if no picture has a caption by every method.
    pictures: how many there were.
    incomplete: pictures left out because a method lacks a caption.
    unreadable: pictures left out because they could not be read.
    reasons: for the first of these, why.
    examples: pictures to look at, the greatest disagreement first.
    """

    methods: list[Method]
    table: WinTable | None = None
    pictures: int = 0
    incomplete: int = 0
    unreadable: int = 0
    reasons: list[str] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)


@dataclass(frozen=True)
class Scored:
    """One picture's scores: cosines, in the order of the methods."""

    name: str
    content: str
    scores: tuple[float, ...]


def compare(
    judge: Judge,
    pictures: Iterable[Candidate],
    files: Sequence[CaptionFile],
    *,
    batch: int = BATCH,
    shown: int = 0,
    seed: int = 0,
    tell: Callable[[Scored], None] = lambda scored: None,
    progress: Callable[[], None] = lambda: None,
) -> Comparison:
    """Score all captions of all pictures.

    A picture counts only if every method has a caption of it: shares of different pictures could
    not be compared.

    judge: a Scorer.
    pictures: the pictures.
    files: the captions of each method.
    batch: pictures at once.
    shown: keep so many pictures to look at, with the greatest disagreement.
    seed: of the bootstrap.
    tell: called with the scores of every picture.
    progress: called whenever a picture is done.

    Raises OptionError, EngineError.
    """
    check_options(batch=batch, shown=shown, seed=seed)
    if not 1 <= len(files) <= MAX_METHODS or len({file.name for file in files}) < len(files):
        names = ", ".join(file.name for file in files)
        raise OptionError(
            f"captions by {names[:200]}; expected 1 to {MAX_METHODS} methods, each once: name each "
            "differently"
        )
    result = Comparison([Method(file.name, str(file.path)) for file in files])
    rows: list[tuple[float, ...]] = []
    best: list[tuple[float, int, Example]] = []
    for some in _batches(_complete(judge, pictures, files, result, progress), batch):
        features = judge.images(np.stack([one.pixels for one in some]))
        texts, cut = judge.texts([text for one in some for text in one.captions])
        shape = (len(some), len(files), -1)
        cosines = np.einsum("pf,pmf->pm", features, texts.reshape(shape), dtype=np.float64)
        for i, method in enumerate(result.methods):
            method.cut += sum(cut[i :: len(files)])
            method.empty += sum(not one.captions[i].strip() for one in some)
        for one, found in zip(some, cosines.tolist(), strict=True):
            scores = tuple(found)
            rows.append(scores)
            tell(Scored(one.name, one.picture.key, scores))
            progress()
            spread = max(scores) - min(scores)
            if shown and (len(best) < shown or spread > best[0][0]):
                example = Example(one.name, one.captions, scores, _jpeg(one.picture))
                # pictures that came first win ties
                push = heapq.heappush if len(best) < shown else heapq.heappushpop
                push(best, (spread, -len(rows), example))
    result.examples = [example for _, _, example in sorted(best, key=lambda b: (-b[0], -b[1]))]
    for method, file in zip(result.methods, files, strict=True):
        method.unused, method.unused_name, method.failed = (
            file.unused,
            file.unused_name,
            file.errors,
        )
    if rows:
        result.table = win_table(np.array(rows), seed=seed)
    return result


def check_options(*, batch: int, shown: int, seed: int) -> None:
    """Check options of compare().

    batch, shown, seed: as compare() takes them.

    Raises OptionError.
    """
    check_integer("batch", batch, least=1, most=MAX_BATCH, expected=f"1 to {MAX_BATCH}")
    check_integer("shown", shown, most=MAX_SHOWN, expected=f"0 to {MAX_SHOWN}")
    check_integer("seed", seed, expected="0 or more")


@dataclass(frozen=True)
class _Ready:
    """A picture with a caption by every method."""

    name: str
    picture: Picture
    pixels: np.ndarray
    captions: tuple[str, ...]


def _complete(
    judge: Judge,
    pictures: Iterable[Candidate],
    files: Sequence[CaptionFile],
    result: Comparison,
    progress: Callable[[], None],
) -> Iterator[_Ready]:
    """The pictures that count; the others are counted in the result."""
    for candidate in pictures:
        result.pictures += 1
        if result.pictures > MAX_PICTURES:
            raise OptionError(
                f"more than {MAX_PICTURES} pictures; expected fewer: compare a part of them"
            )
        try:
            picture = load_image(candidate.take(), name=candidate.name)
            found = [file.find(candidate.names, picture.key) for file in files]
            for method, text in zip(result.methods, found, strict=True):
                method.missing += text is None
            captions = tuple(text for text in found if text is not None)
            if len(captions) < len(files):
                result.incomplete += 1
                progress()
                continue
            yield _Ready(candidate.name, picture, judge.picture(picture.image), captions)
        except ImageError as e:
            result.unreadable += 1
            progress()
            if len(result.reasons) < NAMED:
                result.reasons.append(str(e))


def _batches(ready: Iterable[_Ready], size: int) -> Iterator[list[_Ready]]:
    some: list[_Ready] = []
    for one in ready:
        some.append(one)
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some


def _jpeg(picture: Picture) -> bytes:
    file = io.BytesIO()
    try:
        thumbnail(picture.image, THUMBNAIL).save(file, "JPEG", quality=80, optimize=True)
    except ImageError:  # it has been decoded once; its scores count without a thumbnail
        return b""
    return file.getvalue()
