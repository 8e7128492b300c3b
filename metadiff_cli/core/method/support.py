"""What a classifier is made of: the labelled support images and the unlabelled pool, as features with digests.

A digest is a hash of the pixels as the encoder sees them: by it the same picture is known again, in another folder and
in a saved classifier. Images stand in the order of class and digest, so that nothing depends on how files are named.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from metadiff_cli.errors import DataError

FEWEST_CLASSES = 2
SHOWN = 5  # examples of one kind of trouble in a message


@dataclass(frozen=True)
class TaskSupport:
    """Support features z (B, n, D) of B tasks, side by side: `labels` (n,) say which class an image is of.

    `means` (B, N, D) are those of the classes and `count` (N, 1) their images; classes may differ in size.
    """

    z: Tensor
    labels: Tensor
    means: Tensor
    count: Tensor

    @classmethod
    def of(cls, z: Tensor, labels: Tensor) -> "TaskSupport":
        """From features (B, n, D) and labels (n,) 0 .. N - 1, each of which occurs."""
        means = torch.stack([z[:, labels == c].mean(dim=1) for c in range(int(labels.max()) + 1)], dim=1)
        return cls(z, labels, means, torch.bincount(labels).unsqueeze(1).to(z))

    @classmethod
    def even(cls, z: Tensor) -> "TaskSupport":
        """From features (B, N, K, D) where all classes have K images."""
        _, ways, shots, _ = z.shape
        labels = torch.arange(ways, device=z.device).repeat_interleave(shots)
        return cls(z.flatten(1, 2), labels, z.mean(dim=2), z.new_full((ways, 1), shots))

    def parts(self, values: int = 16_000_000) -> Iterator["TaskSupport"]:
        """The same classes with some of the images after another, whose features are about `values` numbers."""
        step = max(1, values // (len(self.z) * self.z.shape[2]))
        for start in range(0, len(self.labels), step):
            rows = slice(start, start + step)
            yield TaskSupport(self.z[:, rows], self.labels[rows], self.means, self.count)


@dataclass(frozen=True)
class SupportStats:
    """What a denoiser sees of the support of B tasks: mean p (B, N, D), shots K, precision lambda (B or 1, 1, D).

    K has the shape (B or 1, N or 1, 1). Where all classes have the same number of images it is a single number, and
    what follows from it is computed once for all classes.
    """

    mean: Tensor
    count: Tensor
    precision: Tensor

    def scaled(self, guidance: Tensor | float) -> "SupportStats":
        """Return the statistics with a * lambda in place of lambda; `guidance` is a, a number or one per task (B,)."""
        a = guidance.view(-1, 1, 1) if isinstance(guidance, Tensor) else guidance
        return replace(self, precision=self.precision * a)


def support_stats(v: Tensor, precision: Tensor) -> SupportStats:
    """Return the statistics of support images v (B, N, K, D) in task space with precision lambda (D,)."""
    return SupportStats(v.mean(dim=2), v.new_full((1, 1, 1), v.shape[2]), precision.view(1, 1, -1))


@dataclass(frozen=True)
class Example:
    """One labelled image: features (D,), the digest of its pixels, and the path that messages show."""

    label: str
    path: str
    digest: bytes
    features: Tensor


@dataclass(frozen=True)
class SupportSet:
    """Features (n, D) of the support, its labels (n,) as positions in `classes`, digests and paths.

    `broken` has path and reason of images that could not be read, `repeated` pairs of paths of the same picture, of
    which the first one is left out.
    """

    classes: tuple[str, ...]
    features: Tensor
    labels: np.ndarray
    digests: tuple[bytes, ...]
    paths: tuple[str, ...]
    broken: tuple[tuple[str, str], ...] = ()
    repeated: tuple[tuple[str, str], ...] = ()

    def counts(self) -> dict[str, int]:
        """Images per class."""
        numbers = np.bincount(self.labels, minlength=len(self.classes))
        return {cls: int(n) for cls, n in zip(self.classes, numbers, strict=True)}

    def known(self) -> Mapping[bytes, str]:
        """The path of each digest."""
        return dict(zip(self.digests, self.paths, strict=True))

    def task(self) -> TaskSupport:
        """Its features as those of one task."""
        labels = torch.from_numpy(self.labels).to(self.features.device)
        return TaskSupport.of(self.features.unsqueeze(0), labels)

    def examples(self) -> list[Example]:
        """Its images one by one."""
        return [
            Example(self.classes[label], path, digest, features)
            for label, path, digest, features in zip(self.labels, self.paths, self.digests, self.features, strict=True)
        ]

    def joined(self, other: "SupportSet") -> "SupportSet":
        """Both together, as if they had been read at once. Raises DataError as `support_of` does."""
        both = support_of([*self.examples(), *other.examples()], (*self.broken, *other.broken))
        return SupportSet(
            both.classes, both.features, both.labels, both.digests, both.paths, both.broken,
            (*self.repeated, *other.repeated, *both.repeated),
        )  # fmt: skip


@dataclass(frozen=True)
class Pool:
    """Unlabelled images: features (P, D) and digests, each picture once."""

    features: Tensor
    digests: tuple[bytes, ...]

    def joined(self, other: "Pool | None") -> "Pool":
        """Both together."""
        if other is None:
            return self
        pairs = [*zip(self.digests, self.features, strict=True), *zip(other.digests, other.features, strict=True)]
        return pool_of(pairs)

    def without(self, digests: Iterable[bytes]) -> "Pool | None":
        """Without these pictures: one that is labelled needs no guess of its class."""
        left_out = set(digests)
        rows = [i for i, digest in enumerate(self.digests) if digest not in left_out]
        return Pool(self.features[rows], tuple(self.digests[i] for i in rows)) if rows else None


def pool_of(pairs: Iterable[tuple[bytes, Tensor]]) -> Pool:
    """A pool from digests and features (D,) of at least one image."""
    unique = dict(pairs)
    digests = tuple(sorted(unique))
    return Pool(torch.stack([unique[digest] for digest in digests]), digests)


def support_of(examples: Iterable[Example], broken: Iterable[tuple[str, str]] = ()) -> SupportSet:
    """A support set in which each picture counts once. Raises DataError when one picture is in two classes."""
    first: dict[bytes, Example] = {}
    repeated: list[tuple[str, str]] = []
    torn: list[str] = []
    for example in examples:
        twin = first.setdefault(example.digest, example)
        if twin.label != example.label:
            torn.append(f"{twin.path} ('{twin.label}') and {example.path} ('{example.label}')")
        elif twin is not example:
            repeated.append((example.path, twin.path))
    if torn:
        more = f"; and {len(torn) - SHOWN} more" if len(torn) > SHOWN else ""
        raise DataError(
            f"the same image is in two classes: {'; '.join(torn[:SHOWN])}{more}", hint="keep it in the class it shows"
        )
    ordered = sorted(first.values(), key=lambda e: (e.label, e.digest))
    classes = tuple(sorted({e.label for e in ordered}))
    position = {cls: i for i, cls in enumerate(classes)}
    return SupportSet(
        classes, torch.stack([e.features for e in ordered]), np.array([position[e.label] for e in ordered]),
        tuple(e.digest for e in ordered), tuple(e.path for e in ordered), tuple(broken), tuple(repeated),
    )  # fmt: skip


def require_classes(support: SupportSet) -> None:
    """Raise DataError when there is nothing to tell apart."""
    if len(support.classes) < FEWEST_CLASSES:
        only = support.classes[0]
        raise DataError(f"the support has one class, '{only}'", hint="add a folder for each further class")


def digest_of(pixels: np.ndarray) -> bytes:
    """Hash (32 bytes) of an image as the encoder sees it: the same picture in another format may still differ."""
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).digest()
