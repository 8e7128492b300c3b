"""How well a model knows what it does not know: episodes with queries of classes that the task does not contain.

The support and the known queries of an episode are those of the closed-set episode of the same number; the queries of
further classes come after them. (The protocol of few-shot open-set recognition, Liu et al. 2020.)
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from metadiff_cli.core.encoders.bank import FeatureBank
from metadiff_cli.core.evaluation.episodes import check_episodes, episode_batches
from metadiff_cli.core.evaluation.evaluate import BATCH_VALUES, Protocol, expanded, mean_interval
from metadiff_cli.core.method.adapt import MetaDiff, Sampling, adapt_tasks, ranks_of, seeds_of
from metadiff_cli.core.method.rejection import rejector_of
from metadiff_cli.core.method.support import TaskSupport
from metadiff_cli.errors import DataError


@dataclass(frozen=True)
class OpenSet:
    """Of each episode (E,), in percent: areas under the ROC curve, and the share of queries that are rejected.

    `auroc` is that of the known score, `auroc_confidence` that of the largest probability, as a control.
    """

    auroc: Tensor
    auroc_confidence: Tensor
    rejected_known: Tensor
    rejected_unknown: Tensor

    def joined(self, other: "OpenSet") -> "OpenSet":
        """The episodes of both."""
        return OpenSet(*(torch.cat([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self)))

    def summary(self) -> dict[str, Any]:
        """Means with the half-widths of their 95 % intervals over episodes."""
        measured = {f.name: _interval(getattr(self, f.name)) for f in fields(self)}
        difference, half = mean_interval(self.auroc - self.auroc_confidence)
        return {**measured, "paired_to_confidence": {"difference": difference, "ci95": half}}


def _interval(values: Tensor) -> Mapping[str, float]:
    mean, half = mean_interval(values)
    return {"mean": mean, "ci95": half}


def unknown_classes(bank: FeatureBank, way: int) -> int:
    """How many classes beside the task's an episode has. Raises DataError when there are no further classes."""
    further = min(way, len(bank.classes) - way)
    if further < 1:
        raise DataError(
            f"{way}-way episodes with unknown classes need more than {way} classes; there are {len(bank.classes)}",
            hint="lower --way, or leave out --open-set",
        )
    return further


def measure_open_set(
    metadiff: MetaDiff, bank: FeatureBank, protocol: Protocol, sampling: Sampling, device: torch.device,
    progress: Callable[[int], None] = lambda done: None,
) -> OpenSet:  # fmt: skip
    """Over the protocol's episodes. Raises CheckpointError when the metadiff has no fitted threshold."""
    parts: list[OpenSet] = []
    for part in _parts(metadiff, bank, protocol, sampling, device):
        parts.append(part)
        progress(sum(len(p.auroc) for p in parts))
    return OpenSet(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(OpenSet)))


def _parts(
    metadiff: MetaDiff, bank: FeatureBank, protocol: Protocol, sampling: Sampling, device: torch.device
) -> Iterator[OpenSet]:
    way, total = protocol.way, protocol.way + unknown_classes(bank, protocol.way)
    indices = bank.class_indices()
    check_episodes(indices, bank.classes, total, protocol.shot, protocol.query)
    x = expanded(metadiff.metric, bank, device)
    values = total * (protocol.shot + protocol.query) * sum(metadiff.metric.parts)  # in the features of an episode
    batch = max(1, min(protocol.episodes, 50, BATCH_VALUES // values))
    for first, episodes in zip(range(0, protocol.episodes, batch), episode_batches(
        indices, total, protocol.shot, protocol.query, count=protocol.episodes, batch=batch, seed=protocol.seed
    ), strict=True):  # fmt: skip
        support, query = TaskSupport.even(x(episodes.support[:, :way])), x(episodes.query)
        classifier = adapt_tasks(
            metadiff, support, sampling, ranks=ranks_of(episodes.classes[:, :way]),
            seeds=seeds_of(protocol.seed, first, len(query)), pool=query if protocol.transductive else None,
        )  # fmt: skip
        margins = rejector_of(metadiff, classifier, support).margins(query)
        yield _scored(margins, classifier.probabilities(query).amax(dim=-1), way * protocol.query)


def _scored(margins: Tensor, confidence: Tensor, known: int) -> OpenSet:
    """Of margins and confidences (B, M), the first `known` queries of each episode being of the task's classes."""
    margins, confidence = margins.cpu(), confidence.cpu()  # not every device has float64
    rejected = 100 * (margins < 0).double()
    return OpenSet(
        auroc=100 * auroc(margins[:, :known], margins[:, known:]).cpu(),
        auroc_confidence=100 * auroc(confidence[:, :known], confidence[:, known:]).cpu(),
        rejected_known=rejected[:, :known].mean(dim=1).cpu(),
        rejected_unknown=rejected[:, known:].mean(dim=1).cpu(),
    )


def auroc(known: Tensor, unknown: Tensor) -> Tensor:
    """Share (B,) in 0..1 of pairs in which the known (B, P) scores above the unknown (B, U); ties count a half."""
    difference = known.unsqueeze(2) - unknown.unsqueeze(1)
    return ((difference > 0).double() + 0.5 * (difference == 0).double()).mean(dim=(1, 2))
