"""Expanded and joint features: what their inner products are, for every kind of metric."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from metadiff_cli.core.method.metric import HALF_TRUST, SHORTEST, Metric, cosine_logits
from tests.tasks import METRICS, ONE, TWO, features, metric_of, settings_of


@pytest.mark.parametrize("name", METRICS)
def test_inner_products_of_joint_features_are_weighted_means_of_cosines(name: str) -> None:
    """Of each group as it is, and of each group whitened, all relative to the domain of the task."""
    metric = METRICS[name]()
    settings = settings_of(2, guidance=torch.tensor([1.0, 40.0]), level=torch.tensor([0.3, 0.9]))
    z = features(2, 6, seed=3, groups=metric.groups)
    domain = 0.2 * features(2, 1, seed=4, groups=metric.groups)
    weights = metric.weights(settings)
    phi = metric.embed(metric.expand(z), metric.expand(domain), weights)
    found = phi @ phi.mT
    for b in range(2):
        wanted = torch.zeros(6, 6)
        for (group, whitened), share in zip(parts_of(metric), weights[b], strict=True):
            rows = slice(sum(metric.groups[:group]), sum(metric.groups[: group + 1]))
            moved = z[b] - domain[b]
            if whitened:
                assert metric.space is not None
                moved = metric.space.whiten(z[b]) - metric.space.whiten(domain[b])
            part = moved[:, rows]
            wanted += share * F.cosine_similarity(part.unsqueeze(1), part.unsqueeze(0), dim=-1)
        torch.testing.assert_close(found[b], wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(2))
    torch.testing.assert_close(phi.norm(dim=-1), torch.ones(2, 6))


def parts_of(metric: Metric) -> list[tuple[int, bool]]:
    """Group and whether it is whitened, of each part."""
    groups = range(len(metric.groups))
    plain = [(g, False) for g in groups] if metric.plain else []
    return plain + ([(g, True) for g in groups] if metric.space is not None else [])


@pytest.mark.parametrize("name", METRICS)
def test_logits_are_those_of_the_joint_features(name: str) -> None:
    metric = METRICS[name]()
    x = metric.expand(features(3, 7, seed=3, groups=metric.groups))
    domain, weights = 0.3 * x[:, :1], metric.weights(settings_of(3))
    classifier = torch.randn(3, 4, sum(metric.parts), generator=torch.Generator().manual_seed(0))
    wanted = metric.embed(x, domain, weights) @ classifier.mT
    torch.testing.assert_close(metric.logits(x, domain, weights, classifier), wanted, atol=1e-5, rtol=1e-4)


def test_each_hyper_parameter_weighs_its_part() -> None:
    """In the order plain last layer, plain layers below, whitened last layer, whitened layers below."""
    metric = metric_of(TWO)
    even = metric.weights(settings_of(guidance=HALF_TRUST, level=0.25))
    torch.testing.assert_close(even, torch.tensor([[0.375, 0.125, 0.375, 0.125]]))
    foreign = metric.weights(settings_of(guidance=1e9, level=0.0))
    torch.testing.assert_close(foreign, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    three = replace(Metric((2, 2, 2)), space=None).weights(settings_of(level=0.5))
    torch.testing.assert_close(three, torch.tensor([[0.5, 0.25, 0.25]]))
    whitened = metric_of(TWO, plain=False).weights(settings_of(guidance=7.0, level=0.25))
    torch.testing.assert_close(whitened, torch.tensor([[0.75, 0.25]]))
    assert metric_of(ONE, base=False).weights(settings_of(3, level=0.8)).tolist() == [[1.0]] * 3


@pytest.mark.parametrize("name", METRICS)
def test_an_expanded_feature_is_a_linear_map_whose_parts_are_known(name: str) -> None:
    metric = METRICS[name]()
    z = features(1, 2, seed=5, groups=metric.groups)[0]
    x = metric.expand(z)
    assert x.shape == (2, sum(metric.parts)) and len(metric.split(x)) == len(metric.parts)
    middle = metric.expand(z.mean(dim=0))
    torch.testing.assert_close(middle, x.mean(dim=0), atol=1e-4, rtol=1e-4)
    if metric.space is None:
        assert torch.equal(x, z) and not metric.origin.any()
    else:
        torch.testing.assert_close(metric.origin, metric.expand(metric.space.mean))
        torch.testing.assert_close(metric.whitened(x), metric.space.whiten(z))


def test_statistics_are_those_in_task_space() -> None:
    metric = metric_of(TWO)
    assert metric.space is not None
    z = features(4, 1, seed=6, groups=TWO)[:, 0].unsqueeze(0)
    count = torch.full((1, 1, 1), 3.0)
    stats = metric.stats(metric.expand(z) - metric.origin, count)
    torch.testing.assert_close(stats.mean, metric.space.to_task(z), atol=1e-4, rtol=1e-4)
    assert torch.equal(stats.precision.flatten(), metric.space.precision) and stats.count is count


def test_an_image_at_the_domain_has_no_direction() -> None:
    metric = metric_of()
    x = metric.expand(features(1, 2, seed=3))
    phi = metric.embed(x, x[:, :1], metric.weights(settings_of()))
    assert torch.equal(phi[0, 0], torch.zeros(48)) and float(phi[0, 1].norm()) == pytest.approx(1)
    logits = metric.logits(x, x[:, :1], metric.weights(settings_of()), torch.ones(1, 3, 48))
    assert torch.equal(logits[0, 0], torch.zeros(3))
    assert SHORTEST > 0


def test_cosines_ignore_length_and_may_be_centred() -> None:
    g = torch.Generator().manual_seed(0)
    z, w, centre = (torch.randn(2, n, 8, generator=g) for n in (4, 3, 1))
    torch.testing.assert_close(cosine_logits(3 * z, 5 * w), cosine_logits(z, w))
    torch.testing.assert_close(cosine_logits(z, w, 2.0, centre), cosine_logits(z - centre, w - centre, 2.0))
    wanted = F.cosine_similarity(z.unsqueeze(2), w.unsqueeze(1), dim=-1)
    torch.testing.assert_close(cosine_logits(z, w), wanted)


def test_settings_of_one_task_are_its_own() -> None:
    settings = settings_of(3, level=torch.tensor([0.1, 0.2, 0.3]))
    one = settings.of(1)
    assert one.level.tolist() == [pytest.approx(0.2)] and one.guidance.shape == (1,) and one.scale == settings.scale
