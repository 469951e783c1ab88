"""The default engine's vision: pictures to embeddings, by the bundle's graph."""

import numpy as np

from seechat_lite.engines.base import EngineOptions
from seechat_lite.engines.onnx.devices import find_device, open_session, run_options
from seechat_lite.native import Native, guarded
from seechat_lite.onnx_runtime import ort
from seechat_lite.source import Source
from seechat_weights.bundle.onnx_graph import check_vision
from seechat_weights.bundle.precisions import VISION_PRECISIONS
from seechat_weights.errors import EngineError
from seechat_weights.files.in_use import FilesInUse


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
        self._session: ort.InferenceSession | None = None
        self._checked = False  # whether the graph was checked to be one that an export writes
        self._run: ort.RunOptions | None = None  # of the picture that is being encoded
        self._fork = "never" if self.device.on_gpu else "idle"

    @guarded
    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Compute the embeddings of pictures, float32 [n, tokens, hidden].

        pixels: float32 [n, 3, S, S].
        """
        vision, exact = self._manifest.vision, self._options.dtype == "fp32"
        assert vision is not None
        precision = VISION_PRECISIONS[vision.precision]
        half = self.device.on_gpu and not exact and vision.half in self._manifest.files
        size = vision.pixels.image_size
        # preparing the weights for one picture takes longer than it saves, and twice the memory;
        # int8 products need it anyway
        mapped = (
            not self._options.keep_vision
            and not precision.integers
            and self.device.provider == "CPUExecutionProvider"
        )
        graph = vision.half if half else vision.graph
        if self._files:
            self._files.check() if self._session else self._files.check_places()
        if not self._checked:
            check_vision(self._folder, self._manifest, graph)
        self._checked = True
        session = self._session or open_session(
            self._folder / graph,
            self.device,
            {
                "pixel_values": (None, 3, size, size),
                "image_embeds": (None, vision.tokens, self._manifest.lm.hidden_size),
            },
            threads=self._options.threads,
            as_written=mapped,
            exact=exact or precision.exact,
            limit=self._options.max_memory,
        )
        self._session = session if self._options.keep_vision else None
        feeds = {"pixel_values": np.ascontiguousarray(pixels, np.float32)}
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
        """Free the session; the next picture opens it again."""
        self._session = None

    def _release(self) -> None:
        self.unload()
