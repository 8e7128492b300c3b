"""BatchNorm for inner loops: no memory between batches, and second derivatives that cost little more than first ones.

MAML differentiates through the gradient of its inner loss, so BatchNorm is differentiated twice. With what torch
makes of that, a task at 84 x 84 took 1.7 times as long. Here both derivatives are written out: with
x the normalised input, r the inverse deviation and <.> the mean over a channel, the derivative of x with respect to the
input is r P, where P(g) = g - <g> - x <g x> is symmetric.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from metadiff_cli.core.encoders.networks import Encoder


class TaskNorm(nn.BatchNorm2d):
    """BatchNorm without a memory: the statistics of the batch at hand, in training and afterwards, as MAML has it.

    Inside `statistics_of_first(module, n)` they are those of the batch's first n images alone. Of bf16 images, too,
    statistics and slopes of weights are in fp32.
    """

    rows: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.rows is None:
            out: Tensor = _Normalise.apply(x, self.weight, self.bias, self.eps)
            return out
        variance, mean = torch.var_mean(x[: self.rows].float(), dim=(0, 2, 3), correction=0, keepdim=True)
        scale = self.weight.view(1, -1, 1, 1) * (variance + self.eps).rsqrt()
        return (x - mean) * scale + self.bias.view(1, -1, 1, 1)


def with_task_norm(module: Encoder) -> Encoder:
    """Replace every BatchNorm of an encoder by `TaskNorm`; returns the encoder."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d) and not isinstance(child, TaskNorm):
                setattr(parent, name, TaskNorm(child.num_features, eps=child.eps, track_running_stats=False))
    return module


@contextmanager
def statistics_of_first(module: nn.Module, rows: int | None) -> Iterator[None]:
    """Every `TaskNorm` of a module takes its statistics from the first `rows` images of a batch; None: from all."""
    norms = [part for part in module.modules() if isinstance(part, TaskNorm)]
    for norm in norms:
        norm.rows = rows
    try:
        yield
    finally:
        for norm in norms:
            norm.rows = None


class _Normalise(Function):
    """y = weight x + bias of x = (input - <input>) r, with input (B, C, H, W), weight and bias (C,)."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, mean, inverse = torch.native_batch_norm(value, weight, bias, None, None, True, 0.0, eps)
        ctx.save_for_backward(value, weight, mean, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        # <input> and r follow from the input, but are constants to autograd: `_Slopes` knows what they depend on
        value, weight, mean, inverse = ctx.saved_tensors
        return *_Slopes.apply(value, g, weight, mean, inverse), None


class _Slopes(Function):
    """The first derivative of `_Normalise`: slopes of input, weight and bias from the slope g of its output."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, g: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        slope, for_weight, for_bias = torch.ops.aten.native_batch_norm_backward(
            g, value, weight, None, None, mean, inverse, True, 0.0, [True, True, True]
        )
        ctx.save_for_backward(value, g, weight, mean, inverse, for_weight, for_bias)
        return slope, for_weight, for_bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor, v_weight: Tensor, v_bias: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        value, g, *per_channel = ctx.saved_tensors
        weight, mean, inverse, gx_sum, g_sum = (_wide(t) for t in per_channel)
        count = value.numel() // value.shape[1]
        x = (value - mean).mul_(inverse)
        g_mean, gx_mean, v_mean, vx_mean = g_sum / count, gx_sum / count, _mean(v), _mean(v * x)
        both = _mean(v * g) - v_mean * g_mean - vx_mean * gx_mean  # <v P(g)>
        gain, turn = weight * inverse, _wide(v_weight) * inverse

        to_g = torch.addcmul(_wide(v_bias) - gain * v_mean, v, gain)
        to_g.addcmul_(x, _wide(v_weight) - gain * vx_mean)

        # P(h) with h = -gx_mean v - vx_mean g, what v P(g) gives to x; then the change of r and the weight's slope
        square = gain * inverse
        to_input = torch.addcmul(square * (v_mean * gx_mean + g_mean * vx_mean) - turn * g_mean, v, -square * gx_mean)
        to_input.addcmul_(g, turn - square * vx_mean)
        to_input.addcmul_(x, square * (2 * vx_mean * gx_mean - both) - turn * gx_mean)
        return to_input.to(value.dtype), to_g.to(g.dtype), count * (inverse * both).flatten(), None, None


def _mean(value: Tensor) -> Tensor:
    """Mean (1, C, 1, 1) of each channel of (B, C, H, W)."""
    return value.mean(dim=(0, 2, 3), keepdim=True)


def _wide(value: Tensor) -> Tensor:
    """(C,) as (1, C, 1, 1)."""
    return value.view(1, -1, 1, 1)
