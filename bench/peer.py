"""Our decoder and chatglm.cpp's, side by side on this machine, on random weights of one shape.

    python -m venv peer && CMAKE_ARGS="-DCHATGLM_ENABLE_EXAMPLES=OFF \
        -DCMAKE_POLICY_VERSION_MINIMUM=3.5" peer/bin/pip install numpy chatglm-cpp==0.4.2 --no-deps
    python bench/peer.py --peer peer/bin/python [--precision int8]

The two run in turn, each in a process of its own, `--rounds` times; quoted are medians and the
ratio of each round, because the speed of a shared machine drifts. int4 in blocks of 128 is set
against q4_0 (blocks of 32), int8 against q8_0. Models are written to the cache folder: 4 and 3.5 GB
(7 and 6.6 GB).
"""

import argparse
import json
import statistics
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

HIDDEN, INNER, VOCAB, LAYERS = 4096, 16384, 130528, 28
PEER_TYPES = {"f32": 0, "q4_0": 2, "q8_0": 8}  # ggml's numbers
PEER_BLOCK = {"q4_0": (16, 4.6), "q8_0": (32, 74)}  # bytes of 32 codes, their deviation
LONG, SHORT, STEPS = 512, 256, 16  # tokens of the prompts, and steps timed after the short one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peer", required=True, help="a Python that has chatglm-cpp 0.4.2")
    parser.add_argument("--precision", choices=("int4", "int8"), default="int4")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    from seechat_export.synthetic import write_synthetic_bundle
    from seechat_lite.cache_folder import cache_folder

    kind = {"int4": "q4_0", "int8": "q8_0"}[args.precision]
    bundle = cache_folder() / f"chatglm-6b-{args.precision}-{LAYERS}"
    if not bundle.exists():
        write_synthetic_bundle(bundle, precision=args.precision)
    model = cache_folder() / f"chatglm-cpp-{kind}.bin"
    if not model.exists():
        write_peer(kind, model, bundle / "ice_text.model")
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "peer": []}
    for _ in range(args.rounds):
        for who, python, path in (("peer", args.peer, model), ("ours", sys.executable, bundle)):
            command = [python, __file__, "--run", who, str(path)]
            out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            runs[who].append(json.loads(out.splitlines()[-1]))
            print(f"{who}  {runs[who][-1]}", file=sys.stderr)
    print(f"{'':22}{args.precision:>12}{kind:>12}   ratio a round")
    for name, better in (("prefill_tokens_s", "more"), ("decode_ms", "less")):
        ours, peer = ([r[name] for r in runs[who]] for who in ("ours", "peer"))
        pairs = zip(ours, peer, strict=True)
        ratios = [a / b if better == "more" else b / a for a, b in pairs]
        shown = "  ".join(f"{r:.2f}" for r in ratios)
        print(f"{name:22}{statistics.median(ours):12.1f}{statistics.median(peer):12.1f}   {shown}")


def run_ours(path: str) -> dict[str, float]:
    import seechat_lite as sl

    with sl.load(path) as model:
        lm = model.manifest.lm
        words = np.random.default_rng(0).integers(5, 100_000, LONG).tolist()

        def prefill(tokens: int) -> float:
            ids = [*words[: tokens - 2], lm.gmask_id, lm.bos_id]
            start = time.perf_counter()
            model.engine.prefill(sl.Prompt(ids))
            return time.perf_counter() - start

        prefill(SHORT)
        long = prefill(LONG)
        prefill(SHORT)
        steps = []
        for i in range(STEPS):
            start = time.perf_counter()
            model.engine.step(5 + i)
            steps.append(time.perf_counter() - start)
    return {"prefill_tokens_s": LONG / long, "decode_ms": 1e3 * statistics.median(steps)}


def run_peer(path: str) -> dict[str, float]:
    from chatglm_cpp import _C  # pyright: ignore

    pipeline = _C.Pipeline(path)
    settings = {
        "max_length": 2048,
        "max_new_tokens": STEPS,
        "max_context_length": 2000,
        "do_sample": False,
        "top_k": 0,
        "top_p": 1.0,
        "temperature": 1.0,
        "repetition_penalty": 1.0,
    }
    config = _C.GenerationConfig(**settings)
    words = np.random.default_rng(0).integers(5, 100_000, LONG).tolist()

    def generate(tokens: int, new: int) -> list[float]:
        ids, past, seconds = [*words[: tokens - 2], 130001, 130004], 0, []
        for _ in range(new):
            start = time.perf_counter()
            ids.append(pipeline.model.generate_next_token(ids, None, config, past, tokens))
            seconds.append(time.perf_counter() - start)
            past = len(ids) - 1
        return seconds

    decode = statistics.median(generate(SHORT, STEPS + 1)[1:])
    return {"prefill_tokens_s": LONG / generate(LONG, 1)[0], "decode_ms": 1e3 * decode}


def write_peer(kind: str, out: Path, tokenizer: Path) -> None:
    """A model file of chatglm.cpp with random blocks of weights, near unit scale."""
    codes, deviation = PEER_BLOCK[kind]
    block = np.random.default_rng(0).integers(0, 256, (1 << 18, 2 + codes), dtype=np.uint8)
    scale = np.float16(0.02 / deviation)
    block[:, :2] = np.full(len(block), scale).view(np.uint8).reshape(-1, 2)
    pool = block.tobytes()
    partial = out.with_suffix(".partial")
    with partial.open("wb") as f:

        def tensor(name: str, shape: tuple[int, ...], dtype: str, fill: float = 0.0) -> None:
            f.write(struct.pack("i", len(name)) + name.encode())
            f.write(struct.pack("i" * (2 + len(shape)), len(shape), *shape, PEER_TYPES[dtype]))
            f.seek((f.tell() + 15) // 16 * 16)
            if dtype == "f32":
                f.write(np.full(shape, fill, np.float32).tobytes())
                return
            left = int(np.prod(shape)) // 32 * (2 + codes)
            while left > 0:
                left -= f.write(pool[:left])

        proto = tokenizer.read_bytes()
        f.write(b"ggml" + struct.pack("i", 1))
        sizes = (2, PEER_TYPES[kind], VOCAB, HIDDEN, 32, 32, LAYERS, INNER)
        f.write(struct.pack("iiiiiiiififiii", *sizes, 1e-5, 0, 10000.0, 2048, 130005, 3))
        f.write(struct.pack("i", len(proto)) + proto)
        tensor("transformer.word_embeddings.weight", (VOCAB, HIDDEN), kind)
        for i in range(LAYERS):
            layer = f"transformer.layers.{i}."
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensor(f"{layer}{norm}.weight", (HIDDEN,), "f32", 1.0)
                tensor(f"{layer}{norm}.bias", (HIDDEN,), "f32")
            for name, rows, columns in (
                ("attention.query_key_value", 3 * HIDDEN, HIDDEN),
                ("attention.dense", HIDDEN, HIDDEN),
                ("mlp.dense_h_to_4h", INNER, HIDDEN),
                ("mlp.dense_4h_to_h", HIDDEN, INNER),
            ):
                tensor(f"{layer}{name}.weight", (rows, columns), kind)
                tensor(f"{layer}{name}.bias", (rows,), "f32")
        tensor("transformer.final_layernorm.weight", (HIDDEN,), "f32", 1.0)
        tensor("transformer.final_layernorm.bias", (HIDDEN,), "f32")
    partial.rename(out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        print(json.dumps({"ours": run_ours, "peer": run_peer}[sys.argv[2]](sys.argv[3])))
    else:
        main()
