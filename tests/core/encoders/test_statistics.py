"""Class statistics are made once for a bank that lies on disk."""

import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from metadiff_cli.core.encoders import statistics
from metadiff_cli.core.encoders.bank import FeatureBank
from metadiff_cli.core.encoders.statistics import kept_statistics
from metadiff_cli.core.method.task_space import ClassStatistics, class_statistics

LABELS, CLASSES = np.repeat(np.arange(4), 6), ("a", "b", "c", "d")


def on_disk(folder: Path) -> FeatureBank:
    np.save(folder / "bank.npy", np.random.default_rng(0).normal(size=(24, 5)).astype(np.float32))
    return FeatureBank(np.load(folder / "bank.npy", mmap_mode="r"), LABELS, CLASSES)


def same(a: ClassStatistics, b: ClassStatistics) -> bool:
    return all(torch.equal(vars(a)[name], t) for name, t in vars(b).items())


def test_they_are_kept_beside_the_bank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = on_disk(tmp_path)
    expected = class_statistics(bank.by_class())
    assert same(kept_statistics(bank), expected)
    monkeypatch.setattr(statistics, "class_statistics", lambda classes: pytest.fail("they were kept"))
    assert same(kept_statistics(bank), expected)


def test_a_damaged_file_and_that_of_another_bank_are_made_again(tmp_path: Path) -> None:
    bank = on_disk(tmp_path)
    expected = kept_statistics(bank)
    (file,) = tmp_path.glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    assert same(kept_statistics(bank), expected) and file.read_bytes() == whole
    fewer = FeatureBank(bank.features, LABELS // 2, ("a", "b"))
    assert kept_statistics(fewer).means.shape == (2, 5)


def test_a_bank_in_memory_leaves_no_file(tmp_path: Path) -> None:
    bank = on_disk(tmp_path)
    kept_statistics(FeatureBank(np.array(bank.features), LABELS, CLASSES))
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_full_disk_costs_time_alone(tmp_path: Path) -> None:
    """RLIMIT_FSIZE refuses writing as a full disk does."""
    bank = on_disk(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        found = kept_statistics(bank)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert same(found, class_statistics(bank.by_class()))
    assert [path.name for path in tmp_path.iterdir()] == ["bank.npy"]
