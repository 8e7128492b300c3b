"""A GPU that is not there: tensors on it have shapes and a device, and no values.

What would fail on a real one for tensors on two devices fails here too, and so does whatever reads a value back, as
that waits for the GPU: `.item()`, a mask as an index, a copy to the CPU, a copy to the GPU that is waited for. With
`float64=False` it also refuses float64, as the GPUs of Apple do.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)


class Waited(Exception):
    """Something waited for the GPU."""


class FakeGpu(FakeTensorMode):
    """While it is entered, tensors on `GPU` are such ones; those on the CPU are real."""

    def __init__(self, *, float64: bool = True) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.strict, self.float64 = False, float64

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if not any(isinstance(x, FakeTensor) or (isinstance(x, torch.device) and x == GPU) for x in leaves):
            return func(*args, **kwargs)
        if self.strict:
            self._refuse_to_wait(func, args, kwargs)
        found = super().__torch_dispatch__(func, types, args, kwargs)
        if not self.float64:
            for leaf in tree_leaves(found):
                if isinstance(leaf, FakeTensor) and leaf.device == GPU and leaf.dtype == torch.float64:
                    raise TypeError(f"float64 on a GPU that does not have it, by {func}")
        return found

    @staticmethod
    def _refuse_to_wait(func: Any, args: Any, kwargs: Any) -> None:
        if func is torch.ops.aten.copy_.default:
            source, target, quick = args[1].device, args[0].device, len(args) > 2 and args[2]
        elif func is torch.ops.aten._to_copy.default:
            source, quick = args[0].device, kwargs.get("non_blocking", False)
            target = torch.device(kwargs.get("device") or source)
        else:
            return
        if source.type != target.type and (target.type == "cpu" or not quick):
            raise Waited(f"a copy from {source} to {target}")

    @contextmanager
    def nobody_waits(self) -> Iterator[None]:
        """Whatever waits for the GPU is an error in here."""
        self.strict = True
        try:
            yield
        finally:
            self.strict = False
