"""What the check of a written bundle lets through and what it does not."""

import numpy as np
import pytest
import torch
from torch import Tensor

from seechat_export.parity import compare
from seechat_weights.errors import BundleError

TOLERANCE = 0.5  # as for integers


def states(*, huge: float) -> Tensor:
    """A layer's states [1, 27, 64]: the first token is `huge` times longer than the others."""
    x = torch.randn(1, 27, 64, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= huge
    return x


@pytest.mark.parametrize("huge", [1, 50, 1000])
def test_any_token_that_is_wrong_is_noticed(huge: float) -> None:
    expected = states(huge=huge)
    other = torch.randn(64, generator=torch.Generator().manual_seed(1))
    for token in range(expected.shape[1]):
        found = expected.clone()
        found[0, token] = other * (huge if token == 0 else 1)
        with pytest.raises(BundleError, match=r"layer 3 graph differs"):
            compare("layer 3", found, expected, TOLERANCE)
        found[0, token, :] = np.nan
        with pytest.raises(BundleError):
            compare("layer 3", found, expected, TOLERANCE)


@pytest.mark.parametrize("huge", [1, 50, 1000])
def test_numbers_rounded_in_proportion_pass(huge: float) -> None:
    expected = states(huge=huge)
    noise = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    length = expected.norm(dim=-1, keepdim=True) / 8  # the root of the mean square
    found = expected + noise * length * TOLERANCE / 5
    report = compare("layer 3", found, expected, TOLERANCE)
    assert 0.5 < report["standard_deviation"] < 2
