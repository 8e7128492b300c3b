"""The data sets that have a layout and class splits here: what they are, who allows what, and how to get them."""

from dataclasses import dataclass

from metadiff_cli.errors import ConfigError, suggest

IMAGENET = "ImageNet's terms of access: non-commercial research and education"
UNSTATED = "none stated by its authors"


@dataclass(frozen=True)
class Known:
    """One data set. `download` says that torchvision gets it; `archives` what `--from-archive` takes."""

    name: str
    what: str
    licence: str
    home: str
    splits: str
    download: bool = False
    archives: str = ""


KNOWN = {
    "glyphs": Known(
        "glyphs", "handwriting-like characters, drawn by a seeded generator", "MIT, as this package",
        "drawn, nothing to download", "by class, any number",
    ),
    "omniglot": Known(
        "omniglot", "handwritten characters of 50 alphabets", "MIT", "https://github.com/brendenlake/omniglot",
        "Vinyals et al. 2016", True, "images_background.zip and images_evaluation.zip",
    ),
    "cifar-fs": Known(
        "cifar-fs", "CIFAR-100, split by class; 32 x 32", UNSTATED, "https://www.cs.toronto.edu/~kriz/cifar.html",
        "Bertinetto et al. 2019", True, "cifar-100-python.tar.gz",
    ),
    "fc100": Known(
        "fc100", "CIFAR-100, split by superclass; 32 x 32", UNSTATED, "https://www.cs.toronto.edu/~kriz/cifar.html",
        "Oreshkin et al. 2018", True, "cifar-100-python.tar.gz",
    ),
    "mini-imagenet": Known(
        "mini-imagenet", "100 classes of ImageNet photos", IMAGENET, "https://www.image-net.org",
        "Ravi & Larochelle 2017", archives="images/ with train.csv, val.csv, test.csv; or class folders by WordNet id",
    ),
    "tiered-imagenet": Known(
        "tiered-imagenet", "608 classes of ImageNet photos, split by superclass", IMAGENET, "https://www.image-net.org",
        "Ren et al. 2018", archives="class folders by WordNet id, in train/, val/, test/ or together",
    ),
    "cub": Known(
        "cub", "photos of 200 kinds of birds", UNSTATED,
        "https://www.vision.caltech.edu/datasets/cub_200_2011/", "Chen et al. 2019", archives="CUB_200_2011.tgz",
    ),
}  # fmt: skip


def known(name: str) -> Known:
    """The data set of that name. Raises ConfigError with a suggestion when there is none."""
    if name in KNOWN:
        return KNOWN[name]
    if name in ("cifar-100", "cifar100"):
        raise ConfigError(f"'{name}' has two class splits", hint="choose cifar-fs or fc100; they share the download")
    raise ConfigError(f"unknown data set '{name}'", hint=f"{suggest(name, KNOWN)}`metadiff data list` shows all")
