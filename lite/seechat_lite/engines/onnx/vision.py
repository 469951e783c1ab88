"""The default engine's vision: pictures to embeddings, by the bundle's graph."""

from collections.abc import Sequence

import numpy as np

from seechat_lite.engines.base import EngineOptions
from seechat_lite.engines.onnx.devices import find_device, open_session, run_options
from seechat_lite.native import Native, guarded
from seechat_lite.onnx_runtime import ort
from seechat_lite.source import Source
from seechat_weights.bundle.onnx_graph import check_vision
from seechat_weights.bundle.precisions import VISION_PRECISIONS
from seechat_weights.config import QuestionConfig, VisionConfig
from seechat_weights.errors import EngineError
from seechat_weights.files.in_use import FilesInUse

Shapes = dict[str, tuple[int | None, ...]]  # of a graph's inputs and outputs, by their names


class OnnxVision(Native):
    """Runs a bundle's vision graph. The first picture loads it: text alone needs none of it.

    source: the bundle.
    options: where and how to run.
    files: the bundle's files.
    """

    def __init__(
        self, source: Source, options: EngineOptions, files: FilesInUse | None = None
    ) -> None:
        self._folder = source.path
        self._manifest = source.manifest
        self._options = options
        self._files = files
        self.device = find_device(options.vision_device or options.device)
        self._sessions: dict[str, ort.InferenceSession] = {}  # by graph
        self._checked: set[str] = set()  # graphs that were found to be ones that an export writes
        self._run: ort.RunOptions | None = None  # of the picture that is being encoded
        self._fork = "never" if self.device.on_gpu else "idle"

    @guarded
    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Compute the embeddings of pictures, float32 [n, tokens, hidden].

        pixels: float32 [n, 3, S, S].

        Returns what read_question() takes if the embeddings depend on the question.
        """
        vision = self._manifest.vision
        assert vision is not None
        size = vision.pixels.image_size
        output = vision.output or (vision.tokens, self._manifest.lm.hidden_size)
        shapes = {"pixel_values": (None, 3, size, size), "image_embeds": (None, *output)}
        feeds = {"pixel_values": np.ascontiguousarray(pixels, np.float32)}
        return self._computed(vision, shapes, feeds)

    @guarded
    def read_question(self, seen: np.ndarray, question_ids: Sequence[int]) -> np.ndarray:
        """Compute the embeddings of a picture for a question, float32 [tokens, hidden].

        seen: float32 [positions, width], one picture of encode().
        question_ids: the question's pieces.
        """
        vision = self._manifest.vision
        assert vision is not None and vision.question is not None and vision.output is not None
        shapes: Shapes = {
            "seen": (None, *vision.output),
            "question_ids": (None, None),
            "image_embeds": (None, vision.tokens, self._manifest.lm.hidden_size),
        }
        feeds = {
            "seen": np.ascontiguousarray(seen[None], np.float32),
            "question_ids": np.array([question_ids], np.int64),
        }
        return self._computed(vision.question, shapes, feeds)[0]

    def _computed(
        self, part: VisionConfig | QuestionConfig, shapes: Shapes, feeds: dict[str, np.ndarray]
    ) -> np.ndarray:
        """Run the graph of a part of the network."""
        vision, exact = self._manifest.vision, self._options.dtype == "fp32"
        assert vision is not None
        precision = VISION_PRECISIONS[vision.precision]
        half = self.device.on_gpu and not exact and part.half in self._manifest.files
        # preparing the weights for one picture takes longer than it saves, and twice the memory;
        # int8 products need it anyway
        mapped = (
            not self._options.keep_vision
            and not precision.integers
            and self.device.provider == "CPUExecutionProvider"
        )
        graph = part.half if half else part.graph
        held = self._sessions.get(graph)
        if self._files:
            self._files.check() if held else self._files.check_places()
        if graph not in self._checked:
            check_vision(self._folder, self._manifest, graph)
            self._checked.add(graph)
        session = held or open_session(
            self._folder / graph,
            self.device,
            shapes,
            threads=self._options.threads,
            as_written=mapped,
            exact=exact or precision.exact,
            limit=self._options.max_memory,
        )
        if self._options.keep_vision:
            self._sessions[graph] = session
        self._run = run_options(return_memory=True)
        self.check_open()  # cancel() knows of this run from here on
        try:
            (found,) = session.run(["image_embeds"], feeds, self._run)
        except Exception as e:  # ONNX Runtime raises its own unrelated exception types
            raise EngineError(
                f"ONNX Runtime failed on a picture ({str(e).splitlines()[0]}); expected its "
                "embeddings: if memory is short, close other programs, or read pictures "
                "elsewhere with vision_device"
            ) from e
        return np.asarray(found)

    def cancel(self) -> None:
        """End the running call soon. May be called from any thread."""
        if self._run:
            self._run.terminate = True

    def unload(self) -> None:
        """Free the sessions; the next picture opens them again."""
        self._sessions.clear()

    def _release(self) -> None:
        self.unload()
