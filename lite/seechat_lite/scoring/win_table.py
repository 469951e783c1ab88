"""Counts how methods compare, from the score of every caption of every picture.

The published chart of SEEChat counts in the same way, as far as its sums tell: each picture is
won by the one method with the highest score, so that all shares are 100 % together. Such a share
depends on who else takes part, and two methods that write alike split it. So pairs are counted too.
"""

from dataclasses import dataclass

import numpy as np

TIE = 1e-6  # of a cosine; rounding makes smaller differences between equal captions
SAMPLES = 2000  # of the bootstrap
MOST_DRAWN = 50_000_000  # pictures drawn in all samples together; more pictures, fewer samples
INTERVAL = (2.5, 97.5)  # percentiles


@dataclass(frozen=True)
class WinTable:
    """How methods compare. All shares are of 1; intervals are [2, ...], low and high.

    pictures: how many were counted.
    wins: the share of pictures that each method wins, [methods].
    means: the mean cosine of each method's captions, [methods].
    pairs: [methods, methods]: how often the row's method beats the column's; ties count half.
    wins_between, means_between, pairs_between: 95 % intervals of these.
    samples: of the bootstrap.
    seed: of its drawings.
    """

    pictures: int
    wins: np.ndarray
    means: np.ndarray
    pairs: np.ndarray
    wins_between: np.ndarray
    means_between: np.ndarray
    pairs_between: np.ndarray
    samples: int
    seed: int


def win_table(scores: np.ndarray, *, seed: int = 0, samples: int = SAMPLES) -> WinTable:
    """Compare methods.

    scores: cosines, [pictures, methods]; one picture and one method at least.
    seed: of the bootstrap, which draws pictures with replacement.
    samples: how often it draws; fewer for very many pictures.
    """
    scores = np.asarray(scores, np.float64)
    pictures, methods = scores.shape
    counted = np.concatenate(  # [pictures, methods + methods + methods**2]
        [picture_wins(scores), scores, picture_pairs(scores).reshape(pictures, -1)], axis=1
    )
    samples = max(min(samples, MOST_DRAWN // pictures), 100)
    random = np.random.default_rng(seed)
    drawn = np.empty((samples, counted.shape[1]))
    for sample in drawn:
        times = np.bincount(random.integers(pictures, size=pictures), minlength=pictures)
        sample[:] = times @ counted / pictures
    ends = [methods, 2 * methods]
    wins, means, pairs = np.split(counted.mean(0), ends)
    between = np.split(np.percentile(drawn, INTERVAL, axis=0), ends, axis=1)
    square = (methods, methods)
    return WinTable(
        pictures=pictures,
        wins=wins,
        means=means,
        pairs=pairs.reshape(square),
        wins_between=between[0],
        means_between=between[1],
        pairs_between=between[2].reshape(2, *square),
        samples=samples,
        seed=seed,
    )


def picture_wins(scores: np.ndarray) -> np.ndarray:
    """What each method wins of each picture: 1 for the highest score; those that tie share it.

    scores: [pictures, methods].
    """
    best = scores >= scores.max(1, keepdims=True) - TIE
    return best / best.sum(1, keepdims=True)


def picture_pairs(scores: np.ndarray) -> np.ndarray:
    """Who beats whom on each picture, [pictures, methods, methods]: 1, 0, or 1/2 for a tie.

    scores: [pictures, methods].
    """
    difference = scores[:, :, None] - scores[:, None, :]
    return np.where(np.abs(difference) <= TIE, 0.5, difference > 0)
