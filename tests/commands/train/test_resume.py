"""Runs that stop and go on: signals, failed writes, changed settings, warm starts. Real processes: test_killing.py."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from metadiff_cli.commands.train import encoder, resume, stages
from metadiff_cli.commands.train.resume import HeldSignals
from metadiff_cli.core.baselines.train import InnerTrainer
from metadiff_cli.core.checkpoints.file import load_checkpoint, read_header, save_checkpoint
from metadiff_cli.core.distributed import SINGLE
from metadiff_cli.core.training.metatrain import MetaTrainer
from metadiff_cli.core.training.pretrain import Pretrainer
from metadiff_cli.errors import Stopped
from metadiff_cli.files import LEFTOVER
from tests.worlds import SMALL, Result, invoke

CLI = Callable[..., Result]
SETTINGS = ["--preset", "glyphs-5w1s", "--seed", "6", "--json", *SMALL]  # a seed that no other test has in the cache
METATRAIN, PRETRAIN = ["metatrain", *SETTINGS], ["pretrain", *SETTINGS]
RESULTS = ("checkpoint.safetensors", "encoder.safetensors")
STATES = ("state.safetensors", "encoder-state.safetensors")  # with what a checkpoint leaves out: optimisers, averages


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a `metatrain` that never stopped."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:  # in another test's cache it would find the encoder
        patch.setenv("METADIFF_CACHE_DIR", str(out.parent / "cache"))
        result = invoke(*METATRAIN, "--out", out)
    assert result.code == 0, result.err
    return out


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache in which nothing is found yet, least of all the encoder."""
    monkeypatch.setenv("METADIFF_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def each_step(monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]) -> None:
    """Do something at the beginning of every step of every training."""
    for trainer in (Pretrainer, MetaTrainer, InnerTrainer):
        original = trainer._train_step

        def step(self: Any, *arguments: Any, original: Any = original) -> Any:
            action()
            return original(self, *arguments)

        monkeypatch.setattr(trainer, "_train_step", step)


def same_results(run: Path, other: Path) -> bool:
    return all((run / name).read_bytes() == (other / name).read_bytes() for name in (*RESULTS, *STATES))


def rows(run: Path) -> list[bytes]:
    return [(run / name).read_bytes() for name in ("metrics.csv", "pretrain-metrics.csv")]


def test_stopped_every_few_steps_it_ends_with_the_same_bytes(
    whole: Path, own_cache: Path, tmp_path: Path, cli: CLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C and SIGTERM in turn, in every fifth step, in epochs and between validations."""
    numbers, count = [signal.SIGINT, signal.SIGTERM], 0

    def every_fifth() -> None:
        nonlocal count
        count += 1
        if count % 5 == 0:
            signal.raise_signal(numbers[count // 5 % 2])

    each_step(monkeypatch, every_fifth)
    codes = []
    while not codes or codes[-1]:
        result = cli(*METATRAIN, "--out", tmp_path / "run", "--resume")
        codes.append(result.code)
        assert result.code in (0, 130, 143), result.err
        assert (result.code > 0) == ("try: metadiff metatrain --preset glyphs-5w1s" in result.err)
    # 18 steps of pretraining and 6 of meta-training, none of them taken twice: the one at hand is finished and kept
    assert count == 24 and sorted(codes) == [0, 130, 130, 143, 143]
    assert same_results(tmp_path / "run", whole) and rows(tmp_path / "run") == rows(whole)


def test_stopped_while_it_validates(
    whole: Path, own_cache: Path, tmp_path: Path, cli: CLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A validation is not waited for; it is made again."""
    stops = []

    def once(module: Any, name: str) -> None:
        original = getattr(module, name)

        def interrupted(*arguments: Any, **more: Any) -> Any:
            if name not in stops:
                stops.append(name)
                signal.raise_signal(signal.SIGINT)
                raise AssertionError("the signal was not heard")
            return original(*arguments, **more)

        monkeypatch.setattr(module, name, interrupted)

    once(encoder, "quick_accuracy")
    once(stages, "paired_gain")
    seen = []
    each_step(monkeypatch, lambda: seen.append(1))
    codes = [cli(*METATRAIN, "--out", tmp_path / "run", "--resume").code for _ in range(3)]
    assert codes == [130, 130, 0] and stops == ["quick_accuracy", "paired_gain"] and len(seen) == 24
    assert same_results(tmp_path / "run", whole) and rows(tmp_path / "run") == rows(whole)


def test_the_command_that_goes_on_is_said_and_does(
    own_cache: Path, tmp_path: Path, cli: CLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my run").mkdir()
    with monkeypatch.context() as patch:
        each_step(patch, lambda: signal.raise_signal(signal.SIGTERM))
        stopped = cli(*PRETRAIN, "--out", tmp_path / "my run", "--resume")
    assert stopped.code == 143 and "terminated" in stopped.err
    assert f"--out '{tmp_path}/my run' --resume\n" in stopped.err and stopped.err.count("--resume") == 1
    again = cli(*PRETRAIN, "--out", tmp_path / "my run", "--resume")
    assert again.code == 0 and "going on after epoch 0 of 2 and 1 of 9 steps" in again.err


def test_a_second_signal_stops_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with HeldSignals(SINGLE) as held:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped) as first:
            held.stop_if_asked()
        assert not held.twice and first.value.exit_code == 143
        with pytest.raises(Stopped) as second:
            signal.raise_signal(signal.SIGINT)
        assert held.twice and second.value.exit_code == 130
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # a third one kills
    assert signal.getsignal(signal.SIGINT) == before


def test_a_second_signal_does_not_wait_for_the_saving(
    own_cache: Path, tmp_path: Path, cli: CLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        each_step(patch, twice)
        assert cli(*PRETRAIN, "--out", tmp_path / "run").code == 130
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.yaml", ".lock"}


def test_every_write_fails_once(
    whole: Path, own_cache: Path, tmp_path: Path, cli: CLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full at the n-th renaming of the n-th try; what was written before serves the next try."""
    original, left = os.replace, 0

    def replace(source: Path, target: Path) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    for tried in range(1, 40):
        left = tried
        result = cli(*METATRAIN, "--out", tmp_path / "run", "--resume")
        if result.code == 0:
            break
        assert result.code == 1 and "No space left on device" in result.err and "--resume" in result.err
        assert not [path for path in tmp_path.rglob("*") if LEFTOVER.fullmatch(path.name)]
        for path in (tmp_path / "run").glob("*.safetensors"):
            read_header(path)
    assert result.code == 0 and tried > 5 and same_results(tmp_path / "run", whole)


def test_the_state_is_kept_now_and_then_within_an_epoch(
    own_cache: Path, tmp_path: Path, cli: CLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception in a step, as a lack of memory, loses what came after the last saving."""
    count = 0

    def fail() -> None:
        nonlocal count
        count += 1
        if count == 5:
            raise MemoryError

    monkeypatch.setattr(resume, "SAVE_EVERY", 0.0)
    with monkeypatch.context() as patch:
        each_step(patch, fail)
        assert cli(*PRETRAIN, "--out", tmp_path / "run").code == 1
    header = load_checkpoint(tmp_path / "run" / "encoder-state.safetensors", "state").header
    assert (header["plain"]["validated"], header["plain"]["step"]) == (0, 4)
    assert cli(*PRETRAIN, "--out", tmp_path / "run", "--resume").code == 0
    assert cli(*PRETRAIN, "--out", tmp_path / "whole").code == 0
    encoders = [(tmp_path / name / "encoder.safetensors").read_bytes() for name in ("run", "whole")]
    assert encoders[0] == encoders[1]


def test_a_baseline_goes_on_exactly(whole: Path, tmp_path: Path, cli: CLI, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ["--set", "baselines.frozen.steps=6", "--set", "baselines.frozen.validate_every=4",
           "--set", "baselines.frozen.validation_episodes=10", "--set", "baselines.frozen.batch=2",
           "--set", "baselines.frozen.query=5"]  # fmt: skip
    common = [*METATRAIN, *few, "--method", "anil-frozen", "--out"]
    assert cli(*common, tmp_path / "whole").code == 0
    with monkeypatch.context() as patch:
        each_step(patch, lambda: signal.raise_signal(signal.SIGINT))
        for _ in range(3):
            assert cli(*common, tmp_path / "run", "--resume").code == 130
    other = cli(*METATRAIN, *few, "--method", "metasgd-frozen", "--out", tmp_path / "run", "--resume")
    assert other.code == 2 and "method: anil-frozen -> metasgd-frozen" in other.err
    last = cli(*common, tmp_path / "run", "--resume")
    assert last.code == 0 and "going on after step 3 of 6" in last.err
    for name in (*RESULTS, STATES[0]):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_resume_of_a_missing_or_empty_folder_starts_afresh(tmp_path: Path, cli: CLI) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".config.yaml.abcd_123.tmp").write_text("killed while it wrote this", encoding="utf-8")
    for name in ("missing", "empty"):
        result = cli(*PRETRAIN, "--out", tmp_path / name, "--resume")
        assert result.code == 0 and "going on" not in result.err
    assert not (tmp_path / "empty" / ".config.yaml.abcd_123.tmp").exists()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work", encoding="utf-8")
    refused = cli(*PRETRAIN, "--out", tmp_path / "thesis", "--resume")
    assert refused.code == 2 and [path.name for path in (tmp_path / "thesis").iterdir()] == ["thesis.tex"]


def test_changed_settings_are_refused_with_the_difference(whole: Path, cli: CLI) -> None:
    before = {path: path.read_bytes() for path in whole.iterdir() if path.is_file()}
    other_seed = ["9" if word == "6" else word for word in METATRAIN]
    changed = [*other_seed, "--set", "pretrain.lr=0.25", "--set", "metatrain.ways=[3,4]"]
    result = cli(*changed, "--out", whole, "--resume")
    assert result.code == 2 and "--init-from" in result.err
    for line in ("pretrain.lr: 0.05 -> 0.25", "metatrain.ways: [5, 10] -> [3, 4]", "seed: 6 -> 9"):
        assert line in result.err
    assert "metatrain.steps" not in result.err
    assert {path: path.read_bytes() for path in whole.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    "settings",
    [
        ["evaluation.episodes=30", "evaluation.card_shots=[2]"],
        ["card.licence=mine", "card.limits=none", "summary=another", "name=other", "expect=much"],
        ["sampler.steps=4", "sampler.guidance=2"],
        ["baselines.frozen.rate=3", "baselines.images.steps=7"],
    ],
    ids=["table", "card", "sampler", "baselines"],
)
def test_settings_that_change_no_training_may_change(
    settings: list[str], whole: Path, tmp_path: Path, cli: CLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, steps = tmp_path / "run", []
    shutil.copytree(whole, run)
    each_step(monkeypatch, lambda: steps.append(1))
    given = [part for setting in settings for part in ("--set", setting)]
    result = cli(*METATRAIN, "--encoder", whole / "encoder.safetensors", *given, "--out", run, "--resume")
    assert result.code == 0, result.err
    assert not steps and "going on after step 6 of 6" in result.err
    header = read_header(run / "checkpoint.safetensors")
    if "evaluation.episodes=30" in settings:
        assert header["metrics"]["episodes"] == 30 and any("2-shot" in line for line in header["card"]["accuracy"])
    if "card.licence=mine" in settings:
        assert header["card"]["licence"] == "mine"
    before, after = (load_checkpoint(path / "checkpoint.safetensors").tensors for path in (whole, run))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_settings_of_a_pretraining_count_for_that_alone(whole: Path, tmp_path: Path, cli: CLI) -> None:
    assert cli(*PRETRAIN, "--out", tmp_path / "run").code == 0
    other = ["--set", "metatrain.steps=9", "--set", "denoiser.width=8", "--set", "features.views=2"]
    again = cli(*PRETRAIN, *other, "--out", tmp_path / "run", "--resume")
    assert again.code == 0 and "going on after epoch 2 of 2" in again.err
    refused = cli(*PRETRAIN, "--set", "pretrain.batch=8", "--out", tmp_path / "run", "--resume")
    assert refused.code == 2 and "pretrain.batch: 16 -> 8" in refused.err


def test_the_machine_may_change(whole: Path, tmp_path: Path, cli: CLI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METADIFF_CACHE_DIR", str(whole.parent / "cache"))
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    threads = torch.get_num_threads()
    try:
        result = cli(*METATRAIN, "--out", run, "--resume", "--device", "cpu", "--num-workers", "1", "--threads", "1")
    finally:
        torch.set_num_threads(threads)
    assert result.code == 0, result.err
    assert (run / "encoder.safetensors").read_bytes() == (whole / "encoder.safetensors").read_bytes()


def test_other_images_are_refused(whole: Path, tmp_path: Path, cli: CLI) -> None:
    """The same settings say nothing of the files in a folder: the state knows which images it saw."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    state = load_checkpoint(run / "state.safetensors", "state")
    header = {**state.header, "depends": {**state.header["depends"], "train": "others"}}
    save_checkpoint(run / "state.safetensors", "state", state.tensors, header)
    result = cli(*METATRAIN, "--out", run, "--resume")
    assert result.code == 2 and "(train: others -> " in result.err


def test_a_run_directory_belongs_to_one_process(tmp_path: Path, cli: CLI) -> None:
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"):
        result = cli(*PRETRAIN, "--out", tmp_path / "run", "--resume")
    assert result.code == 2 and "another run is writing to" in result.err


def test_pretraining_starts_warm(whole: Path, tmp_path: Path, cli: CLI, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []
    original = Pretrainer.run

    def run(self: Pretrainer, validate: Any) -> Any:
        begun.append({name: t.clone() for name, t in self.encoder.state_dict().items()})
        return original(self, validate)

    monkeypatch.setattr(Pretrainer, "run", run)
    for name in RESULTS:
        result = cli(*PRETRAIN, "--init-from", whole / name, "--out", tmp_path / name)
        assert result.code == 0, result.err
        kept = load_checkpoint(whole / name).part("encoder")
        assert all(torch.equal(begun[-1][key], t) for key, t in kept.items())
    other = cli(*PRETRAIN, "--encoder", "resnet10", "--init-from", whole / RESULTS[1], "--out", tmp_path / "other")
    assert other.code == 2 and "holds a conv4, not a resnet10" in other.err
    assert cli(*PRETRAIN, "--init-from", tmp_path / "gone", "--out", tmp_path / "x").code == 4
    again = cli(*PRETRAIN, "--out", tmp_path / RESULTS[0], "--resume")
    assert again.code == 2 and "init: " in again.err and " -> none" in again.err


def test_meta_training_starts_warm(whole: Path, tmp_path: Path, cli: CLI, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []
    original = MetaTrainer.run

    def run(self: MetaTrainer, validate: Any) -> Any:
        begun.append({name: t.clone() for name, t in self.averaged().state_dict().items()})
        return original(self, validate)

    monkeypatch.setattr(MetaTrainer, "run", run)
    paper = [*METATRAIN, "--set", "denoiser.kind=paper"]  # kept whatever it gives
    assert cli(*paper, "--out", tmp_path / "first").code == 0
    first = tmp_path / "first" / "checkpoint.safetensors"
    assert cli(*paper, "--init-from", first, "--out", tmp_path / "second").code == 0
    assert all(torch.equal(begun[1][name], t) for name, t in load_checkpoint(first).part("denoiser").items())
    encoders = [
        load_checkpoint(tmp_path / name / "encoder.safetensors").part("encoder") for name in ("first", "second")
    ]
    assert all(torch.equal(encoders[1][name], t) for name, t in encoders[0].items())
    other = cli(*METATRAIN, "--init-from", first, "--out", tmp_path / "other")
    assert other.code == 2 and "of kind paper" in other.err
    size = cli(*paper, "--set", "denoiser.width=48", "--init-from", first, "--out", tmp_path / "size")
    assert size.code == 2 and "another size" in size.err
    both = cli(*METATRAIN, "--encoder", whole / RESULTS[1], "--init-from", whole / RESULTS[1])
    assert both.code == 2 and "--encoder" in both.err
    method = cli(*METATRAIN, "--method", "anil-frozen", "--init-from", first)
    assert method.code == 2 and "--init-from" in method.err


def test_a_file_that_may_not_grow_ends_with_a_message(
    own_cache: Path, tmp_path: Path, cli: CLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RLIMIT_FSIZE refuses writing as a full disk does, to safetensors' own writer too, and takes no rights to set."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        each_step(patch, lambda: signal.raise_signal(signal.SIGINT))
        assert cli(*PRETRAIN, "--out", run).code == 130
    before = (run / "encoder-state.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        failed = cli(*PRETRAIN, "--out", run, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert failed.code == 1 and "File too large" in failed.err and "--resume" in failed.err
    assert (run / "encoder-state.safetensors").read_bytes() == before
    assert cli(*PRETRAIN, "--out", run, "--resume").code == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)]
    if mount is None or subprocess.run([mount, *options], check=False, capture_output=True).returncode:
        pytest.skip("nobody may mount a tmpfs here; RLIMIT_FSIZE stands in for a full disk in the test above")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(disk: Path, left: int) -> Path:
    """A file that leaves so many bytes of a disk."""
    filler = disk / "filler"
    filler.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - left)))
    return filler


def test_a_full_disk_ends_with_a_message_and_the_last_state(
    whole: Path, own_cache: Path, small_disk: Path, cli: CLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small_disk / "run"
    with monkeypatch.context() as patch:
        each_step(patch, lambda: signal.raise_signal(signal.SIGINT))
        assert cli(*METATRAIN, "--out", run).code == 130
    state = (run / STATES[1]).read_bytes()
    filler = fill(small_disk, len(state) // 2)
    failed = cli(*METATRAIN, "--out", run, "--resume")
    assert failed.code == 1 and "No space left on device" in failed.err and "--resume" in failed.err
    assert (run / STATES[1]).read_bytes() == state
    assert not [path for path in run.iterdir() if LEFTOVER.fullmatch(path.name)]
    filler.unlink()
    assert cli(*METATRAIN, "--out", run, "--resume").code == 0
    assert same_results(run, whole)


def test_a_cache_on_a_full_disk_is_no_bus_error(
    small_disk: Path, tmp_path: Path, cli: CLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoded images go into a memory-mapped file; another process may take the room that was there before."""
    monkeypatch.setenv("METADIFF_CACHE_DIR", str(small_disk))
    fill(small_disk, 100_000)
    room = shutil.disk_usage(tmp_path)
    for usage, code, message in ((None, 3, "METADIFF_CACHE_DIR"), (room, 1, "No space left on device")):
        with monkeypatch.context() as patch:
            if usage is not None:
                patch.setattr(shutil, "disk_usage", lambda folder: room)
            result = cli(*PRETRAIN, "--out", tmp_path / "run", "--resume")
        assert result.code == code and message in result.err


def test_a_cache_that_cannot_be_written_to_is_said_and_done_without(
    whole: Path, tmp_path: Path, cli: CLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "file").write_text("no folder, for root too", encoding="utf-8")
    monkeypatch.setenv("METADIFF_CACHE_DIR", str(tmp_path / "file" / "cache"))
    result = cli(*METATRAIN, "--out", tmp_path / "run")
    assert result.code == 0, result.err
    for what in ("decoded images are kept in", "the encoder is kept in", "features are kept in"):
        assert f"cannot be written to: {what} {tmp_path}/temporary/" in result.err
    assert same_results(tmp_path / "run", whole)
