"""What `seechat bench` reports; how fast it is, is no test's business."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from seechat_lite import bench
from seechat_lite.memory import plan
from seechat_weights.bundle import read_manifest


def test_the_report_is_whole_and_its_sums_are_right(vision_bundle: Path) -> None:
    report = bench.measure(vision_bundle, context=300, repeat=1)
    manifest = read_manifest(vision_bundle)
    assert list(report.prefill) == [32, 128]
    assert list(report.decode) == [32, 256]
    lm = manifest.lm
    step = 2 * lm.num_layers * lm.hidden_size * (256 - 32) * 4  # float32 keys and values
    assert report.token_bytes[256] - report.token_bytes[32] == step
    assert report.planned_memory == plan(manifest, context=300).total
    for value in (report.load, report.first_token, report.encode_image, report.bandwidth):
        assert value
        assert np.isfinite(value)
        assert value > 0
    assert report.peak_memory > 10e6
    share = report.token_bytes[32] / report.decode[32] / report.bandwidth
    assert report.roofline(32) == pytest.approx(share)
    assert json.loads(json.dumps(dataclasses.asdict(report)))["precision"] == report.precision


def test_the_command_prints_a_table_or_one_json_line(text_bundle: Path) -> None:
    command = [sys.executable, "-m", "seechat_lite", "bench", "--model", text_bundle]
    command += ["--context", "64", "--repeat", "1"]
    table = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "prefill 32 " in table.stdout
    assert "picture" not in table.stdout  # a text-only bundle
    assert table.stderr == ""
    line = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=120)
    assert line.stdout.count("\n") == 1
    assert json.loads(line.stdout)["encode_image"] is None
