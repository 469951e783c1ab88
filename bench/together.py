"""Measures what writing several answers together brings on this machine.

    python bench/together.py --model DIR steps        # a step of 1, 2, 4, 8 and 16 answers
    python bench/together.py --model DIR captions     # prompts of 290 tokens, answers of 48
    python bench/together.py --model DIR serve        # `seechat serve` with clients that ask on

Each compares with one answer at a time. Answers have no end but their limit. A full-size model of
random weights is written by `seechat bench --synthetic chatglm-6b`, which tells its folder.
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import psutil

from seechat_lite.chat import Model
from seechat_lite.cli.terminal import print_table
from seechat_lite.generate import Seat, decode, generate
from seechat_lite.lm_families import framed, ordinary_ids
from seechat_lite.loading import load
from seechat_lite.prompt import Prompt
from seechat_lite.sampling import Sampling
from seechat_lite.together import Together

CONTEXT = 512
NO_EOS = -1
QUESTION = "请用中文详细介绍一下你自己，并说明你能做什么、不能做什么，再举三个例子。"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", type=Path, help="a bundle; default: the built-in model")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    commands = parser.add_subparsers(dest="what", required=True)
    add = commands.add_parser("steps").add_argument
    add("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    add("--length", type=int, default=300, help="tokens in each cache")
    add("--repeat", type=int, default=12)
    for name in ("captions", "serve"):
        add = commands.add_parser(name).add_argument
        add("--batch", type=int, default=8, help="answers at once, or clients")
        add("--count", type=int, default=16 if name == "serve" else 8, help="answers in all")
        add("--prompt", type=int, default=290, help="tokens of a prompt (captions)")
        add("--tokens", type=int, default=48, help="tokens of an answer")
    args = parser.parse_args()
    print_table({"steps": steps, "captions": captions, "serve": serve}[args.what](args))


def opened(args: argparse.Namespace) -> Model:
    model = load(
        args.model, engine=args.engine, device=args.device, threads=args.threads, context=CONTEXT
    )
    if not model.engine.batches:  # of a synthetic one, remove the folder and write it anew
        raise SystemExit("this bundle's graph takes one answer at a time: export it again")
    return model


def prompt(model: Model, length: int, seed: int) -> Prompt:
    lm = model.manifest.lm
    words, around = ordinary_ids(lm), len(framed([], lm))
    drawn = np.random.default_rng([length, seed]).integers(words.start, words.stop, length - around)
    return Prompt(framed(drawn.tolist(), lm))


def steps(args: argparse.Namespace) -> dict[str, str]:
    """Steps of one answer and of several in turn, as a machine's speed may change."""
    found: dict[str, str] = {}
    with opened(args) as model:
        engine = model.engine
        most = engine.open_slots(max(args.rows), tokens=CONTEXT)
        slots = []
        while len(slots) < most:
            engine.prefill(prompt(model, args.length, len(slots)))
            slots.append(engine.adopt())
        engine.prefill(prompt(model, args.length, most))
        for rows in sorted((r for r in args.rows if r <= most), reverse=True):
            while len(slots) > rows:
                engine.free_slot(slots.pop())
            alone, together = [], []
            for i in range(args.repeat):
                alone.append(timed(partial(engine.step, 5 + i)))
                engine.rewind(1)
                tokens = {slot: 5 + i + slot for slot in slots}
                together.append(timed(partial(engine.step_slots, tokens)))
            one, took = statistics.median(alone[1:]), statistics.median(together[1:])
            found[f"a step of {rows}"] = (
                f"{took * 1e3:.0f} ms, {rows / took:.1f} tokens/s; of one by itself "
                f"{one * 1e3:.0f} ms, {1 / one:.1f} tokens/s: {rows * one / took:.2f} times"
            )
        found["resident"] = f"{psutil.Process().memory_info().rss / 1e9:.2f} GB"
    return found


def captions(args: argparse.Namespace) -> dict[str, str]:
    with opened(args) as model:
        engine = model.engine
        prompts = [prompt(model, args.prompt, n) for n in range(args.count)]

        def one_by_one() -> None:
            for each in prompts:
                tokens = generate(
                    engine,
                    each,
                    Sampling(),
                    max_new_tokens=args.tokens,
                    eos_id=NO_EOS,
                    stopped=lambda: False,
                )
                assert len(list(tokens)) == args.tokens
                engine.reset()

        def in_slots() -> None:
            slots = engine.open_slots(args.batch, tokens=args.prompt + args.tokens)
            together: Together[int] = Together(engine, slots)
            tasks = [
                together.join(lambda seat, p=each: work(seat, p, args.tokens)) for each in prompts
            ]
            while len(together):
                together.advance()
            engine.close_slots()
            assert [task.result for task in tasks] == [args.tokens] * args.count

        count = args.count
        together, alone = timed(in_slots), timed(one_by_one)
    return {
        "one by one": f"{count / alone:.3f} a second ({alone / count:.2f} s each)",
        f"{args.batch} at once": f"{count / together:.3f} a second, {alone / together:.2f} times",
    }


def work(seat: Seat, prompt: Prompt, tokens: int) -> Generator[None, None, int]:
    """Write one answer; returns how many tokens it has."""
    count = 0
    for token in decode(
        seat,
        prompt,
        Sampling(),
        max_new_tokens=tokens,
        eos_id=NO_EOS,
        stopped=lambda: False,
    ):
        if token is None:
            yield
        else:
            count += 1
    seat.reset()
    return count


def serve(args: argparse.Namespace) -> dict[str, str]:
    found, rates = {}, {}
    for slots in (1, args.batch):
        command = [sys.executable, "-m", "seechat_lite", "serve", "--port", "0", "--slots"]
        command += [str(slots), "--context", str(CONTEXT), "--threads", str(args.threads)]
        command += ["--engine", args.engine, "--device", args.device]
        command += ["--model", str(args.model)] if args.model else []
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert server.stdout
        address = server.stdout.readline().decode().strip()
        try:
            while httpx.get(f"{address}/health").status_code != 200:
                time.sleep(0.2)
            alone = ask(address, args.tokens, 0)
            if slots == 1:
                found["alone"] = f"{alone:.1f} tokens/s after the first"
            speeds: list[float] = []
            left = list(range(args.count))
            client = partial(ask_on, address, args.tokens, left, speeds)
            threads = [threading.Thread(target=client) for _ in range(args.batch)]
            start = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            seconds = time.perf_counter() - start
            rates[slots] = rate = args.count * args.tokens / seconds
            resident = psutil.Process(server.pid).memory_info().rss
            slowest, usual = min(speeds), statistics.median(speeds)
            found[f"{args.batch} clients, {slots} slots"] = (
                f"{rate:.1f} tokens/s, an answer {usual:.1f} after its first token (the slowest "
                f"{slowest:.1f}), {rate / rates[1]:.2f} times; resident {resident / 1e9:.2f} GB"
            )
        finally:
            server.terminate()
            server.wait()
    return found


def ask_on(address: str, tokens: int, left: list[int], speeds: list[float]) -> None:
    """One client: ask until nothing is left to ask."""
    while left:
        speeds.append(ask(address, tokens, left.pop()))


def ask(address: str, tokens: int, seed: int) -> float:
    """Ask something; returns tokens a second after the first."""
    body = {
        "messages": [{"role": "user", "content": f"{QUESTION}{seed}"}],
        "max_tokens": tokens,
        "temperature": 1,
        "seed": seed,
    }
    answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=600).json()
    try:
        return answer["timings"]["tokens_per_second"]
    except KeyError:
        raise SystemExit(json.dumps(answer)) from None


def timed(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
