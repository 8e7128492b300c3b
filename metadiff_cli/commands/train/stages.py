"""The stages of `metatrain`: encoder, features, task space, denoiser, fitting, table, checkpoint."""

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from metadiff_cli.commands.evaluate.measure import measure
from metadiff_cli.commands.settings import sampling_of
from metadiff_cli.commands.train.card import model_card
from metadiff_cli.commands.train.encoder import find_encoder
from metadiff_cli.commands.train.resume import Update, follow, show_step
from metadiff_cli.commands.train.run_folder import CHECKPOINT, STATE
from metadiff_cli.commands.train.training import Training
from metadiff_cli.core.checkpoints.model import Model, save_model
from metadiff_cli.core.encoders.bank import FeatureBank
from metadiff_cli.core.encoders.image_encoder import ImageEncoder
from metadiff_cli.core.evaluation.evaluate import Protocol
from metadiff_cli.core.method.adapt import MetaDiff, Tuning
from metadiff_cli.core.method.denoisers import AnalyticDenoiser
from metadiff_cli.core.method.guidance import shared_of
from metadiff_cli.core.method.task_space import TaskSpace, class_means, class_statistics, identity_space
from metadiff_cli.core.training.fit import SHRINKAGE, choose_shrinkage, fit_tuning, paired_gain
from metadiff_cli.core.training.metatrain import MetaStep, MetaTrainer, MetaValidation

CONFIRMING = 1000  # episodes, at least, of the last comparison with the analytic denoiser
METRICS = ("methods", "split", "learned", "way", "shot", "query", "episodes", "seed")  # of the table, in the header


def train_metadiff(t: Training, *, drawn: bool = False) -> dict[str, Any]:
    """All stages; returns the result document, with what became of the learned part under `learned`.

    With `drawn`, the document also holds what only a page draws.
    """
    images = find_encoder(t)
    base = t.features(images, "train")
    val = t.features(images, "val") if t.source.has("val") else None
    split = "test" if t.source.has("test") else "val" if val is not None else "train"
    measured = t.features(images, split)
    metadiff, means = analytic_start(t, images, base, val)
    learned: dict[str, Any] = {"kind": t.config.denoiser.kind, "kept": False, "gain": None, "ci95": None}
    if t.config.denoiser.kind != "analytic":
        metadiff, learned = train_denoiser(t, images, metadiff, base, means, val)
    metadiff = tuned(t, metadiff, val)
    return t.group.on_rank_zero(
        lambda: _measure_and_save(t, images, metadiff, learned, base.classes, measured, split, drawn=drawn)
    )


def analytic_start(
    t: Training, images: ImageEncoder, base: FeatureBank, val: FeatureBank | None
) -> tuple[MetaDiff, Tensor]:
    """MetaDiff with the analytic denoiser in the task space of the base classes, and their means (C, D) as features."""
    kind = t.config.denoiser.kind
    space, means = t.group.on_rank_zero(
        lambda: _paper_space(base) if kind == "paper" else _task_space(t, images, base, val)
    )
    space = space.to(t.device)
    targets = space.to_task(means.float().to(t.device))
    return MetaDiff(space, AnalyticDenoiser(), False, Tuning(shared=shared_of(kind)), targets), means


def _task_space(
    t: Training, images: ImageEncoder, base: FeatureBank, val: FeatureBank | None
) -> tuple[TaskSpace, Tensor]:
    """The task space with the shrinkage that validation classes prefer, and the means of the base classes."""
    statistics = class_statistics(base.by_class())
    shrink = SHRINKAGE[0]
    if val is not None:
        shrink = choose_shrinkage(statistics, val, t.device, seed=t.config.seed)
        t.screen.detail(f"shrinkage {shrink[0]:g} within classes and {shrink[1]:g} between, by validation classes")
    return statistics.task_space(*shrink), statistics.means


def _paper_space(base: FeatureBank) -> tuple[TaskSpace, Tensor]:
    """The features as they are; each class is given as its mean alone, as this space needs no more."""
    means = class_means(base.by_class())
    return identity_space(means.unsqueeze(1)), means


def train_denoiser(
    t: Training,
    images: ImageEncoder,
    metadiff: MetaDiff,
    base: FeatureBank,
    means: Tensor,
    val: FeatureBank | None,
) -> tuple[MetaDiff, dict[str, Any]]:
    """Train, select by the paired gain over the analytic denoiser, and confirm the choice on fresh episodes.

    Returns the better of the two, and what became of the learned part.
    """
    e, m, kind = t.config.evaluation, t.config.metatrain, t.config.denoiser.kind
    trainer = MetaTrainer(
        base, metadiff.space, t.config.denoiser, m, seed=t.config.seed, device=t.device, means=means, group=t.group
    )
    t.start.begin(trainer)
    selection = Protocol(e.way, e.shot, e.query, m.validation_episodes, t.config.seed + 1)

    def gain_of(denoiser: nn.Module, protocol: Protocol) -> tuple[float, float] | None:
        candidate = replace(metadiff, denoiser=denoiser, learned=True)
        return None if val is None else t.group.on_rank_zero(lambda: paired_gain(candidate, val, protocol, t.device))

    follow(
        trainer, lambda denoiser: gain_of(denoiser, selection), partial(_show, t, trainer), label="meta-training",
        run=t.run, state=STATE, identity=t.identity("metadiff", images), screen=t.screen,
    )  # fmt: skip
    learned: dict[str, Any] = {"kind": kind, "kept": val is None, "gain": None, "ci95": None}
    fresh = replace(selection, seed=t.config.seed + 2, episodes=max(m.validation_episodes, CONFIRMING))
    if (measured := gain_of(trainer.chosen(), fresh)) is not None:
        gain, ci95 = measured
        learned |= {"gain": round(gain, 4), "ci95": round(ci95, 4), "episodes": fresh.episodes}
        # the denoiser `paper` is kept whatever it gives: it is there to be measured
        learned["kept"] = gain - ci95 > 0 or kind == "paper"
    return replace(metadiff, denoiser=trainer.chosen(), learned=True) if learned["kept"] else metadiff, learned


def _show(t: Training, trainer: MetaTrainer, record: MetaStep | MetaValidation, update: Update) -> bool:
    measured = ""
    if isinstance(record, MetaValidation) and record.gain is not None:
        measured = f"  gain over analytic {record.gain:+.2f} ± {record.ci95:.2f}"
    return show_step(t.run, trainer, t.screen, record, update, measured)


def tuned(t: Training, metadiff: MetaDiff, val: FeatureBank | None) -> MetaDiff:
    """MetaDiff with guidance, confidence and rejection fitted on validation classes, if there are any."""
    if val is None:
        t.screen.warn("no validation classes: guidance and confidence keep their defaults, and nothing is selected")
        return metadiff
    seed, query = t.config.seed, t.config.evaluation.query
    return metadiff.tuned(t.group.on_rank_zero(lambda: fit_tuning(metadiff, val, t.device, seed=seed, query=query)))


def _measure_and_save(
    t: Training,
    images: ImageEncoder,
    metadiff: MetaDiff,
    learned: dict[str, Any],
    classes: tuple[str, ...],
    bank: FeatureBank,
    split: str,
    *,
    drawn: bool,
) -> dict[str, Any]:
    """Measure the model on the classes of `bank` and write its checkpoint; returns the result document."""
    config = t.config
    header: dict[str, Any] = {
        "config": config.model_dump(mode="json", exclude={"runtime"}),
        "classes": list(classes),
        "denoiser": {"kind": config.denoiser.kind if learned["kept"] else "analytic", "width": config.denoiser.width},
    }
    e, controls = config.evaluation, ("prototype", "analytic", "untrained")
    model, sampling = Model(images, metadiff, header), sampling_of(config)
    results: list[dict[str, Any]] = []
    for shot in dict.fromkeys((e.shot, *e.card_shots)):
        protocol = Protocol(e.way, shot, e.query, e.episodes, config.seed)
        wanted = drawn and not results
        results.append(measure(model, bank, split, protocol, sampling, controls, t.screen, drawn=wanted))
    result = {**results[0], "learned": learned}
    header["card"] = model_card(config, images.name, images.size, len(classes), results, verdict(learned))
    header["metrics"] = {key: result[key] for key in METRICS}
    save_model(t.run.folder / CHECKPOINT, images, metadiff, header)
    return result


def verdict(learned: dict[str, Any]) -> str:
    """One sentence on whether the learned part helped."""
    if learned["kind"] == "analytic":
        return "none was asked for; the denoiser is the analytic one"
    if learned["gain"] is None:
        return "kept unmeasured, as there are no validation classes"
    gain = f"{learned['gain']:+.2f} ± {learned['ci95']:.2f} points over analytic on validation classes"
    if learned["kept"]:
        helped = "helped" if learned["gain"] - learned["ci95"] > 0 else "did not help, but is kept as asked"
        return f"{learned['kind']}: {helped}, {gain}"
    return f"{learned['kind']}: did not help ({gain}); the checkpoint holds the analytic denoiser"


def analytic_parts(t: Training) -> tuple[ImageEncoder, FeatureBank, FeatureBank | None, MetaDiff]:
    """What a baseline on features starts from.

    That is the encoder, the features of base and validation classes, and the tuned MetaDiff with the analytic denoiser.
    """
    config = t.config.model_copy(update={"denoiser": t.config.denoiser.model_copy(update={"kind": "analytic"})})
    images = find_encoder(t)
    base = t.features(images, "train")
    val = t.features(images, "val") if t.source.has("val") else None
    metadiff, _ = analytic_start(replace(t, config=config), images, base, val)
    return images, base, val, tuned(t, metadiff, val)
