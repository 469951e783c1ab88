"""Runs Chinese-CLIP's two towers with ONNX Runtime: pictures and texts to features."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from seechat_lite.cache_folder import verify_once
from seechat_lite.engines.base import MAX_THREADS
from seechat_lite.engines.onnx.devices import find_device, open_session, run_options
from seechat_lite.images import ImageSource, load_image, pixels
from seechat_lite.memory import available_memory, human
from seechat_lite.native import Native, guarded
from seechat_lite.onnx_runtime import ort
from seechat_lite.scoring.captions import MAX_TEXT
from seechat_lite.wordpiece import WordPieces
from seechat_weights.arguments import check_integer
from seechat_weights.bundle.onnx_graph import check_tower
from seechat_weights.errors import BundleError, CheckpointError, EngineError, MemoryPlanError
from seechat_weights.files.in_use import FilesInUse
from seechat_weights.files.reading import local_path
from seechat_weights.scorer.manifest import ScorerManifest, data_of, read_scorer
from seechat_weights.wordpiece import CHINESE_CLIP_PLACE, read_vocabulary

log = logging.getLogger(__name__)

MAX_WORD = 200  # characters; the authors' code cuts longer words than BERT's does
TEXTS_AT_ONCE = 64  # of the same length
PIXELS, IDS = "pixel_values", "input_ids"
WORKSPACE = 300_000_000  # bytes; activations of a few pictures, and the library's own


class Scorer(Native):
    """A scorer that was exported from Chinese-CLIP.

    Pictures are prepared as transformers and the authors' code do it, so EXIF orientation and
    transparency are ignored. A context manager that closes itself.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        device: str = "auto",
        threads: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Open a scorer.

        folder: the scorer's folder.
        device: as load() takes it.
        threads: threads on the CPU; 0 for one a core.
        progress: called while files are hashed, with the bytes read and those of all files.

        Raises BundleError, EngineError, MemoryPlanError, OptionError.
        """
        check_integer("threads", threads, most=MAX_THREADS, expected=f"0 to {MAX_THREADS}")
        folder = local_path(folder)
        self.manifest: ScorerManifest = read_scorer(folder)
        self.folder = folder
        self.device = find_device(device)
        self._fork = "never" if self.device.on_gpu else "idle"
        self._files = FilesInUse((folder / name for name in self.manifest.files), BundleError)
        verify_once(folder, self.manifest, progress)
        text = self.manifest.text
        try:
            vocabulary = read_vocabulary(
                folder / text.vocabulary, text.vocab_size, place=CHINESE_CLIP_PLACE
            )
        except CheckpointError as e:
            raise BundleError(f"{e}, or export the scorer again") from None
        self._threads = threads
        # no special pieces: "[SEP]" in a text is five characters and three letters
        self._words = WordPieces(
            vocabulary, max_word=MAX_WORD, needed="expected it, to score captions"
        )
        self._check_memory()
        side = self.manifest.image.pixels.image_size
        self._run: ort.RunOptions | None = None
        self._sessions = {  # by the name of the input
            PIXELS: self._open(self.manifest.image.graph, PIXELS, 3, side, side),
            IDS: self._open(text.graph, IDS, None),
        }

    def picture(self, source: ImageSource) -> np.ndarray:
        """A picture's pixels, float32 [3, S, S].

        source: the picture.

        Raises ImageError.
        """
        return pixels(load_image(source).image, self.manifest.image.pixels)

    def images(self, pictures: np.ndarray) -> np.ndarray:
        """Features of pictures, float32 [n, features], each of length 1.

        pictures: float32 [n, 3, S, S], as picture() makes them.

        Raises EngineError.
        """
        if not len(pictures):
            return np.empty((0, self.manifest.features), np.float32)
        return self._run_tower(PIXELS, np.ascontiguousarray(pictures))

    def texts(self, texts: Sequence[str]) -> tuple[np.ndarray, list[bool]]:
        """Features of texts, float32 [n, features], each of length 1; and which texts were cut.

        texts: the texts.

        Raises EngineError.
        """
        encoded = [self._encode(text) for text in texts]
        # what is said twice is computed once, so that equal texts have equal scores
        rows: dict[tuple[int, ...], list[int]] = {}
        for row, (ids, _) in enumerate(encoded):
            rows.setdefault(tuple(ids), []).append(row)
        by_length: dict[int, list[tuple[int, ...]]] = {}
        for ids in rows:
            by_length.setdefault(len(ids), []).append(ids)
        features = np.empty((len(texts), self.manifest.features), np.float32)
        for same in by_length.values():
            for start in range(0, len(same), TEXTS_AT_ONCE):
                part = same[start : start + TEXTS_AT_ONCE]
                found = self._run_tower(IDS, np.array(part, np.int64))
                for ids, feature in zip(part, found, strict=True):
                    features[rows[ids]] = feature
        return features, [cut for _, cut in encoded]

    def _encode(self, text: str) -> tuple[list[int], bool]:
        """A text's ids, and whether it was cut."""
        return self._words.encode(text[:MAX_TEXT], most=self.manifest.text.context)

    def cancel(self) -> None:
        """End the running call soon. May be called from any thread."""
        if self._run:
            self._run.terminate = True

    def _check_memory(self) -> None:
        """Refuse a scorer that would not fit; its weights become float32 when they are loaded."""
        if self.device.on_gpu:
            return
        graphs = (self.manifest.image.graph, self.manifest.text.graph)
        stored = sum(self.manifest.files[data_of(graph)].bytes for graph in graphs)
        wide = stored * (2 if self.manifest.precision == "fp16" else 1)
        # while a graph is optimized, both forms of its weights are there
        needed, free = wide + WORKSPACE + (stored if wide > stored else 0), available_memory()
        if needed > free:
            raise MemoryPlanError(
                f"{self.folder}: takes up to {human(needed)} of memory, {human(free)} are free; "
                "expected room for both towers: close other programs, or export a smaller "
                "Chinese-CLIP, such as ViT-B-16"
            )

    def _open(self, graph: str, name: str, *shape: int | None) -> ort.InferenceSession:
        check_tower(self.folder, self.manifest, graph, data_of(graph))
        self._files.check_places()
        expected = {name: (None, *shape), "features": (None, self.manifest.features)}
        return open_session(
            self.folder / graph, self.device, expected, threads=self._threads, exact=True
        )

    @guarded
    def _run_tower(self, name: str, given: np.ndarray) -> np.ndarray:
        """Run a tower; returns its features, each of length 1."""
        self._files.check()
        self._run = run_options()
        self.check_open()  # cancel() knows of this run from here on
        try:
            (found,) = self._sessions[name].run(["features"], {name: given}, self._run)
        except Exception as e:  # ONNX Runtime raises its own unrelated exception types
            raise EngineError(
                f"ONNX Runtime failed in a scorer's tower ({str(e).splitlines()[0]}); expected "
                "features: if memory is short, close other programs or score fewer pictures at once"
            ) from e
        features = np.asarray(found)
        length = np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
        if not (np.isfinite(length).all() and (length > 0).all()):
            raise EngineError(
                f"{self.folder}: a tower gave no finite numbers; expected features: check the "
                "scorer's files with identify(), or export it again",
                calls={"identify": {"path": self.folder}},
            )
        return (features / length).astype(np.float32)

    def _release(self) -> None:
        if sessions := getattr(self, "_sessions", None):
            sessions.clear()
        if files := getattr(self, "_files", None):
            files.close()

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
