"""The support of a task as features."""

import torch

from metadiff_cli.core.method.support import TaskSupport


def test_a_task_has_its_means_and_counts() -> None:
    z = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1).expand(-1, -1, 3)
    task = TaskSupport.of(z, torch.tensor([0, 1, 1]))
    assert task.z.shape == (1, 3, 3) and task.count.tolist() == [[1.0], [2.0]]
    assert torch.equal(task.means[0], torch.tensor([[1.0] * 3, [2.5] * 3]))


def test_even_classes_are_a_special_case() -> None:
    z = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    even, of = TaskSupport.even(z), TaskSupport.of(z.flatten(1, 2), torch.arange(3).repeat_interleave(4))
    assert torch.equal(even.labels, of.labels) and torch.equal(even.count, of.count)
    assert torch.allclose(even.means, of.means) and torch.equal(even.z, of.z)


def test_a_class_of_thousands_takes_no_more_than_its_images() -> None:
    """Beside 99 classes of one image: padded to the largest, they would take a hundred times the memory."""
    labels = torch.cat([torch.arange(100), torch.zeros(5000, dtype=torch.long)])
    task = TaskSupport.of(torch.ones(1, 5100, 4), labels)
    assert task.z.numel() == 5100 * 4 and task.means.shape == (1, 100, 4) and float(task.count[0]) == 5001
    assert [len(part.labels) for part in task.parts(values=4 * 2000)] == [2000, 2000, 1100]
