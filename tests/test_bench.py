"""What `seechat bench` reports; how fast it is, is no test's business."""

import dataclasses
import json
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest

from reference import data
from seechat_lite import benchmark as bench
from seechat_lite.cli import bench as command_bench
from seechat_lite.cli import main as cli
from seechat_lite.engines.onnx.memory import bundle_plan as plan
from seechat_lite.loading import load
from seechat_lite.prompt import Prompt
from seechat_weights.bundle.manifest import read_manifest
from seechat_weights.config import LMConfig


def test_the_report_is_whole_and_its_sums_are_right(vision_bundle: Path) -> None:
    report = bench.measure(vision_bundle, options={"context": 300}, repeat=1, turns=3)
    manifest = read_manifest(vision_bundle)
    assert list(report.prefill) == list(report.decode) == [32, 225, 256]
    assert list(report.together) == list(bench.TOGETHER)
    assert report.not_measured == [] and report.runs == {"32": 1, "225": 1, "256": 1}
    assert report.kernels and set(report.instructions) <= bench.processor._INSTRUCTIONS.keys()
    lm = manifest.lm
    step = 2 * lm.num_layers * lm.hidden_size * (256 - 32) * 4  # float32 keys and values
    assert report.token_bytes[256] - report.token_bytes[32] == step
    assert report.planned_memory == plan(manifest, context=300).total
    for value in (report.load, report.first_token, report.encode_image, report.bandwidth):
        assert value
        assert np.isfinite(value)
        assert value > 0
    assert report.peak_memory >= max(report.turns) > 10e6
    assert len(report.turns) == 3
    if sys.platform == "linux":
        assert report.peak_anonymous and report.anonymous_memory
        assert 10e6 < report.peak_anonymous < report.peak_memory
        assert {"resident", "anonymous", "planned"} <= bench.rows(report).keys()
    share = report.token_bytes[32] / report.decode[32] / report.bandwidth
    assert report.roofline(32) == pytest.approx(share)
    assert json.loads(json.dumps(dataclasses.asdict(report)))["precision"] == report.precision


def test_a_slow_machine_measures_less_instead_of_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing begins that would last beyond the limit; what was never measured is named."""
    clock = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    for speed, measured in ((0.01, 3), (0.1, 3), (0.5, 2), (50.0, 1)):  # seconds a token
        clock[0] = 0.0
        said: list[float | None] = []

        def run(number: int, tokens: int = 0, speed: float = speed) -> dict[str, list[float]]:
            clock[0] += tokens * speed
            return {f"prefill {tokens}": [tokens * speed]}

        stages = [
            bench.Stage(f"{n} tokens", lambda number, n=n: run(number, n), n) for n in bench.PROMPTS
        ]
        rounds = bench.Rounds(stages, 3, limit=200.0, say=lambda _, left, to=said: to.append(left))
        rounds.run()
        # a stage whose length is not known yet is the only one that may outlast it: the shortest
        assert clock[0] <= max(200.0, speed * bench.PROMPTS[0])
        assert all(left is None or 0 <= left <= 200 for left in said)
        for n in bench.PROMPTS:
            missing = f"{n} tokens" in rounds.skipped
            assert (rounds.median(f"prefill {n}") is None) == missing
        assert rounds.skipped == [f"{n} tokens" for n in bench.PROMPTS[measured:]]


def test_the_processor_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the system says, or by numpy; kernels are the best of what there is."""
    processor = bench.processor
    arm = {"Features": "fp asimd asimddp i8mm"}
    for said, expected, kernel in (
        ({"flags": "avx2 fma"}, ["AVX2"], "AVX2"),
        (
            {"flags": "avx2 avx512f avx512bw avx512_vnni amx_int8"},
            ["AVX2", "AVX-512", "AVX-512 VNNI", "AMX int8"],
            "AVX-512 VNNI",
        ),
        (arm, ["NEON", "NEON dot product", "NEON int8 matrices"], "NEON int8 matrices"),
        ({"flags": "sse2"}, [], "portable code"),
    ):
        monkeypatch.setattr(processor, "_cpuinfo", lambda said=said: said)
        assert processor.instructions() == expected
        assert processor.kernels(4, expected).endswith(f"by {kernel}")
    monkeypatch.setattr(processor, "_cpuinfo", dict)
    assert processor.name() and set(processor.instructions()) <= processor._INSTRUCTIONS.keys()


def test_the_command_prints_a_table_or_one_json_line(text_bundle: Path) -> None:
    command = [sys.executable, "-m", "seechat_lite", "bench", "--model", text_bundle]
    command += ["--context", "64", "--repeat", "1"]
    table = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "prefill 32 " in table.stdout
    assert "picture" not in table.stdout  # a text-only bundle
    assert table.stderr == ""
    line = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert line.stdout.count("\n") == 1
    assert json.loads(line.stdout)["encode_image"] is None


@pytest.mark.torch
def test_the_torch_engine_is_called_by_its_name(capfd: pytest.CaptureFixture[str]) -> None:
    """Published weights as well; no share of a bandwidth that they may not be read with."""
    command = ["bench", "--model", str(data("chatglm_tiny")), "--engine", "torch", "--json"]
    assert cli.main([*command, "--device", "cpu", "--context", "64", "--repeat", "1"]) == 0
    report = bench.Report(**json.loads(capfd.readouterr().out))
    assert report.engine.startswith("torch ") and report.precision == "as published"
    assert (report.device, report.dtype) == ("cpu", "auto")
    shown = bench.rows(report)
    assert shown["engine"] == f"{report.engine}, device cpu, dtype auto"
    assert shown["decode at 32"].endswith(" ms)")
    assert not {"bandwidth", "planned"} & shown.keys()


@pytest.mark.export
def test_a_synthetic_model_is_written_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The command writes it to the cache folder and finds it there again, in today's layout."""
    small = LMConfig(vocab_size=130528, hidden_size=16, num_layers=1, num_heads=2, inner_size=48)
    (entry,) = entry_points(group="seechat.synthetic", name="chatglm-6b")
    write = entry.load()

    class Small:
        def load(self) -> object:
            return lambda folder, **options: write(folder, shape=small, **options)

    monkeypatch.setattr(command_bench, "entry_points", lambda group, name: [Small()])
    monkeypatch.setenv("SEECHAT_CACHE", str(tmp_path))
    (tmp_path / "chatglm-6b-int4-2").mkdir()  # of a version whose bundles had one graph
    command = ["bench", "--synthetic", "chatglm-6b", "--layers", "2", "--context", "64"]
    for precision in ("int4", "int8", "fp16"):
        for said in ("writing random weights", ""):
            assert cli.main([*command, "--precision", precision, "--repeat", "1", "--json"]) == 0
            out, err = capfd.readouterr()
            assert err.startswith(said) if said else err == ""
        assert json.loads(out)["precision"] == precision
        manifest = read_manifest(tmp_path / f"chatglm-6b-{precision}-2-v{command_bench.LAYOUT}")
        assert manifest.lm == replace(small, num_layers=2)
    assert not caplog.records
    assert cli.main([*command, "--dtype", "fp16", "--repeat", "1"]) == 0  # has that graph
    assert ", device auto, dtype fp16\n" in capfd.readouterr().out
    assert ["fp16 on the CPU is slower" in r.message for r in caplog.records] == [True]
    with load(tmp_path / f"chatglm-6b-int4-2-v{command_bench.LAYOUT}", context=64) as model:
        ids = [*range(5, 30), small.gmask_id, small.bos_id]
        logits = model.engine.prefill(Prompt(ids))
    assert 0.5 < logits.std() < 8  # near unit scale: neither vanishing nor exploding
