"""Files made to mislead: each is refused in one line, runs nothing, takes little memory.

Every kind is read in a process of its own (hostile.py), the way the program would.
"""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from reference import data
from seechat_weights.files.reading import LFS_POINTER

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pipes, devices, getrusage")

MEMORY = 500_000_000  # bytes over what a sound file took
POINTER = LFS_POINTER + b"/spec/v1\noid sha256:00\nsize 1\n"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def ends(kind: str, sound: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """How reading each file of a folder ended, by its name; nothing may be left behind."""
    before = sorted(folder.iterdir())
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("hostile.py"), kind, sound, *before],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(folder.iterdir()) == before, "something was left behind, or run"
    return {Path(file).name: end for file, end in json.loads(done.stdout).items()}


def check(found: dict[str, dict[str, Any]], expected: dict[str, str]) -> None:
    assert found.keys() == expected.keys()
    for name, end in found.items():
        assert "SeechatError" in end["is"], (name, end)
        assert expected[name] in end["says"], (name, end)
        assert "\n" not in end["says"] and len(end["says"]) < 800, (name, end)
        assert end["took"] < MEMORY, (name, end)


# --- pickles


def archive(pickled: bytes, **storages: bytes) -> bytes:
    """A file as torch.save writes it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as z:
        z.writestr("x/data.pkl", pickled)
        for key, content in storages.items():
            z.writestr(f"x/data/{key.strip('_')}", content)
    return file.getvalue()


def tensor(shape: str, strides: str, *, offset: str = "K\0", count: str = "K\4") -> bytes:
    """The pickle of {"a": a tensor in storage 0}, sizes given in opcodes."""
    storage = f"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpu{count}tQ"
    body = f"({storage}{offset}({shape}t({strides}t\x89NtR"
    return b"\x80\x02}X\1\0\0\0a" + REBUILD + body.encode("latin-1") + b"s."


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def word(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


# a tensor of one number in storage 0, put into the memo at 2
SHARED = b"(" + word("storage") + b"ctorch\nFloatStorage\n" + word("0") + word("cpu") + b"K\1tQ"
SHARED = b"0" + REBUILD + b"(" + SHARED + b"K\0K\1\x85K\1\x85\x89NtRq\x020"


def modules(count: int, attributes: int, length: int) -> bytes:
    """TorchScript of `count` modules that share one state of so many tensors."""
    state = b"".join(word(f"{i}".ljust(length, "k")) + b"h\2" for i in range(attributes))
    made = b"".join(word(f"{i:x}") + b"h\1)\x81h\3b" for i in range(count))
    begin = b"\x80\2c__torch__.M\nA\nq\1" + SHARED + b"}q\3(" + state + b"u0"
    return archive(begin + b"h\1)\x81}(" + made + b"ub.", _0=bytes(4))


def chain(depth: int, length: int) -> bytes:
    """TorchScript of modules in one another, whose names are long."""
    begin = b"\x80\2c__torch__.M\nA\nq\1" + SHARED
    made = b"h\1)\x81}" + word("t") + b"h\2sb"
    for _ in range(depth):
        made = b"h\1)\x81}" + word("m" * length) + made + b"sb"
    return archive(begin + made + b".", _0=bytes(4))


def aliases(count: int, shape: bytes) -> bytes:
    """Many tensors in one storage that share a shape, in the memo at 3."""
    storage = b"(" + word("storage") + b"ctorch\nFloatStorage\n" + word("0") + word("cpu")
    begin = b"\x80\2" + shape + b"q\x030" + storage + b"K\1tQq\x040}("
    one = REBUILD + b"(h\4K\0h\3h\3\x89NtR"
    made = b"".join(word(f"{i}") + one for i in range(count))
    return archive(begin + made + b"u.", _0=bytes(4))


def laughs() -> bytes:
    """Tuples of one tuple twice, 60 deep, where sizes are expected: 2**60 of them, written out."""
    return aliases(1, b"K\1\x85" + b"q\5h\5\x86" * 60)


def pickles(canary: str) -> dict[str, tuple[bytes, str]]:
    legacy = io.BytesIO()
    torch.save({"a": Calls(eval, f"open({canary!r}, 'w')")}, legacy,
               _use_new_zipfile_serialization=False)  # fmt: skip
    nested = b"\x80\x04\x8c\x0aseechat_ok\x8c\x09os.system\x93."
    touch = f"X{chr(len(canary) + 6)}\0\0\0touch {canary}".encode("latin-1")
    lines = f"touch {canary}".encode()
    four = b"X\1\0\0\0a"
    return {
        "system": (archive(pickle.dumps({"a": Calls(os.system, f"touch {canary}")}, 2)),
                   "unsafe pickle, it calls posix.system"),
        "eval": (legacy.getvalue(), "unsafe pickle, it calls __builtin__.eval"),
        "popen": (archive(pickle.dumps(Calls(subprocess.Popen, ["touch", canary]), 4)),
                  "it calls subprocess.Popen"),
        "nested name": (archive(nested), "it calls seechat_ok.os.system"),
        "torch's own": (archive(b"\x80\x02ctorch.hub\nload\n" + touch + b"\x85R."),
                        "it calls torch.hub.load"),
        "instance": (archive(b"(S'" + lines + b"'\nios\nsystem\n."), "unsafe pickle, it calls"),
        "extension": (archive(b"\x80\x02\x82\x01."), "it calls code by EXT1"),
        "source code": (archive(b"\x80\x02(X\6\0\0\0moduleNNNtQ."), "a module with its source"),
        "other sizes": (archive(tensor("M\xff\xffM\xff\xff", "M\xff\xffK\1"), _0=bytes(16)),
                        "tensor a has shape"),
        "far away": (archive(tensor("K\1", "K\1", offset="J\xff\xff\xff\x7f"), _0=bytes(16)),
                     "tensor a has shape [1] from number 2147483647"),
        "before": (archive(tensor("K\1", "K\1", offset="J\xff\xff\xff\xff"), _0=bytes(16)),
                   "sizes that are no sizes"),
        "broadcast": (archive(tensor("J\0\0\0\x7f", "K\0"), _0=bytes(16)), "tensor a has shape"),
        "larger storage": (archive(tensor("K\1", "K\1", count="J\0\0\0\x7f"), _0=bytes(16)),
                           "the pickle says 2130706432 numbers"),
        "no storage": (archive(tensor("K\1", "K\1")), "is missing"),
        "a number of megabytes": (archive(b"\x80\x02\x8b" + struct.pack("<i", 20 << 20)
                                          + b"\x01" * (20 << 20) + b"."), "holds no tensors"),
        "endless": (archive(b"\x80\x02" + b"}" * 1_500_000 + b"."), "more than 1000000 steps"),
        "a string without end": (archive(b"\x80\x04\x8d" + struct.pack("<Q", 2**62)),
                                 "damaged, truncated"),
        "memo": (archive(b"\x80\x02}r\xff\xff\xff\x7f."), "holds no tensors"),
        "deep key": (archive(b"\x80\x02})" + b"\x85" * 900_000 + b"Ns."), "holds no tensors"),
        "own dictionary": (archive(b"\x80\x02}q\0" + four + b"h\0s."), "holds no tensors"),
        "twice": (archive(b"\x80\x02}" + four + b"Ns" + four + b"Ns."), "a is there twice"),
        "state of a function": (archive(b"\x80\x02" + REBUILD + b"}b."), "state for what"),
        "keys that meet": (archive(b"\x80\x02}(" + b"".join(
            b"\x8a\x0c" + (n * (2**61 - 1)).to_bytes(12, "little") + b"N" for n in range(1, 300_000)
        ) + b"u."), "holds no tensors"),
        "memos that meet": (archive(b"\x80\x02}" + b"".join(
            b"p%d\n" % (n * (2**61 - 1)) for n in range(1, 300_000)) + b"."), "a memo at 2305843"),
        "names of megabytes": (archive(
            b"\x80\x04X\x09\0\0\0omegaconf\x94X" + struct.pack("<I", 16 << 20) + b"A" * (16 << 20)
            + b"\x94" + b"h\0h\1\x930" * 100_000 + b"N."), "unsafe pickle, it calls omegaconf.AAA"),
        "shared state": (modules(8000, 8000, 20), "more than 65536 attributes of modules"),
        "shared state of long names": (modules(100, 600, 20_000), "without a proper name"),
        "modules in modules": (chain(30, 4000), "without a proper name"),
        "many names of one tensor": (aliases(70_000, b"K\1\x85"), "holds 70000 tensors"),
        "many of a shape without end": (aliases(20_000, b"(" + b"K\1" * 200_000 + b"t"),
                                        "200000 dimensions"),
        "laughs": (laughs(), "sizes that are no sizes"),
        "called text": (archive(b"\x80\x02" + four + b")R."), "calls what is no class"),
    }  # fmt: skip


def test_pickles(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    cases = pickles(str(tmp_path / "canary"))
    for name, (content, _) in cases.items():
        (folder / name).write_bytes(content)
    found = ends("checkpoint", data("vision/checkpoint_100.pth"), folder)
    check(found, {name: message for name, (_, message) in cases.items()})
    assert not (tmp_path / "canary").exists()


# --- zip archives


def zips() -> dict[str, tuple[bytes, str]]:
    sound = io.BytesIO()
    torch.save({"a": torch.arange(4.0), "b": torch.ones(40)}, sound)
    good = sound.getvalue()
    directory = good.index(b"PK\1\2")
    end = good.rindex(b"PK\5\6")
    ones = good.index(b"PK\1\2", good.index(b"data/1", directory) - 60)
    pickled = archive(tensor("K\4", "K\1"), _0=bytes(16))

    def patched(at: int, form: str, *values: int) -> bytes:
        content = bytearray(good)
        struct.pack_into("<" + form, content, at, *values)
        return bytes(content)

    def compressed(name: str) -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as z:
            with z.open(name, "w", force_zip64=True) as entry:
                for _ in range(600):
                    entry.write(bytes(1 << 20))
            if not name.endswith("data.pkl"):
                z.writestr(zipfile.ZipInfo("x/data.pkl"), tensor("K\4", "K\1"))
        return file.getvalue()

    def many() -> bytes:
        entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", *[0] * 6, *[0] * 3, 2, *[0] * 4, 0, 0)
        listed = (entry + b"ab") * 300_000
        last = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 65535, 65535, len(listed), 4, 0)
        return b"PK\3\4" + listed + last

    two = io.BytesIO(pickled)
    with zipfile.ZipFile(two, "a") as z:
        z.writestr("y/data.pkl", b"N.")
    return {
        "bomb for a pickle": (compressed("x/data.pkl"), "0 uncompressed data.pkl"),
        "bomb for a tensor": (compressed("x/data/0"), "is missing"),
        "absurd size": (patched(ones + 20, "II", 0xFFFFFFF0, 0xFFFFFFF0), "larger than its place"),
        "absurd place": (patched(ones + 42, "I", 0xFFFFFFF0), "overlaps or has no header"),
        "overlap": (patched(ones + 42, "I", 0), "overlaps or has no header"),
        "encrypted": (patched(ones + 8, "H", 2049), "is missing"),
        "sizes that differ": (patched(ones + 24, "I", 2**31), "larger than its place"),
        "truncated": (good[:directory], "no zip archive"),
        "half": (good[: len(good) // 2], "no zip archive"),
        "end alone": (good[:30] + good[end:], "no zip archive"),
        "directory of gigabytes": (pickled[:-10] + b"\xff" * 4 + pickled[-6:], "no zip archive"),
        "300000 entries": (many(), "a table of contents of"),
        "two pickles": (two.getvalue(), "with 2 uncompressed data.pkl"),
        "entry twice": (good.replace(b"data/1", b"data/0"), "an entry twice"),
        "a changed byte": (good.replace(struct.pack("<f", 3), struct.pack("<f", 5)), "checksum"),
        "big endian": (good.replace(b"little", b"bigbig"), "another byte order"),
        "only the beginning": (b"PK\3\4", "no zip archive"),
    }  # fmt: skip


def test_zip_archives(tmp_path: Path) -> None:
    cases = zips()
    for name, (content, _) in cases.items():
        (tmp_path / name).write_bytes(content)
    found = ends("checkpoint", data("vision/checkpoint_100.pth"), tmp_path)
    check(found, {name: message for name, (_, message) in cases.items()})


# --- safetensors


def safetensors(header: Any, size: int = 16, *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(size)


def entry(shape: list[Any], offsets: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS: dict[str, tuple[bytes, str]] = {
    "longer than the file": (safetensors({}, length=10**6), "a header of 1000000 bytes"),
    "absurdly long": (safetensors({}, length=2**63), "a header of"),
    "no json": (safetensors(b"{" + b"[" * 99), "not valid JSON"),
    "deep": (safetensors(b'{"a":' + b"[" * 200_000), "not valid JSON"),
    "a list": (safetensors(b'{"a": [4]}'), "without dtype, shape and data_offsets"),
    "twice": (safetensors(b'{"a": {}, "a": {}}'), "a is there twice"),
    "past the end": (safetensors({"a": entry([400], [0, 1600])}), "described in a file of"),
    "overlapping": (
        safetensors({"a": entry([4], [0, 16]), "b": entry([3], [4, 16])}),
        "tensor b overlapping another",
    ),
    "a gap": (safetensors({"a": entry([2], [8, 16])}), "after a gap"),
    "more than described": (safetensors({"a": entry([2], [0, 8])}), "bytes described in a file"),
    "shape and bytes": (safetensors({"a": entry([5], [0, 16])}), "of shape [5] in 16 bytes"),
    "negative": (safetensors({"a": entry([-2, -2], [0, 16])}), "sizes that are no sizes"),
    "overflow": (safetensors({"a": entry([2**33, 2**33], [0, 16])}), "in 16 bytes"),
    "not whole": (safetensors({"a": entry([4.0], [0, 16])}), "sizes that are no sizes"),
    "empty but huge": (
        safetensors({"a": entry([0] + [2**47] * 3, [0, 0])}, 0),
        "of shape [0, 1407",
    ),
    "64 dimensions": (safetensors({"a": entry([1] * 64, [0, 4])}, 4), "64 dimensions"),
    "2000000 dimensions": (
        safetensors({"a": entry([1] * 2_000_000, [0, 4])}, 4),
        "of 2000000 dimensions",
    ),
    "a dtype of lists": (safetensors({"a": entry([4], [0, 16], [["F32"]])}), "which is not known"),
    "unknown dtype": (safetensors({"a": entry([4], [0, 16], "Q4")}), "of dtype Q4"),
    "name that commands": (safetensors({"\x1b[2J\n": entry([4], [0, 16])}), "is called"),
    "name without end": (safetensors({"a" * 9999: entry([4], [0, 16])}), "is called aaaa"),
    "nothing": (safetensors({}, 0), "holds no tensors"),
    "many empty ones": (
        safetensors({f"{i}": entry([0], [0, 0]) for i in range(70_000)}, 0),
        "holds 70000 tensors",
    ),
}


def test_safetensors_headers(tmp_path: Path) -> None:
    for name, (content, _) in HEADERS.items():
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    found = ends("checkpoint", data("chatglm_tiny/model.safetensors"), tmp_path)
    expected = {f"{name}.safetensors": message for name, (_, message) in HEADERS.items()}
    check(found, expected)


# --- JSON: a configuration, an index, a manifest

TEXTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "pointer": (POINTER, "Git LFS pointer"),
    "deep": (b'{"a":' + b"[" * 500_000, "not valid JSON"),
    "deep objects": (b'{"a":' * 500_000, "not valid JSON"),
    "megabytes": (b'{"a": [' + b"{}," * 4_000_000 + b"{}]}", "more than 8388608 bytes"),
    "many objects": (b'{"a": [' + b"{}," * 2_500_000 + b"{}]", "not valid JSON"),
    "twice": (b'{"vocab_size": 1, "vocab_size": 2}', "vocab_size is there twice"),
    "nan": (b'{"layernorm_epsilon": NaN}', "NaN is no JSON number"),
    "a number without end": (b'{"a": ' + b"9" * 100_000 + b"}", "not valid JSON"),
    "no text": (b'{"a": "\xff\xfe"}', "not valid JSON"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "not valid JSON"),
    "a list": (b"[1]", "holds a JSON list"),
    "zeros": (bytes(1000), "not valid JSON"),
}
INDEXES: dict[str, tuple[Any, str]] = {
    "no map": ({}, 'lacks "weight_map"'),
    "a list for a map": ({"weight_map": ["a.bin"]}, 'lacks "weight_map"'),
    "numbers for names": ({"weight_map": {"a": 1}}, 'lacks "weight_map"'),
    "a list for a name": ({"weight_map": {"a": ["a.bin"]}}, 'lacks "weight_map"'),
    "outside": ({"weight_map": {"a": "../outside.bin"}}, "names the file ../outside.bin"),
    "absolute": ({"weight_map": {"a": "/etc/passwd"}}, "names the file /etc/passwd"),
    "on windows": ({"weight_map": {"a": "c:\\secret.bin"}}, "names the file c:\\secret.bin"),
    "itself": ({"weight_map": {"a": "."}}, "names the file ."),
    "null": ({"weight_map": {"a": "a\0.bin"}}, "names the file"),
    "a very long name": ({"weight_map": {"a": "a" * 5000}}, "names the file aaaa"),
    "missing": ({"weight_map": {"a": "absent.bin"}}, "absent.bin: missing"),
    "a name too long for a disk": ({"weight_map": {"a": "图" * 200}}, "图: missing"),
}


def test_json(tmp_path: Path) -> None:
    for name, (content, _) in TEXTS.items():
        (tmp_path / name).write_bytes(content)
    for name, (index, _) in INDEXES.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    found = ends("json", data("chatglm_tiny/config.json"), tmp_path)
    check(found, {name: message for name, (_, message) in (TEXTS | INDEXES).items()})


# --- tokenizers


def field(number: int, content: bytes) -> bytes:
    """A length-delimited field of a protocol buffer."""
    size, length = b"", len(content)
    while length > 127:
        size += bytes([length & 127 | 128])
        length >>= 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + content


def test_tokenizers(tmp_path: Path) -> None:
    good = data("tokenizer/variant_identity.model").read_bytes()
    files = {
        "empty": (b"", "no sentencepiece model"),
        "pointer": (POINTER, "Git LFS pointer"),
        "text": ("你好".encode() * 99, "no sentencepiece model"),
        "zeros": (bytes(10_000), "no sentencepiece model"),
        "half": (good[: len(good) // 2], "no sentencepiece model"),
        "all but the end": (good[:-1], "no sentencepiece model"),
        "a length beyond the file": (b"\x0a\xff\xff\xff\xff\x07" + good, "no sentencepiece model"),
        "one piece": (field(1, field(1, b"<unk>") + b"\x18\x02"), "expected"),
        "no special tokens": (good.replace(b"[gMASK]", b"[gMUSK]"), "[gMASK]"),
        "other bytes in a piece": (good.replace(b"[gMASK]", b"\xff\xfe\xff\xfe\xff\xfe\xff"), ""),
        "deep": (b"\x0a\x7f" * 100_000, "no sentencepiece model"),
        "a pickle": (pickle.dumps({"a": 1}), "no sentencepiece model"),
    }
    for name, (content, _) in files.items():
        (tmp_path / name).write_bytes(content)
    special = places(tmp_path)
    found = ends("tokenizer", data("tokenizer/variant_identity.model"), tmp_path)
    check(found, {name: message for name, (_, message) in files.items()} | special)


def places(folder: Path) -> dict[str, str]:
    """What is no file, and a file too large to be one; none of them is waited for or read."""
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "broken").symlink_to("absent")
    (folder / "device").symlink_to("/dev/zero")
    with (folder / "gigabytes").open("wb") as f:
        f.truncate(5 << 30)
    return dict.fromkeys(("folder", "pipe", "loop", "broken", "device", "gigabytes"), "expected")


def test_what_is_no_checkpoint_file(tmp_path: Path) -> None:
    expected = places(tmp_path)
    (tmp_path / "shard").mkdir()
    (tmp_path / "shard" / "model.safetensors").mkdir()
    (tmp_path / "pipes").mkdir()
    os.mkfifo(tmp_path / "pipes" / "pytorch_model.bin")
    (tmp_path / "loops").mkdir()
    (tmp_path / "loops" / "pytorch_model.bin").symlink_to("pytorch_model.bin")
    (tmp_path / "numbered").mkdir()
    (tmp_path / "numbered" / "pytorch_model-00001-of-99999999999.bin").write_bytes(b"x")
    expected |= dict.fromkeys(("shard", "pipes", "loops", "numbered"), "expected")
    check(ends("checkpoint", data("vision/checkpoint_100.pth"), tmp_path), expected)


# --- pictures


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    content = b"\x89PNG\r\n\x1a\n"
    for name, body in chunks:
        body = name + body
        content += struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return content


def header(width: int, height: int, *, depth: int = 8, colour: int = 6) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)


def test_pictures(tmp_path: Path) -> None:
    good = data("images/02_rgba.png").read_bytes()
    bomb = zlib.compress(bytes(200 << 20), 9)
    row = (b"IDAT", zlib.compress(bytes(17)))
    files = {
        "empty": (b"", "empty"),
        "pointer": (POINTER, "Git LFS pointer"),
        "text": (b"hello" * 100, "not a picture"),
        "half": (good[: len(good) // 2], "damaged or truncated"),
        "only a header": (good[:33], "damaged or truncated"),
        "gigapixels": (png(header(60_000, 60_000), row, (b"IEND", b"")), "60000×60000 pixels"),
        "a long line": (png(header(2**31 - 1, 1), row, (b"IEND", b"")), "pixels"),
        "no pixels": (png(header(0, 4), row, (b"IEND", b"")), ""),
        "no such depth": (png(header(4, 4, depth=7), row, (b"IEND", b"")), ""),
        "too little data": (png(header(9, 9), (b"IDAT", row[1][:-5]), (b"IEND", b"")), "damaged"),
        "wrong checksum": (good.replace(b"IDAT", b"IDAt", 1), "damaged or truncated"),
        "too little data after a text bomb": (
            png(header(9, 9), (b"zTXt", b"a\0\0" + bomb), row, (b"IEND", b"")),
            "damaged or truncated",
        ),
        "vector": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "vector"),
        "gif of gigapixels": (b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b";", ""),
    }
    for name, (content, _) in files.items():
        (tmp_path / name).write_bytes(content)
    special = places(tmp_path)
    found = ends("picture", data("images/02_rgba.png"), tmp_path)
    check(found, {name: message for name, (_, message) in files.items()} | special)


def test_the_largest_pictures(tmp_path: Path) -> None:
    """Small files that are decoded to as many pixels as are allowed."""
    for name, depth, colour, size in (("16 bits", 16, 0, 2), ("transparent", 8, 6, 4)):
        pack, side = zlib.compressobj(1), 10_580
        lines = b"".join(pack.compress(bytes(1 + side * size)) for _ in range(side)) + pack.flush()
        chunks = header(side, side, depth=depth, colour=colour), (b"IDAT", lines), (b"IEND", b"")
        (tmp_path / name).write_bytes(png(*chunks))
    for name, end in ends("picture", data("images/02_rgba.png"), tmp_path).items():
        assert end["says"] == "was read" and end["took"] < MEMORY, (name, end)
