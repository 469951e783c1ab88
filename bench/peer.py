"""Our decoders beside chatglm.cpp's and llama.cpp's, on random weights of one shape.

    python -m venv peer && CMAKE_ARGS="-DCHATGLM_ENABLE_EXAMPLES=OFF \
        -DCMAKE_POLICY_VERSION_MINIMUM=3.5" peer/bin/pip install numpy chatglm-cpp==0.4.2 --no-deps
    CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" peer/bin/pip install llama-cpp-python gguf
    python bench/peer.py --peer peer/bin/python [--precision int8] [--with llama.cpp]

chatglm.cpp runs ChatGLM-6B, llama.cpp LLaMA-7B (the language model of LLaVA-1.5-7B), ours each of
them. All run in turn, each in a process of its own, `--rounds` times; quoted are medians and the
ratio of each round, because the speed of a shared machine drifts. int4 in blocks of 128 is set
against q4_0 (blocks of 32; the head Q6_K, as llama-quantize writes it), int8 against q8_0. Memory
is the most that a process had resident, mapped files included. Models are written to the cache
folder, 3.5 to 7.5 GB each.
"""

import argparse
import json
import platform
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

HIDDEN, INNER, VOCAB, LAYERS = 4096, 16384, 130528, 28
LLAMA_INNER, LLAMA_VOCAB, LLAMA_LAYERS = 11008, 32000, 32
PEER_TYPES = {"f32": 0, "q4_0": 2, "q8_0": 8}  # ggml's numbers
PEER_BLOCK = {"q4_0": (16, 4.6), "q8_0": (32, 74)}  # bytes of 32 codes, their deviation
LONG, SHORT, STEPS = 512, 256, 16  # tokens of the prompts, and steps timed after the short one
FIGURES = (("prefill_tokens_s", "more"), ("decode_ms", "less"), ("peak_gb", "less"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peer", required=True, help="a Python that has the peers")
    parser.add_argument("--precision", choices=("int4", "int8"), default="int4")
    parser.add_argument("--rounds", type=int, default=2)
    known = ("chatglm.cpp", "llama.cpp")
    parser.add_argument("--with", dest="peers", choices=known, action="append", help="both")
    args = parser.parse_args()
    from seechat_export.synthetic import MODELS, write_synthetic_bundle
    from seechat_lite.cache_folder import cache_folder
    from seechat_lite.processor import instructions, name

    kind = {"int4": "q4_0", "int8": "q8_0"}[args.precision]
    asked = args.peers or known
    # (who, Python, model) in the order of a round: each peer, then ours on the same network
    turns: list[tuple[str, str, Path]] = []
    for peer, model, layers in (("chatglm.cpp", "chatglm-6b", 28), ("llama.cpp", "llama-7b", 32)):
        if peer not in asked:
            continue
        bundle = cache_folder() / f"{model}-{args.precision}-{layers}-v2"  # as seechat bench has it
        if not bundle.exists():
            write_synthetic_bundle(bundle, precision=args.precision, model=MODELS[model])
        theirs = cache_folder() / f"{peer}-{kind}.{'gguf' if peer == 'llama.cpp' else 'bin'}"
        if not theirs.exists() and peer == "llama.cpp":
            subprocess.run([args.peer, __file__, "--write", kind, str(theirs)], check=True)
        elif not theirs.exists():
            write_peer(kind, theirs, bundle / "ice_text.model")
        turns += [(peer, args.peer, theirs), (f"ours, {model}", sys.executable, bundle)]
    runs: dict[str, list[dict[str, float]]] = {who: [] for who, _, _ in turns}
    for _ in range(args.rounds):
        for who, python, path in turns:
            command = [python, __file__, "--run", who, str(path)]
            out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            runs[who].append(json.loads(out.splitlines()[-1]))
            print(f"{who}  {runs[who][-1]}", file=sys.stderr)
    code = "from importlib.metadata import version; import sys; print(version(sys.argv[1]))"
    for peer, package in (("chatglm.cpp", "chatglm-cpp"), ("llama.cpp", "llama-cpp-python")):
        if peer not in asked:
            continue
        found = subprocess.run([args.peer, "-c", code, package], capture_output=True, text=True)
        (mine,) = (who for i, (who, *_) in enumerate(turns) if turns[i - 1][0] == peer and i)
        print(
            f"\n{mine} at {args.precision}, onnxruntime {version('onnxruntime')}, beside {peer} "
            f"({package} {found.stdout.strip()}) at {kind}; {name()}, {', '.join(instructions())}; "
            f"Python {platform.python_version()}"
        )
        print(f"{'':22}{'ours':>12}{'theirs':>12}   ratio a round")
        for figure, better in FIGURES:
            ours, theirs = ([r[figure] for r in runs[who]] for who in (mine, peer))
            pairs = zip(ours, theirs, strict=True)
            ratios = "  ".join(f"{a / b if better == 'more' else b / a:.2f}" for a, b in pairs)
            medians = f"{statistics.median(ours):12.1f}{statistics.median(theirs):12.1f}"
            print(f"{figure:22}{medians}   {ratios}")


def measured(prefill: Callable[[int], object], step: Callable[[int], object]) -> dict[str, float]:
    """The figures of one program: prefill reads so many tokens, step appends one."""
    import resource

    prefill(SHORT)
    start = time.perf_counter()
    prefill(LONG)
    long = time.perf_counter() - start
    prefill(SHORT)
    steps = []
    for i in range(STEPS + 1):
        start = time.perf_counter()
        step(i)
        steps.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    return {
        "prefill_tokens_s": LONG / long,
        "decode_ms": 1e3 * statistics.median(steps[1:]),
        "peak_gb": peak / 1e9,
    }


def words(most: int) -> list[int]:
    return np.random.default_rng(0).integers(5, most, LONG).tolist()


def run_ours(path: str) -> dict[str, float]:
    import seechat_lite as sl
    from seechat_lite.lm_families import framed, ordinary_ids

    with sl.load(path, kept_cache=0) as model:
        lm = model.manifest.lm
        known = ordinary_ids(lm)
        ids = np.random.default_rng(0).integers(known.start, known.stop, LONG).tolist()
        around = len(framed([], lm))
        return measured(
            lambda tokens: model.engine.prefill(sl.Prompt(framed(ids[: tokens - around], lm))),
            lambda i: model.engine.step(5 + i),
        )


def run_chatglm_cpp(path: str) -> dict[str, float]:
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
    ids: list[int] = []
    first = 0

    def prefill(tokens: int) -> None:
        nonlocal first
        ids[:], first = [*words(100_000)[: tokens - 2], 130001, 130004], tokens
        ids.append(pipeline.model.generate_next_token(ids, None, config, 0, first))

    def step(i: int) -> None:
        past = len(ids) - 1
        ids.append(pipeline.model.generate_next_token(ids, None, config, past, first))

    return measured(prefill, step)


def run_llama_cpp(path: str) -> dict[str, float]:
    import os

    import llama_cpp as ll  # pyright: ignore

    ll.llama_backend_init()
    model = ll.llama_model_load_from_file(path.encode(), ll.llama_model_default_params())
    settings = ll.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = 2048, LONG, LONG
    settings.n_threads = settings.n_threads_batch = len(os.sched_getaffinity(0))
    context = ll.llama_init_from_model(model, settings)
    batch, ids = ll.llama_batch_init(LONG, 0, 1), words(LLAMA_VOCAB)
    length = 0

    def append(tokens: list[int]) -> None:
        nonlocal length
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, length + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = i == len(tokens) - 1
        if ll.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        length += len(tokens)

    def prefill(tokens: int) -> None:
        nonlocal length
        ll.llama_memory_clear(ll.llama_get_memory(context), True)
        length = 0
        append(ids[:tokens])

    return measured(prefill, lambda i: append([5 + i]))


def write_llama(kind: str, out: Path) -> None:
    """A GGUF of LLaMA-7B with random blocks of weights, near unit scale; no vocabulary."""
    from gguf import GGMLQuantizationType, GGUFWriter  # pyright: ignore

    types = {"q4_0": GGMLQuantizationType.Q4_0, "q8_0": GGMLQuantizationType.Q8_0}
    pools = {types[kind]: random_blocks(kind)}
    head = types[kind]
    if kind == "q4_0":  # llama-quantize gives the head more: 4 + 2 bits, 16 scales, their scale
        head = GGMLQuantizationType.Q6_K
        block = np.random.default_rng(1).integers(0, 256, (1 << 14, 210), dtype=np.uint8)
        block[:, -2:] = np.full(len(block), np.float16(1e-5)).view(np.uint8).reshape(-1, 2)
        pools[head] = block
    partial = out.with_suffix(".partial")
    writer = GGUFWriter(partial, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LLAMA_LAYERS)
    writer.add_feed_forward_length(LLAMA_INNER)
    writer.add_head_count(32)
    writer.add_head_count_kv(32)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(128)
    writer.add_vocab_size(LLAMA_VOCAB)
    writer.add_tokenizer_model("none")
    tensors = [("token_embd.weight", LLAMA_VOCAB, HIDDEN, types[kind])]
    for i in range(LLAMA_LAYERS):
        tensors += [(f"blk.{i}.{n}_norm.weight", HIDDEN, 0, None) for n in ("attn", "ffn")]
        attention = ("attn_q", "attn_k", "attn_v", "attn_output")
        tensors += [(f"blk.{i}.{n}.weight", HIDDEN, HIDDEN, types[kind]) for n in attention]
        for n, outputs, inputs in (
            ("ffn_gate", LLAMA_INNER, HIDDEN),
            ("ffn_up", LLAMA_INNER, HIDDEN),
            ("ffn_down", HIDDEN, LLAMA_INNER),
        ):
            tensors.append((f"blk.{i}.{n}.weight", outputs, inputs, types[kind]))
    tensors += [("output_norm.weight", HIDDEN, 0, None)]
    tensors += [("output.weight", LLAMA_VOCAB, HIDDEN, head)]

    def width(inputs: int, form: GGMLQuantizationType) -> int:
        return inputs // (256 if form == GGMLQuantizationType.Q6_K else 32) * pools[form].shape[1]

    for name, outputs, inputs, form in tensors:
        if form is None:
            writer.add_tensor_info(name, (outputs,), np.dtype("f4"), 4 * outputs)
            continue
        shape = (outputs, width(inputs, form))
        writer.add_tensor_info(name, shape, np.dtype("u1"), shape[0] * shape[1], form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, outputs, inputs, form in tensors:
        if form is None:
            writer.write_tensor_data(np.ones(outputs, np.float32))
        else:
            writer.write_tensor_data(np.resize(pools[form], (outputs, width(inputs, form))))
    writer.close()
    partial.rename(out)


def random_blocks(kind: str) -> np.ndarray:
    """Blocks of 32 weights, near unit scale, uint8 [blocks, bytes]."""
    codes, deviation = PEER_BLOCK[kind]
    block = np.random.default_rng(0).integers(0, 256, (1 << 18, 2 + codes), dtype=np.uint8)
    scale = np.float16(0.02 / deviation)
    block[:, :2] = np.full(len(block), scale).view(np.uint8).reshape(-1, 2)
    return block


def write_peer(kind: str, out: Path, tokenizer: Path) -> None:
    """A model file of chatglm.cpp with random blocks of weights, near unit scale."""
    codes = PEER_BLOCK[kind][0]
    pool = random_blocks(kind).tobytes()
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
        run = {"chatglm.cpp": run_chatglm_cpp, "llama.cpp": run_llama_cpp}
        print(json.dumps(run.get(sys.argv[2], run_ours)(sys.argv[3])))
    elif sys.argv[1:2] == ["--write"]:
        write_llama(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
