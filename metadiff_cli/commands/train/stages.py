"""The stages of `metatrain`: encoder, features, metric, fitting, denoiser, table, checkpoint."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from metadiff_cli.commands.evaluate.domains import domains_document
from metadiff_cli.commands.evaluate.measure import measure
from metadiff_cli.commands.runtime import sampling_of
from metadiff_cli.commands.train.card import model_card
from metadiff_cli.commands.train.encoder import find_encoder
from metadiff_cli.commands.train.few_images import measured_split
from metadiff_cli.commands.train.resume import Update, follow, show_step
from metadiff_cli.commands.train.run_folder import CHECKPOINT, STATE
from metadiff_cli.commands.train.training import Base, Training
from metadiff_cli.core.checkpoints.model import Model, save_model
from metadiff_cli.core.encoders.bank import FeatureBank
from metadiff_cli.core.encoders.image_encoder import ImageEncoder
from metadiff_cli.core.evaluation.controls import Fitted
from metadiff_cli.core.evaluation.evaluate import Protocol
from metadiff_cli.core.method.adapt import MetaDiff, Tuning
from metadiff_cli.core.method.calibration import TaskTable
from metadiff_cli.core.method.descent import NO_DESCENT
from metadiff_cli.core.method.metric import Metric
from metadiff_cli.core.method.task_space import (
    TaskSpace,
    class_means,
    class_statistics,
    cross_fitted,
    identity_space,
)
from metadiff_cli.core.training.fit import (
    SHRINKAGE,
    choose_shrinkage,
    fit_confidences,
    fit_tuning,
    fitting,
    paired_gain,
)
from metadiff_cli.core.training.metatrain import (
    MetaStep,
    MetaTrainer,
    MetaValidation,
    deal,
    images_needed,
    pools_of,
)

CONFIRMING = 1000  # episodes, at least, of the last comparison with the analytic denoiser
PAPER = Tuning(domain=TaskTable.constant(0.0), prior=TaskTable.constant(NO_DESCENT))  # the form as it was published
TABLE = ("prototype", "analytic", "logreg")  # the controls of the final table
METRICS = ("learned", "way", "shot", "query", "episodes", "seed")  # of the table, in the header

Domains = Mapping[str, FeatureBank]  # classes for validation or for the final table, by the name of their data set


def train_metadiff(t: Training, *, drawn: bool = False) -> dict[str, Any]:
    """All stages; returns the result document, with what became of the learned part under `learned`.

    With `drawn`, the document also holds what only a page draws.
    """
    images = find_encoder(t)
    base, val = t.base(images), t.validation(images)
    split, measured = _measured(t, images, val)
    start = fitted_model(t, images, base, val)
    learned: dict[str, Any] = {"kind": t.config.denoiser.kind, "kept": False, "gain": None, "ci95": None}
    metadiff = start.metadiff
    if t.config.denoiser.kind != "analytic":
        metadiff, learned = train_denoiser(t, images, base, start, val)
    final = partial(_measure_and_save, t, images, metadiff, start.controls, learned, base.bank.classes, drawn=drawn)
    return t.group.on_rank_zero(lambda: final(measured, split))


def _measured(t: Training, images: ImageEncoder, val: Domains) -> tuple[str, Domains]:
    """The split that the final table is measured on, and its classes.

    They are the validation classes of all data sets where some were given for validation, else those of the first set.
    """
    if t.validated and val:
        return "val", val
    split, name = measured_split(t.source.dataset.splits), t.source.dataset.name
    if t.further:
        t.screen.note(f"the table at the end is measured on the {split} classes of {name}")
    return split, {name: t.features(images, split)}


@dataclass(frozen=True)
class FittedModel:
    """What needs no training of a denoiser: MetaDiff without a learned part, and what was fitted for the controls.

    `means` (C, D) are those of the base classes; a denoiser is trained in the `spaces` of their `parts` (see `deal`).
    """

    metadiff: MetaDiff
    controls: Fitted
    means: Tensor
    parts: list[int]
    spaces: dict[int, TaskSpace]


def fitted_model(t: Training, images: ImageEncoder, base: Base, val: Domains) -> FittedModel:
    """MetaDiff with the analytic denoiser in the metric of the base classes, fitted on validation classes.

    Without these, the tuning keeps its defaults.
    """
    kind, banks = t.config.denoiser.kind, list(val.values())
    parts = [] if kind == "analytic" else deal(base.sets, images_needed(t.config.metatrain), kind, t.config.seed)
    make = _paper_spaces if kind == "paper" else _task_spaces
    space, means, spaces = t.group.on_rank_zero(lambda: make(t, images, base, parts, banks))
    metric = Metric(images.groups, space.to(t.device), plain=kind != "paper")
    metadiff = MetaDiff(metric, tuning=PAPER if kind == "paper" else Tuning(), targets=means.float().to(t.device))
    if not banks:
        t.screen.warn("no validation classes: hyper-parameters and confidence keep their defaults, nothing is selected")
        return FittedModel(metadiff, {}, means, parts, spaces)
    tuning, controls = t.group.on_rank_zero(
        lambda: fit_tuning(metadiff, banks, t.device, seed=t.config.seed, note=t.screen.detail)
    )
    return FittedModel(replace(metadiff, tuning=tuning), controls, means, parts, spaces)


def _task_spaces(
    t: Training, images: ImageEncoder, base: Base, parts: list[int], banks: list[FeatureBank]
) -> tuple[TaskSpace, Tensor, dict[int, TaskSpace]]:
    """The task space with the shrinkage that validation classes prefer, the class means, and the space of each part."""
    classes = base.bank.by_class()
    if parts:
        statistics, others = cross_fitted(classes, images.groups, parts)
    else:
        statistics, others = class_statistics(classes, images.groups), {}
    if statistics.collapsed:
        t.screen.warn(
            "the base classes differ by less than the noise of their means: the variance between classes is set to a "
            "small multiple of that within them"
        )
    shrink = SHRINKAGE[0]
    if banks:
        shrink = choose_shrinkage(statistics, banks, t.device, seed=t.config.seed, note=t.screen.detail)
        t.screen.detail(f"shrinkage {shrink[0]:g} within classes and {shrink[1]:g} between, by validation classes")
    spaces = {part: of.task_space(*shrink) for part, of in others.items()}
    return statistics.task_space(*shrink), statistics.means, spaces


def _paper_spaces(
    t: Training, images: ImageEncoder, base: Base, parts: list[int], banks: list[FeatureBank]
) -> tuple[TaskSpace, Tensor, dict[int, TaskSpace]]:
    """The features as they are, for all classes."""
    means = class_means(base.bank.by_class())
    space = identity_space(means)
    return space, means, dict.fromkeys({part for part in parts if part >= 0}, space)


def train_denoiser(
    t: Training, images: ImageEncoder, base: Base, start: FittedModel, val: Domains
) -> tuple[MetaDiff, dict[str, Any]]:
    """Train, select by the paired gain over the analytic denoiser, and confirm the choice on fresh episodes.

    Returns the better of the two, and what became of the learned part.
    """
    config, banks, group = t.config, list(val.values()), t.group
    e, m, kind, space = config.evaluation, config.metatrain, config.denoiser.kind, start.metadiff.metric.space
    assert space is not None
    trainer = MetaTrainer(
        base.bank, pools_of(base.sets, start.parts), start.spaces, space, config.denoiser, m, means=start.means,
        tuning=start.metadiff.tuning, seed=config.seed, device=t.device, group=group,
    )  # fmt: skip
    t.start.begin(trainer)
    selection = Protocol(e.way, e.shot, e.query, m.validation_episodes, config.seed + 1)
    most_shots = m.shots[1] if kind == "unet" else None

    def with_denoiser(denoiser: nn.Module) -> MetaDiff:
        return replace(start.metadiff, denoiser=denoiser, learned=True, most_shots=most_shots)

    def gain_of(denoiser: nn.Module, protocol: Protocol) -> tuple[float, float] | None:
        candidate = with_denoiser(denoiser)
        return group.on_rank_zero(lambda: paired_gain(candidate, banks, protocol, t.device)) if banks else None

    follow(
        trainer, lambda denoiser: gain_of(denoiser, selection), partial(_show, t, trainer), label="meta-training",
        run=t.run, state=STATE, identity=t.identity("metadiff", images), screen=t.screen,
    )  # fmt: skip
    learned: dict[str, Any] = {"kind": kind, "kept": not banks, "gain": None, "ci95": None}
    fresh = replace(selection, seed=config.seed + 2, episodes=max(m.validation_episodes, CONFIRMING))
    if (measured := gain_of(trainer.chosen(), fresh)) is not None:
        gain, ci95 = measured
        learned |= {"gain": round(gain, 4), "ci95": round(ci95, 4), "episodes": fresh.episodes}
        # the denoiser `paper` is kept whatever it gives: it is there to be measured
        learned["kept"] = gain - ci95 > 0 or kind == "paper"
    if not learned["kept"]:
        return start.metadiff, learned
    metadiff = with_denoiser(trainer.chosen())
    if banks:
        tuning = group.on_rank_zero(lambda: fit_confidences(metadiff, banks, t.device, seed=config.seed))
        metadiff = replace(metadiff, tuning=tuning)
    return metadiff, learned


def _show(t: Training, trainer: MetaTrainer, record: MetaStep | MetaValidation, update: Update) -> bool:
    measured = ""
    if isinstance(record, MetaValidation) and record.gain is not None:
        measured = f"  gain over analytic {record.gain:+.2f} ± {record.ci95:.2f}"
    return show_step(t.run, trainer, t.screen, record, update, measured)


def _measure_and_save(
    t: Training,
    images: ImageEncoder,
    metadiff: MetaDiff,
    controls: Fitted,
    learned: dict[str, Any],
    classes: tuple[str, ...],
    domains: Domains,
    split: str,
    *,
    drawn: bool,
) -> dict[str, Any]:
    """Measure the model on the classes of `domains` and write its checkpoint; returns the result document."""
    config = t.config
    header: dict[str, Any] = {
        "config": config.model_dump(mode="json", exclude={"runtime"}),
        "classes": list(classes),
        "controls": described(controls),
        "denoiser": {"kind": config.denoiser.kind if learned["kept"] else "analytic", "width": config.denoiser.width},
    }
    e, model = config.evaluation, Model(images, metadiff, header)
    results: list[dict[str, Any]] = []
    for shot in dict.fromkeys((e.shot, *e.card_shots)):
        protocol = Protocol(e.way, shot, e.query, e.episodes, config.seed)
        wanted = drawn and not results
        results.append(_table(t, model, domains, split, protocol, drawn=wanted))
    result = {**results[0], "learned": learned}
    sets = [source.dataset.name for source in t.sources if source.has("train")] if t.further else []
    header["card"] = model_card(config, images.name, images.size, len(classes), results, verdict(learned), sets)
    methods = result["mean"] if "mean" in result else result["methods"]
    header["metrics"] = {"methods": methods, "split": split, **{key: result[key] for key in METRICS}}
    save_model(t.run.folder / CHECKPOINT, images, metadiff, header)
    return result


def _table(
    t: Training, model: Model, domains: Domains, split: str, protocol: Protocol, *, drawn: bool
) -> dict[str, Any]:
    """The result document: of one data set, or of several with the mean over them."""
    documents = []
    for name, bank in domains.items():
        fits = (bank, protocol) if len(domains) == 1 and not t.validated else fitting(bank, protocol)
        if len(domains) > 1:
            t.screen.note(f"measuring {name}")
        document = measure(model, fits[0], split, fits[1], sampling_of(t.config), TABLE, t.screen, drawn=drawn)
        documents.append({"name": name, **document} if t.further else document)
    return documents[0] if len(documents) == 1 else {**domains_document(documents, protocol), "split": split}


def described(controls: Fitted) -> dict[str, Any]:
    """The settings of the controls as a header has them."""
    return {name: [asdict(settings) for settings in found] for name, found in controls.items()}


def verdict(learned: dict[str, Any]) -> str:
    """One sentence on whether the learned part helped."""
    if learned["kind"] == "analytic":
        return "none was trained; the denoiser is the analytic one"
    if learned["gain"] is None:
        return "kept unmeasured, as there are no validation classes"
    gain = f"{learned['gain']:+.2f} ± {learned['ci95']:.2f} points over analytic on validation classes"
    if learned["kept"]:
        helped = "helped" if learned["gain"] - learned["ci95"] > 0 else "did not help, but is kept as asked"
        return f"{learned['kind']}: {helped}, {gain}"
    return f"{learned['kind']}: did not help ({gain}); the checkpoint holds the analytic denoiser"


def analytic_parts(t: Training) -> tuple[ImageEncoder, FeatureBank, FeatureBank | None, FittedModel]:
    """What a baseline on features starts from.

    That is the encoder, the features of base and validation classes, and the tuned MetaDiff with the analytic denoiser.
    """
    config = t.config.model_copy(update={"denoiser": t.config.denoiser.model_copy(update={"kind": "analytic"})})
    images = find_encoder(t)
    base, val = t.base(images), t.validation(images)
    start = fitted_model(replace(t, config=config), images, base, val)
    return images, base.bank, next(iter(val.values()), None), start
