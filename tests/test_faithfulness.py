"""bench/faithfulness.py: what it measures, on the tiny reference model."""

from pathlib import Path

import pytest
import torch

import faithfulness as bench


def test_absmax_by_hand() -> None:
    weight = torch.tensor([[-7.0, 3.4, 0.6, 8.0]])
    assert bench.absmax(weight, 4, 32)[0].tolist() == pytest.approx(
        [-6 * 8 / 7, 3 * 8 / 7, 1 * 8 / 7, 8.0]
    )
    one_more = bench.absmax(weight, 4, 32, one_more=True)  # 8 becomes -8 steps of -1
    assert one_more[0].tolist() == [-7.0, 3.0, 1.0, 8.0]


def test_our_scales_lose_less_than_absmax(tmp_path: Path) -> None:
    """In torch and as ONNX Runtime computes it: int4, whose differences are far beyond noise."""
    bench.BLOCK_SIZES, bench.ANSWER = (bench.MEASURED_BLOCK,), 4
    subject = bench.reference("chatglm_tiny", tmp_path)
    truth = bench.in_torch(bench.network(subject.config, subject.state), subject.cases)
    same = bench.compare(subject.cases, truth, truth, precision="fp32", block=0, fit="")
    assert (same.kl, same.top1, same.perplexity) == (0, 1, 0)
    rows = {(r.precision, r.fit): r for r in bench.rows_of(subject, truth, tmp_path)}
    best, measured = rows["int4", "ours"].kl, rows["int4", "ours, in ONNX Runtime"].kl
    assert best < rows["int4", "absmax, one step more"].kl < rows["int4", "absmax"].kl
    assert measured == pytest.approx(best, rel=0.1)
    assert rows["int8", "ours"].kl < 0.01 * best
