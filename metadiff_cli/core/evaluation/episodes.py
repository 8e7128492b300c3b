"""Episodes as indices: N classes, K support and Q query images of each, all distinct.

Episode i depends on (seed, i) alone, whatever else runs and however episodes are batched.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from metadiff_cli.errors import DataError


@dataclass(frozen=True)
class Episodes:
    """A batch of B episodes of N ways and K shots, with M query images each (M = N * Q when balanced)."""

    classes: np.ndarray  # (B, N) class numbers
    support: np.ndarray  # (B, N, K) rows of the feature bank
    query: np.ndarray  # (B, M) rows of the feature bank
    labels: np.ndarray  # (B, M) position 0..N-1 of each query's class in the episode

    def part(self, which: slice) -> "Episodes":
        """Some of the tasks."""
        return Episodes(self.classes[which], self.support[which], self.query[which], self.labels[which])


def check_episodes(
    class_indices: Sequence[np.ndarray], names: Sequence[str], way: int, shot: int, query: int, total: int | None = None
) -> None:
    """Raise DataError unless every class has enough images and there are enough classes.

    `total` is the largest number of queries one class may get, where it is not `query`.
    """
    if way > len(class_indices):
        raise DataError(f"{way}-way episodes need {way} classes; there are {len(class_indices)}", hint="lower --way")
    need = shot + (query if total is None else total)
    for name, indices in zip(names, class_indices, strict=True):
        if len(indices) < need:
            count = f"{len(indices)} image{'' if len(indices) == 1 else 's'}"
            raise DataError(
                f"class '{name}' has {count}; {shot}-shot with {need - shot} queries needs {need}",
                hint="lower --query or --shot, or add images",
            )


def sample_episode(
    class_indices: Sequence[np.ndarray],
    way: int,
    shot: int,
    query: int,
    *,
    seed: int,
    index: int,
    imbalance: float | None = None,
) -> Episodes:
    """Episode `index` of `seed`, as a batch of one.

    With `imbalance`, the way * query query images are divided among the classes by a Dirichlet(imbalance) draw, as far
    as the classes have images (Veilleux et al. 2021).
    """
    rng = np.random.default_rng([seed, index])
    classes = rng.permutation(len(class_indices))[:way]
    counts = np.full(way, query)
    if imbalance is not None:
        counts = rng.multinomial(way * query, rng.dirichlet(np.full(way, imbalance)))
        room = np.array([len(class_indices[c]) - shot for c in classes])
        counts = _fit(counts, room)
    picks = [
        class_indices[c][rng.choice(len(class_indices[c]), shot + n, replace=False)]
        for c, n in zip(classes, counts, strict=True)
    ]
    return Episodes(
        classes=classes[None],
        support=np.stack([pick[:shot] for pick in picks])[None],
        query=np.concatenate([pick[shot:] for pick in picks])[None],
        labels=np.repeat(np.arange(way), counts)[None],
    )


def _fit(counts: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Move what does not fit into `room` to the classes that have room left, the fullest class last."""
    counts = counts.copy()
    excess = int(np.maximum(counts - room, 0).sum())
    counts = np.minimum(counts, room)
    for c in np.argsort(counts - room, kind="stable"):
        moved = min(excess, int(room[c] - counts[c]))
        counts[c] += moved
        excess -= moved
    assert excess == 0, "check_episodes guarantees room"
    return counts


def join(episodes: Sequence[Episodes]) -> Episodes:
    """Stack episodes of the same shape into one batch."""
    return Episodes(
        classes=np.concatenate([e.classes for e in episodes]),
        support=np.concatenate([e.support for e in episodes]),
        query=np.concatenate([e.query for e in episodes]),
        labels=np.concatenate([e.labels for e in episodes]),
    )


def episode_batches(
    class_indices: Sequence[np.ndarray],
    way: int,
    shot: int,
    query: int,
    *,
    count: int,
    batch: int,
    seed: int,
    imbalance: float | None = None,
) -> Iterator[Episodes]:
    """Episodes 0 .. count - 1 of `seed` in batches."""
    for start in range(0, count, batch):
        indices = range(start, min(start + batch, count))
        yield join(
            [sample_episode(class_indices, way, shot, query, seed=seed, index=i, imbalance=imbalance) for i in indices]
        )


def training_batch(
    class_indices: Sequence[np.ndarray],
    ways: tuple[int, int],
    shots: tuple[int, int],
    query: int,
    *,
    batch: int,
    seed: int,
    step: int,
) -> Episodes:
    """The tasks of training step `step`: way and shot drawn per step from their ranges, both ends included.

    Where there are fewer classes than `ways` asks for, all of them make a task.
    """
    rng = np.random.default_rng([seed, step])
    most = min(ways[1], len(class_indices))
    way = int(rng.integers(min(ways[0], most), most + 1))
    shot = int(rng.integers(shots[0], shots[1] + 1))
    first = int(rng.integers(2**48))
    tasks = [sample_episode(class_indices, way, shot, query, seed=seed, index=first + i) for i in range(batch)]
    return join(tasks)


def mixed_seed(*parts: int) -> int:
    """A seed for torch of its own for each combination of a seed and the numbers of, say, epoch, step or task."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(2))
