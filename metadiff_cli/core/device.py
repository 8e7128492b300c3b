"""Device, precision, memory and default random generators of the machine at hand."""

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from metadiff_cli.core.distributed import SINGLE, Group
from metadiff_cli.errors import ConfigError

DEVICES = ("auto", "cpu", "cuda", "mps")
NAME = re.compile(r"(auto|cpu|cuda|mps)|cuda:([0-9]{1,4})")
CPU = torch.device("cpu")


def pick_device(name: str, group: Group = SINGLE) -> torch.device:
    """Turn `--device` into a device. Raises ConfigError when the machine does not have it.

    Of several processes on a machine each gets a GPU of its own.
    """
    found = NAME.fullmatch(name)
    if found is None:
        hint = f"choose one of {', '.join(DEVICES)}, or cuda:NUMBER"
        raise ConfigError(f"unknown device '{name}'", hint=hint)
    kind, number = found[1], found[2]
    if number is not None:
        return _numbered_gpu(int(number), group)
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError("no CUDA device can be used here", hint="use --device auto or --device cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("no Apple GPU (mps) can be used here", hint="use --device auto or --device cpu")
    if kind in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda") if group.world_size == 1 else _own_gpu(group.local_rank, group.local_world_size)
    if kind == "auto":
        return torch.device("mps" if torch.backends.mps.is_available() and group.world_size == 1 else "cpu")
    return torch.device(kind)


def _numbered_gpu(number: int, group: Group) -> torch.device:
    if group.world_size > 1:
        raise ConfigError(f"several processes cannot share the GPU cuda:{number}", hint="use --device cuda: one each")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if number >= count:
        there = "no CUDA device can be used here" if count == 0 else f"the GPUs here are cuda:0 to cuda:{count - 1}"
        raise ConfigError(f"there is no cuda:{number}: {there}", hint="use --device auto or --device cpu")
    return torch.device("cuda", number)


def _own_gpu(number: int, processes: int) -> torch.device:
    if number >= torch.cuda.device_count():
        raise ConfigError(
            f"{processes} processes on a machine with {torch.cuda.device_count()} GPUs",
            hint="start as many processes as there are GPUs, or use --device cpu",
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products are faster than fp32 there (on a CPU: AVX512-BF16, AMX or the Arm extension)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """bf16 autocast for `precision` "bf16", or for "auto" where it is faster; otherwise nothing."""
    if precision == "bf16" or (precision == "auto" and has_fast_bf16(device)):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def keep_freed_memory() -> None:
    """Ask glibc to keep freed blocks instead of returning them to the kernel.

    Activations of a training step are tens of megabytes each. By default each of them is mapped afresh and the kernel
    zeroes its pages, which takes longer than many of the operations that fill them. No effect elsewhere.
    """
    if not sys.platform.startswith("linux") or "MALLOC_CONF" in os.environ:
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_arena_max, 1)


def set_threads(threads: int | None) -> None:
    """Set the number of CPU threads of one operation; None leaves torch's choice."""
    if threads is not None:
        torch.set_num_threads(threads)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. To a GPU it goes from pinned memory, so that nobody waits for the copy."""
    if device.type != "cuda":
        return tensor.to(device)
    return (tensor.pin_memory() if torch.cuda.is_available() else tensor).to(device, non_blocking=True)


Noise = dict[str, Tensor]  # states of random generators by the type of their device: "cpu", and "cuda" or "mps"


def seeded_noise(seed: int, device: torch.device) -> Noise:
    """States of the default generators of the CPU and of `device` as `torch.manual_seed(seed)` would set them."""
    return {kind: torch.Generator(kind).manual_seed(seed).get_state() for kind in {"cpu", device.type}}


@contextmanager
def default_noise(noise: Noise, device: torch.device) -> Iterator[None]:
    """Inside, the default generators draw from `noise`, which moves on with them; afterwards they are as before.

    For what takes no generator: dropout, DropBlock, the initialisation of layers. A state of another kind of device
    than `device` is left out, so a run that goes on elsewhere draws other numbers there.
    """
    before = _states(device)
    _set_states(noise, device)
    try:
        yield
    finally:
        noise.update(_states(device))
        _set_states(before, device)


def _states(device: torch.device) -> Noise:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def _set_states(states: Noise, device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])
