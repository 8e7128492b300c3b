"""An Apple GPU that is not there: tensors on it have values, which the CPU computes, and none may be float64.

What would fail on a real one for tensors on two devices fails here too.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

MPS = torch.device("mps")
DEVICE = Tensor.device.__get__  # type: ignore[attr-defined]
READ = {Tensor.item, Tensor.tolist, Tensor.__float__, Tensor.__int__, Tensor.__bool__, Tensor.__index__}

SHAPED = {Tensor.expand_as, Tensor.view_as, Tensor.reshape_as}  # the other tensor gives its shape alone


class OnApple(Tensor):
    """A tensor on that GPU."""


class AppleGpu(TorchFunctionMode):
    """While it is entered, tensors may be sent to `MPS` and made there."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = any(isinstance(x, OnApple) for x in given)
        if func == DEVICE:
            return MPS if there else torch.device("cpu")
        if func is Tensor.numpy and there:
            raise TypeError("a tensor on a GPU has no NumPy array")
        if func in (Tensor.to, Tensor.cpu):
            return self._sent(func, args, kwargs)
        asked = kwargs.pop("device", None)
        if func in SHAPED:
            there = isinstance(args[0], OnApple)
        elif asked is not None:
            there = torch.device(asked).type == "mps"
        elif there and func not in READ and any(not isinstance(x, OnApple) and x.ndim > 0 for x in given):
            raise RuntimeError(f"tensors on two devices: {func}")
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
        return tree_map(_on_apple, found) if there else found

    @staticmethod
    def _sent(func: Callable[..., Any], args: Any, kwargs: Any) -> Tensor:
        """The result of `.to(...)` and `.cpu()`, wherever it goes."""
        tensor, target, rest = args[0], None, []
        for value in (*args[1:], kwargs.pop("device", None)):
            if isinstance(value, Tensor):
                target = MPS if isinstance(value, OnApple) else torch.device("cpu")
                rest.append(value.dtype)
            elif isinstance(value, torch.device | str):
                target = torch.device(value)
            elif value is not None:
                rest.append(value)
        if func is Tensor.cpu:
            target = torch.device("cpu")
        there = isinstance(tensor, OnApple) if target is None else target.type == "mps"
        with torch._C.DisableTorchFunctionSubclass():
            found = tensor.as_subclass(Tensor)
            found = found.to(*rest, **kwargs) if rest or kwargs else found.clone()
        return _on_apple(found) if there else found


def _on_apple(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.dtype == torch.float64:
        raise TypeError("float64 on a GPU that does not have it")
    return value.as_subclass(OnApple)
