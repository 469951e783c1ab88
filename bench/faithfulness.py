"""How much of a model is lost to 8 and 4 bits, and how much less with our scales than without.

    python bench/faithfulness.py            # a few minutes; writes docs/benchmarks/faithfulness.md
    python bench/faithfulness.py --llama DIR   # a LLaMA against transformers; prints a table
    python bench/faithfulness.py --real FILE.gguf   # four bits on a real LM, llama.cpp's as well

Every linear weight is rounded, put back into the torch network, and its next-token distributions
are compared with those of the unrounded model, over the answers of some hundred dialogues. One row
of each precision comes out of ONNX Runtime instead, whose products round their inputs to 8 bits as
well: what users get. The models are the two random reference models of the tests and the built-in
one; its unrounded weights are those of recipes/builtin, if they were trained here (--builtin), else
what the shipped 8-bit bundle holds, against which 8 bits lose nothing.
"""

import argparse
import json
import platform
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

import seechat_lite as sl
from seechat_export.export import Source, export_bundle
from seechat_export.quantize import restored_tensor
from seechat_export.reference_chatglm import ChatGLM, prefix_mask
from seechat_lite.conversation import FORMATS, Turn, render
from seechat_lite.engines import Engine
from seechat_lite.nn.block_quantization import dequantize_blocks, quantize_blocks
from seechat_lite.prompt import Prompt, build, position_ids
from seechat_weights.builtin import BUILTIN
from seechat_weights.bundle.arrays import BundleArrays
from seechat_weights.bundle.manifest import TOKENIZER_KINDS, read_manifest
from seechat_weights.bundle.precisions import BLOCK_SIZES, PRECISIONS
from seechat_weights.config import LMConfig
from seechat_weights.lm.checkpoint import open_lm

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = TOKENIZER_KINDS["ice"]
RECIPE = ROOT / "recipes/builtin"
DIALOGUES, ANSWER = 256, 24  # of the built-in model; tokens sampled where no answer is given
QUESTIONS = (
    "这是什么？",
    "What is this?",
    "它是什么颜色的？",
    "它属于哪一类？",
    "它能吃吗？",
    "图里有几个东西？",
)
MEASURED_BLOCK = 64  # of the rows from ONNX Runtime


@dataclass(frozen=True)
class Case:
    """A prompt, ending with <sop>, and the ids that follow it."""

    prompt: Prompt
    answer: list[int]


@dataclass(frozen=True)
class Row:
    """kl: nats a token. top1: share of tokens where the likeliest is the same. perplexity: of the
    answers, less that of the unrounded model."""

    precision: str
    block: int
    fit: str
    kl: float
    top1: float
    perplexity: float


@dataclass
class Subject:
    """A model, its unrounded weights, and what it is asked."""

    name: str
    config: LMConfig
    state: dict[str, Tensor]
    folder: Path  # for the export
    cases: list[Case]
    note: str


def absmax(weight: Tensor, bits: int, block: int, *, one_more: bool = False) -> Tensor:
    """Round to nearest: the largest weight of a block decides its scale.

    one_more: it goes to -2**(bits-1), the end of the range with one step more, whatever its sign
    (llama.cpp's q4_0 does so); otherwise to 2**(bits-1) - 1.
    """
    blocks = F.pad(weight, (0, -weight.shape[1] % block)).unflatten(1, (-1, block))
    end = 2 ** (bits - 1)
    if one_more:
        scale = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -end
    else:
        scale = blocks.abs().amax(-1, keepdim=True) / (end - 1)
    scale = torch.where(scale == 0, 1, scale)
    rounded = (blocks / scale).round().clamp(-end, end - 1) * scale
    return rounded.flatten(1)[:, : weight.shape[1]]


def ours(weight: Tensor, bits: int, block: int) -> Tensor:
    codes, scales = quantize_blocks(weight, bits=bits, block_size=block)
    return dequantize_blocks(codes, scales, bits=bits, inputs=weight.shape[1])


FITS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "absmax": absmax,
    "absmax, one step more": lambda w, bits, block: absmax(w, bits, block, one_more=True),
    "ours": ours,
}


# --- models and what they are asked -------------------------------------------------------------


def state_of(folder: Path) -> tuple[LMConfig, dict[str, Tensor]]:
    source = Source(open_lm(folder))
    return source.config, {key: source.tensor(key).float() for key in source.lm.shapes}


def shipped_state() -> tuple[LMConfig, dict[str, Tensor]]:
    """The built-in model's weights as its 8 bits give them."""
    manifest = read_manifest(BUILTIN)
    arrays, lm = BundleArrays(BUILTIN, manifest), manifest.lm
    state = {i.key: restored_tensor(i, arrays.stored(i), lm) for i in arrays.items}
    state["word_embeddings.weight"] = torch.from_numpy(arrays.embeddings.copy()).float()
    return lm, state


def write_folder(folder: Path, config: LMConfig, state: dict[str, Tensor]) -> Path:
    """An LM folder of these weights, which the export reads."""
    folder.mkdir()
    names = {"num_attention_heads": "num_heads", "inner_hidden_size": "inner_size"}
    settings = asdict(config)
    settings |= {published: settings[n] for published, n in names.items()}
    settings |= {
        f"{n}_token_id": settings[f"{n}_id"] for n in ("pad", "mask", "gmask", "bos", "eos")
    }
    (folder / "config.json").write_text(json.dumps({"model_type": "chatglm", **settings}))
    published = {k if k == "lm_head.weight" else f"transformer.{k}": v for k, v in state.items()}
    save_file({k: v.contiguous() for k, v in published.items()}, folder / "model.safetensors")
    (folder / TOKENIZER).write_bytes((BUILTIN / TOKENIZER).read_bytes())
    return folder


def reference(name: str, scratch: Path) -> Subject:
    """A random reference model, and answers sampled from itself."""
    folder = ROOT / "tests/data" / name
    if not (folder / TOKENIZER).exists():  # the two share one
        copy = scratch / name
        copy.mkdir()
        for file in ("config.json", "model.safetensors"):
            (copy / file).write_bytes((folder / file).read_bytes())
        (copy / TOKENIZER).write_bytes((folder.parent / "chatglm_tiny" / TOKENIZER).read_bytes())
        folder = copy
    config, state = state_of(folder)
    generator = np.random.default_rng(0)
    words = generator.integers(5, config.mask_id, (64, 20)).tolist()
    prompts = [Prompt([*ids, config.gmask_id, config.bos_id]) for ids in words]
    cases = sampled(network(config, state), prompts)
    return Subject(name, config, state, folder, cases, "answers sampled from the model itself")


def builtin(folder: Path, scratch: Path) -> Subject:
    """The built-in model, about its own pictures and without any, in the words of its training."""
    sys.path.insert(0, str(RECIPE))
    from concepts import load_concepts
    from dialogues import Author

    if (folder / "model.safetensors").exists():
        config, state = state_of(folder)
        note = "against its float32 weights"
    else:
        config, state = shipped_state()
        folder = write_folder(scratch / "builtin", config, state)
        note = "against what its 8-bit bundle holds, as the float32 weights are not here"
    author = Author(np.random.default_rng(0), load_concepts())
    form = FORMATS["seechat"]
    with sl.load() as model:
        tokenizer, eos = model.tokenizer, model.tokenizer.eos_id
        cases = []
        for _ in range(DIALOGUES):
            (said,) = author.without_picture()
            prompt = build(tokenizer, render(form, [Turn(said.question)]), {})
            cases.append(Case(prompt, [*tokenizer.encode(said.answer), eos]))
        pictures = sorted((ROOT / "docs/images").glob("*.png"))
        asked = [model.chat().prompt(q, image=p) for p in pictures for q in QUESTIONS]
    cases += sampled(network(config, state), asked)
    note += f"; {DIALOGUES} dialogues without a picture, {len(asked)} questions about docs/images"
    return Subject("the built-in model", config, state, folder, cases, note)


# --- running them -------------------------------------------------------------------------------


def network(config: LMConfig, state: dict[str, Tensor]) -> ChatGLM:
    with torch.device("meta"):
        model = ChatGLM(config)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def batches(cases: list[Case], size: int = 64) -> Iterator[list[Case]]:
    """Cases of similar lengths together."""
    order = sorted(cases, key=lambda c: len(c.prompt.ids) + len(c.answer))
    yield from (order[i : i + size] for i in range(0, len(order), size))


@torch.inference_mode()
def run(model: ChatGLM, cases: list[Case]) -> list[Tensor]:
    """The logits [1 + answer, vocab] from <sop> on, of each case."""
    c = model.config
    whole = [case.prompt.ids + case.answer for case in cases]
    length = max(map(len, whole))
    ids = torch.full((len(cases), length), c.pad_id)
    places = torch.zeros(len(cases), 2, length, dtype=torch.int64)
    for row, (case, sequence) in enumerate(zip(cases, whole, strict=True)):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        start = position_ids(
            case.prompt.ids, gmask_id=c.gmask_id, mask_id=c.mask_id, bos_id=c.bos_id
        )
        following = start[:, -1:] + [[0], [1]] * np.arange(1, len(case.answer) + 1)
        places[row, :, : len(sequence)] = torch.from_numpy(np.concatenate([start, following], 1))
    embeds = model.word_embeddings(ids)
    for row, case in enumerate(cases):
        for start, image in case.prompt.images:
            embeds[row, start : start + len(image)] = torch.from_numpy(image)
    context = [len(case.prompt.ids) - 1 for case in cases]
    states = model.hidden_states(embeds, places, mask=prefix_mask(torch.tensor(context), length))
    rows = zip(states[-1], context, cases, strict=True)
    return [model.lm_head(x[n : n + 1 + len(case.answer)]) for x, n, case in rows]


def sampled(model: ChatGLM, prompts: list[Prompt]) -> list[Case]:
    """Each prompt with an answer drawn from the model, to <eop> or ANSWER tokens."""
    generator = torch.Generator().manual_seed(0)
    cases = [Case(p, []) for p in prompts]
    for _ in range(ANSWER):
        going = [c for c in cases if model.config.eos_id not in c.answer]
        for batch in batches(going):
            for case, logits in zip(batch, run(model, batch), strict=True):
                chances = logits[-1].softmax(-1)
                case.answer.append(int(chances.multinomial(1, generator=generator)))
    return cases


def in_torch(model: ChatGLM, cases: list[Case]) -> list[Tensor]:
    """Logits [answer, vocab] that predict each token of each answer, case by case."""
    found = {}
    for batch in batches(cases):
        for case, logits in zip(batch, run(model, batch), strict=True):
            found[id(case)] = logits[:-1]
    return [found[id(case)] for case in cases]


def in_onnxruntime(folder: Path, cases: list[Case]) -> list[Tensor]:
    """The same from a bundle, by the kernels that its users run."""
    found = []
    with sl.load(folder, engine="onnx", device="cpu") as model:
        for case in cases:
            rows = [model.engine.prefill(case.prompt)]
            rows += [model.engine.step(token) for token in case.answer[:-1]]
            found.append(torch.from_numpy(np.stack(rows)))
    return found


def perplexity(cases: list[Case], found: list[Tensor]) -> float:
    """Of the answers, given the logits that predict them."""
    pairs = zip(cases, found, strict=True)
    losses = [
        F.cross_entropy(x.double(), torch.tensor(c.answer), reduction="none") for c, x in pairs
    ]
    return float(torch.cat(losses).mean().exp())


def compare(
    cases: list[Case],
    truth: list[Tensor],
    found: list[Tensor],
    *,
    precision: str,
    block: int,
    fit: str,
) -> Row:
    p, q = (torch.cat(x).double().log_softmax(-1) for x in (truth, found))  # [tokens, vocab]
    return Row(
        precision,
        block,
        fit,
        kl=float((p.exp() * (p - q)).sum(-1).mean()),
        top1=float((p.argmax(-1) == q.argmax(-1)).double().mean()),
        perplexity=perplexity(cases, found) - perplexity(cases, truth),
    )


def rows_of(subject: Subject, truth: list[Tensor], scratch: Path) -> Iterator[Row]:
    linears = [k for k, v in subject.state.items() if v.ndim == 2 and "embed" not in k]
    for precision in ("int8", "int4"):
        bits = PRECISIONS[precision].bits
        for block in BLOCK_SIZES:
            for fit, round_ in FITS.items():
                say(f"{subject.name}: {precision}, block {block}, {fit}")
                rounded = {k: round_(subject.state[k], bits, block) for k in linears}
                found = in_torch(network(subject.config, subject.state | rounded), subject.cases)
                yield compare(
                    subject.cases, truth, found, precision=precision, block=block, fit=fit
                )
            if block == MEASURED_BLOCK:
                say(f"{subject.name}: {precision}, block {block}, ONNX Runtime")
                out = scratch / f"{subject.name}-{precision}"
                export_bundle(lm=subject.folder, out=out, precision=precision, block_size=block)
                found = in_onnxruntime(out, subject.cases)
                fit = "ours, in ONNX Runtime"
                yield compare(
                    subject.cases, truth, found, precision=precision, block=block, fit=fit
                )


# --- a LLaMA against transformers ---------------------------------------------------------------

TEXT_BYTES, WINDOW, AT_ONCE = 20_000, 512, 128  # of English text; tokens read as one; rows at once
COMPARED = ("fp32", "int8", "int4")  # precisions
GREEDY, GREEDY_TOKENS = 20, 32  # answers compared to the last token


def english() -> str:
    """English text of this repository."""
    pages = (p.read_text("utf-8") for p in sorted((ROOT / "docs").glob("*.md")))
    return "".join(pages).encode()[:TEXT_BYTES].decode("utf-8", "ignore")


def llama_rows(folder: Path, scratch: Path) -> Iterator[str]:
    """Yield lines: of each precision, how far a bundle is from transformers' network.

    folder: a LLaMA as a Hugging Face folder.
    """
    from transformers import LlamaForCausalLM

    published = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    truth: list[Tensor] = []
    answers: list[list[int]] = []
    text = english()
    head = ("precision", "KL divergence", "top-1 agreement", "perplexity", "difference", "answers")
    yield f"| {' | '.join(head)} |"
    yield f"|---|{'---:|' * (len(head) - 1)}"
    for precision in COMPARED:
        out = scratch / precision
        export_bundle(lm=folder, out=out, precision=precision, block_size=32)
        with sl.load(out, context=WINDOW + 2, kept_cache=0) as model:
            ids = model.tokenizer.encode(text, specials=False)
            windows = [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW, WINDOW)]
            starts = [window[: 8 + i] for i, window in enumerate(windows * GREEDY)][:GREEDY]
            if not truth:
                with torch.inference_mode():
                    truth = [published(torch.tensor([w])).logits[0, :-1] for w in windows]
                    answers = [greedy_published(published, start) for start in starts]
            found = [read_all(model.engine, window) for window in windows]
            same = sum(
                greedy_ours(model.engine, start) == answer
                for start, answer in zip(starts, answers, strict=True)
            )
        sums = np.zeros(4)
        largest = 0.0
        for window, p, q in zip(windows, truth, found, strict=True):
            largest = max(largest, float((p - q).abs().max()))
            loss = F.cross_entropy(q.double(), torch.tensor(window[1:]), reduction="sum")
            p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
            kl = (p.exp() * (p - q)).sum()
            sums += [float(kl), float((p.argmax(-1) == q.argmax(-1)).sum()), float(loss), len(p)]
        kl, top1, loss = sums[:3] / sums[3]
        yield (
            f"| {precision} | {kl:.2e} | {top1:.2%} | {np.exp(loss):.4f} | {largest:.2g} | "
            f"{same} of {GREEDY} |"
        )


def read_all(engine: Engine, ids: list[int]) -> Tensor:
    """Logits [tokens - 1, vocab] that predict each token but the first."""
    rows = [engine.prefill(Prompt(ids[:1]))[None]]
    rows += [engine.extend(ids[i : i + AT_ONCE]) for i in range(1, len(ids) - 1, AT_ONCE)]
    return torch.from_numpy(np.concatenate(rows))[: len(ids) - 1]


def greedy_ours(engine: Engine, ids: list[int]) -> list[int]:
    logits, found = engine.prefill(Prompt(ids)), []
    for _ in range(GREEDY_TOKENS):
        found.append(int(logits.argmax()))
        logits = engine.step(found[-1])
    return found


def greedy_published(model: Any, ids: list[int]) -> list[int]:
    given = {"do_sample": False, "min_new_tokens": GREEDY_TOKENS, "max_new_tokens": GREEDY_TOKENS}
    found = model.generate(torch.tensor([ids]), eos_token_id=None, pad_token_id=0, **given)
    return found[0, len(ids) :].tolist()


# --- the table ----------------------------------------------------------------------------------


def cells(row: Row) -> tuple[str, ...]:
    name, block = row.precision, str(row.block)
    return name, block, row.fit, f"{row.kl:.2e}", f"{row.top1:.2%}", f"{row.perplexity:+.4f}"


def table(rows: list[Row]) -> list[str]:
    """A Markdown table that is aligned in plain text as well."""
    head = ("precision", "block", "fit", "KL divergence", "top-1 agreement", "perplexity")
    lines = [head, *map(cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    left = (0, 2)

    def line(texts: tuple[str, ...]) -> str:
        pairs = enumerate(zip(texts, widths, strict=True))
        return (
            "| " + " | ".join(t.ljust(w) if i in left else t.rjust(w) for i, (t, w) in pairs) + " |"
        )

    rule = (
        "|"
        + "|".join(
            "-" * (w + 2) if i in left else "-" * (w + 1) + ":" for i, w in enumerate(widths)
        )
        + "|"
    )
    return [line(head), rule, *map(line, lines[1:])]


INTRODUCTION = """# Faithfulness: what 8 and 4 bits cost

`{command}` on {machine}, {versions}.

- **KL divergence** of the next-token distribution from the unrounded model's, mean over all tokens
  of the answers, in nats (0: the same). **Top-1 agreement**: how often the likeliest token is the
  same. **Perplexity** of the answers, as the difference to the unrounded model's.
- **absmax** is plain rounding to nearest (RTN): the largest weight of a block decides its scale.
  **One step more** lets that weight take the end of the range that has one more step, as q4_0 of
  llama.cpp does. **Ours** is what `seechat export` writes: the scale of least squared error.
- Rows **in ONNX Runtime** come from an exported bundle, whose products also round their inputs to
  8 bits; all others from the torch network with rounded weights.
"""


def say(text: str) -> None:
    """What is being done, on one line of a terminal that is written over."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--builtin", type=Path, default=RECIPE / "work/lm", metavar="DIR")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/faithfulness.md")
    parser.add_argument("--llama", type=Path, metavar="DIR")
    parser.add_argument("--real", type=Path, metavar="GGUF", help="see real_lm.py")
    parser.add_argument("--methods", nargs="+", help="of --real: nearest, ours, llama.cpp")
    args = parser.parse_args()
    if args.real:
        from real_lm import METHODS, lines

        for line in lines(args.real, args.methods or METHODS):
            print(line, flush=True)
        return 0
    if args.llama:
        with tempfile.TemporaryDirectory() as name:
            for line in llama_rows(args.llama, Path(name)):
                print(line, flush=True)
        return 0
    packages = ("seechat-lite", "torch", "onnxruntime", "numpy")
    text = INTRODUCTION.format(
        command="python bench/faithfulness.py",
        machine=f"{platform.system()} {platform.machine()}",
        versions=", ".join(f"{p} {version(p)}" for p in packages),
    )
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        subjects = [reference(name, scratch) for name in ("chatglm_tiny", "chatglm_tiny28")]
        for subject in [*subjects, builtin(args.builtin, scratch)]:
            truth = in_torch(network(subject.config, subject.state), subject.cases)
            rows = list(rows_of(subject, truth, scratch))
            say("")
            tokens = sum(len(case.answer) for case in subject.cases)
            base = perplexity(subject.cases, truth)
            note = f"{tokens} tokens, perplexity unrounded {base:.4g}; {subject.note}."
            part = [f"## {subject.name}", "", *textwrap.wrap(note, 100), "", *table(rows)]
            print("\n".join(part), end="\n\n", flush=True)
            text += "\n" + "\n".join(part) + "\n"
    args.out.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
