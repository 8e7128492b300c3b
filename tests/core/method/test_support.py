"""The support of a task as features."""

import torch

from metadiff_cli.core.method.support import TaskSupport, count_of, support_stats


def test_a_task_has_its_means_and_counts() -> None:
    x = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1).expand(-1, -1, 3)
    task = TaskSupport(x, torch.tensor([0, 1, 1]))
    assert task.counts.tolist() == [1, 2] and task.ways == 2 and task.shots == 1.5
    assert torch.equal(task.means()[0], torch.tensor([[1.0] * 3, [2.5] * 3]))
    assert task.one_hot().tolist() == [[1, 0], [0, 1], [0, 1]]


def test_even_classes_are_a_special_case() -> None:
    z = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    even, of = TaskSupport.even(z), TaskSupport(z.flatten(1, 2), torch.arange(3).repeat_interleave(4))
    assert torch.equal(even.labels, of.labels) and torch.equal(even.x, of.x)
    torch.testing.assert_close(even.means(), z.mean(dim=2))
    assert even.shots == 4 and even.counts.tolist() == [4, 4, 4]


def test_some_rows_of_a_support_are_a_support() -> None:
    x = torch.arange(8.0).view(2, 4, 1)
    some = TaskSupport(x, torch.tensor([1, 0, 1, 0])).take([2, 3])
    assert some.labels.tolist() == [1, 0] and some.x[..., 0].tolist() == [[2, 3], [6, 7]]


def test_a_number_of_images_that_all_classes_share_is_one_number() -> None:
    assert count_of(torch.tensor([3, 3])).shape == (1, 1, 1)
    assert count_of(torch.tensor([3, 1])).flatten().tolist() == [3, 1]


def test_a_class_of_thousands_takes_no_more_than_its_images() -> None:
    """Beside 99 classes of one image: padded to the largest, they would take a hundred times the memory."""
    labels = torch.cat([torch.arange(100), torch.zeros(5000, dtype=torch.long)])
    task = TaskSupport(torch.ones(1, 5100, 4), labels)
    assert task.x.numel() == 5100 * 4 and task.means().shape == (1, 100, 4) and int(task.counts[0]) == 5001


def test_the_order_of_support_images_does_not_matter() -> None:
    v = torch.randn(1, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    a, b = support_stats(v, torch.ones(4)), support_stats(v[:, :, torch.tensor([4, 2, 0, 1, 3])], torch.ones(4))
    assert torch.allclose(a.mean, b.mean, atol=1e-6) and torch.equal(a.count, b.count)


def test_a_thinned_support_has_as_many_of_each_class_as_there_are() -> None:
    labels = torch.tensor([0] * 9 + [1] * 2 + [2] * 6)[torch.randperm(17, generator=torch.Generator().manual_seed(0))]
    support = TaskSupport(torch.arange(17.0).view(1, 17, 1), labels)
    rows = support.thinned(12)
    assert support.take(rows).counts.tolist() == [4, 2, 4] and rows.tolist() == sorted(set(rows.tolist()))
    assert support.take(support.thinned(3)).counts.tolist() == [2, 2, 2]  # two of each, so that one can be held out
    assert support.thinned(1000).tolist() == list(range(17))
