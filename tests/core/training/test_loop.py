"""What all trainings share: sums, the average of parameters, the optimiser's state."""

import pytest
import torch

from metadiff_cli.core.training.loop import Ema, Sums, optimiser_tensors, restore_optimiser


def test_sums_are_exact_and_start_again() -> None:
    sums = Sums(2)
    for i in range(1000):
        sums.add(torch.tensor([0.1, float(i)]))
    assert sums.read() == [sum([float(torch.tensor(0.1))] * 1000), 499500.0] and sums.count == 1000
    assert sums.read()[1] == 499500.0  # reading takes nothing
    sums.reset([1.5, 2.0], 3)
    sums.add(torch.tensor([1.0, 1.0]))
    assert sums.read() == [2.5, 3.0] and sums.count == 4
    sums.reset()
    assert sums.read() == [0.0, 0.0] and sums.count == 0


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_an_optimiser_goes_on_with_its_state(kind: type[torch.optim.Optimizer]) -> None:
    def made() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        module = torch.nn.Linear(2, 1)
        torch.nn.init.ones_(module.weight)
        more = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        return module, kind(module.parameters(), lr=0.1, **more)

    def step(module: torch.nn.Module, optimiser: torch.optim.Optimizer) -> None:
        optimiser.zero_grad()
        module(torch.tensor([[1.0, 2.0]])).sum().backward()
        optimiser.step()

    one, other = made(), made()
    assert optimiser_tensors(*one) == {}
    step(*one)
    other[0].load_state_dict(one[0].state_dict())
    restore_optimiser(*other, optimiser_tensors(*one))
    step(*one)
    step(*other)
    assert all(torch.equal(t, other[0].state_dict()[name]) for name, t in one[0].state_dict().items())


def test_the_average_follows_its_closed_form() -> None:
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(layer.weight, 0.0)
    ema, expected = Ema(layer, decay=0.9), 0.0
    for step in range(1, 200):
        torch.nn.init.constant_(layer.weight, float(step))
        ema.update(layer)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert float(ema.state()["weight"]) == pytest.approx(expected, rel=1e-5)
    assert 180 < float(ema.state()["weight"]) < 199
