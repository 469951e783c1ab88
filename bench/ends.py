"""Ends at random moments: close(), stop(), clear(), the interpreter's exit, SIGTERM.

python bench/ends.py --moments 500

Each moment is another thread's, while an answer runs. A crash, a hang or an odd exit code is told
and makes this exit with 1. Printed at the end: how many of each kind, and how the memory of the
processes that live on has grown (resident, after the first fifth of their moments and at the end).
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from random import Random

import psutil

import seechat_lite as sl

PANDA = str(Path(__file__).parent.parent / "docs/images/panda.png")
LONG = "tell 详细 " * 60
LIVING = ("close", "stop", "clear")
PATIENCE = 120  # seconds
TALKS = f"""
import sys, threading, time, seechat_lite as sl
model = sl.load(engine=sys.argv[1])
def work():
    while True:
        for _ in model.chat().stream({LONG!r}, {PANDA!r}, temperature=1.0): pass
for _ in range(2): threading.Thread(target=work, daemon=True).start()
time.sleep(float(sys.argv[2]))
"""


def living(kind: str, moments: int, seed: int) -> None:
    """`moments` in this process, and its memory as JSON on stdout."""
    random, memory = Random(seed), []
    model = sl.load()
    for i in range(moments):
        chats = [model.chat(), model.chat()]
        ended: Counter[str] = Counter()

        def work(chat: sl.Chat, seed: int, ended: Counter[str] = ended) -> None:
            try:
                for _ in chat.stream(LONG, PANDA, temperature=1.0, seed=seed):
                    pass
                ended["whole"] += 1
            except sl.EngineError as e:
                ended[str(e)] += 1

        threads = [threading.Thread(target=work, args=(c, i)) for c in chats]
        for thread in threads:
            thread.start()
        time.sleep(random.random() * 0.3)
        if kind == "close":
            model.close()
        for chat in chats if kind == "clear" else []:
            chat.clear()
            time.sleep(random.random() * 0.05)
        for chat in chats:
            chat.stop()
        for thread in threads:
            thread.join(PATIENCE)
            if thread.is_alive():
                raise SystemExit(f"{kind}, moment {i}: hangs")
        if kind == "close":
            model = sl.load()
        if i in (moments // 5, moments - 1):
            memory.append(psutil.Process().memory_info().rss)
    print(json.dumps(memory))


def dying(kind: str, engine: str, seconds: float) -> str:
    """ "" or what was wrong with a process that ends after so many seconds."""
    argv = [sys.executable, "-c", TALKS, engine, str(seconds if kind == "exit" else 1000)]
    if kind == "SIGTERM":
        argv = [sys.executable, "-m", "seechat_lite", "serve", "--port", "0"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        if kind == "SIGTERM":
            time.sleep(seconds * 4)
            process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        return "hangs"
    # before its handler is there, the signal itself ends a server
    right = (0,) if kind == "exit" else (0, -signal.SIGTERM)
    if process.returncode in right and "Traceback" not in err:
        return ""
    return f"exit code {process.returncode}: {err[-200:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description="End at random moments.")
    parser.add_argument("--moments", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--living", choices=LIVING, help=argparse.SUPPRESS)
    args = parser.parse_args()
    each = max(args.moments // 5, 5)
    if args.living:
        living(args.living, each, args.seed)
        return 0
    random, wrong = Random(args.seed), 0
    for kind in LIVING:
        own = ["--moments", str(args.moments), "--living", kind, "--seed", str(args.seed)]
        done = subprocess.run(
            [sys.executable, __file__, *own], capture_output=True, text=True, env=dict(os.environ)
        )
        bad = done.returncode != 0
        wrong += bad
        grown = (
            ""
            if bad
            else "resident {:.0f} to {:.0f} MB".format(*(n / 1e6 for n in json.loads(done.stdout)))
        )
        print(kind, each, done.stderr[-300:] if bad else grown, flush=True)
    for kind in ("exit", "SIGTERM"):
        said = [dying(kind, "onnx", random.random() * 0.6) for _ in range(each)]
        wrong += sum(map(bool, said))
        print(kind, each, dict(Counter(filter(None, said))) or "all right", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
