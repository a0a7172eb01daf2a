"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings each."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

from metadist.checks.values import require_bool
from metadist.tasks.data.images import look_into, read_images, require_format
from metadist.tasks.few_shot.class_splits import packaged_splits, read_splits, select_classes
from metadist.tasks.few_shot.episodes import ClassImages, EpisodeSampler, require_episode

PARTS = ("images_background", "images_evaluation")
PACKAGED = {"characters": "omniglot.json", "alphabets": "omniglot_alphabets.json"}


class Omniglot(EpisodeSampler):
    """A sampler of N-way K-shot tasks of white ink on black, (1, image_size, image_size).

    Splits, fixed in this package:

    * "characters": 1,100 / 100 / 423 characters, alphabets mixed, as is usual since MAML. The list
      is the 1,623 names `alphabet/character` in the order of their SHA-256. It is our own: MAML
      and its successors drew theirs from a program's random state, so there is no list of theirs
      to agree with. Expect the same difficulty, not the same tasks.
    * "alphabets": no alphabet is in two splits; harder. Test is the 20 evaluation alphabets (659
      characters); val is Armenian, Bengali, Early Aramaic, Hebrew and Mkhedruli (172); train is
      the other 25 background alphabets (792).
    * or the path of a JSON file with names like "Latin/character03"; see `read_splits`.

    The drawings are read from `<root>/omniglot-py/images_background` and `images_evaluation`, from
    the same two folders in `root`, or from `<root>/<alphabet>/<character>/*.png`. Where there is
    none and `download` is set, torchvision's two archives are fetched into `<root>/omniglot-py`
    and their md5 is checked; archives that lie there already are used. Those of the training
    split take 17 MB of memory at 28x28, and travel with a pickled sampler.

    Args:
        root: The folder; see above.
        download: Fetch what is missing.
        n_way, k_shot, k_query, seed: As for `EpisodeSampler`; k_shot + k_query <= 20.
        split: One of train, val and test, or a name in the splits file.
        splits: "characters", "alphabets" or the path of a JSON file; see above.
        rotations: Characters turned by 90, 180 and 270 degrees count as classes of their own, in
            the same split (usual for training).
        image_size: Pixels; the drawings are 105x105.

    Raises:
        ValueError: bad sizes or splits, or an unreadable drawing.
        FileNotFoundError: drawings are missing; says which, and what to do.

    Source: Lake et al., Human-level concept learning through probabilistic program induction
    (Science 2015).
    """

    invert = True

    def __init__(
        self,
        root: str | Path = "data",
        download: bool = True,
        n_way: int = 5,
        k_shot: int = 1,
        k_query: int = 15,
        split: str = "train",
        seed: int = 0,
        splits: str = "characters",
        rotations: bool = False,
        image_size: int = 28,
    ) -> None:
        require_episode(n_way, k_shot, k_query, seed)
        require_bool(download=download, rotations=rotations)
        require_format(image_size, 1)
        self.root, self.download, self.splits = root, download, splits
        self.image_size = image_size
        names = _names_of_split(splits, split)
        root = Path(root).expanduser()
        folders = _find(root, names)
        if download and None in folders.values():
            _download(root)
            folders = _find(root, names)
        files = {name: look_into(folder).images for name, folder in folders.items() if folder}
        _require_all(root, names, [name for name in names if not files.get(name)])
        classes = ClassImages.of(read_images(files, image_size, channels=1, invert=self.invert))
        super().__init__(classes, n_way, k_shot, k_query, split, seed, rotations)


def _names_of_split(splits: str, split: str) -> list[str]:
    names = sorted(map(str, chain(*packaged_splits(PACKAGED["characters"]).values())))
    known: dict[str | int, int] = {name: i for i, name in enumerate(names)}
    content = packaged_splits(PACKAGED[splits]) if splits in PACKAGED else read_splits(splits)
    return [names[i] for i in select_classes(content, split, known)]


def _find(root: Path, names: list[str]) -> dict[str, Path | None]:
    """The folder of each character, the first that there is, or None."""
    below = root / "omniglot-py"
    places = [*map(below.joinpath, PARTS), *map(root.joinpath, PARTS), below, root]
    places = [place for place in places if place.is_dir()]
    found: dict[str, Path | None] = dict.fromkeys(names)
    for name in names:
        for place in places:
            if (place / name).is_dir():
                found[name] = place / name
                break
    return found


def _download(root: Path) -> None:
    from torchvision.datasets import Omniglot as Original  # here, because it takes a second
    from torchvision.datasets.utils import download_and_extract_archive

    folder = root / "omniglot-py"
    for part in PARTS:
        url = f"{Original.download_url_prefix}/{part}.zip"
        md5 = Original.zips_md5[part]
        try:
            download_and_extract_archive(url, str(folder), filename=f"{part}.zip", md5=md5)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"Omniglot cannot be downloaded to {folder}: {error}. {_way_out(root)}"
            ) from error


def _require_all(root: Path, names: list[str], missing: list[str]) -> None:
    if missing:
        raise FileNotFoundError(
            f"Omniglot in {root} must hold every character of the split, got {len(missing)} of "
            f"{len(names)} missing, such as {missing[0]}. {_way_out(root)}"
        )


def _way_out(root: Path) -> str:
    return (
        f"Put images_background.zip and images_evaluation.zip (github.com/brendenlake/omniglot, "
        f"folder python), or their contents, into {root / 'omniglot-py'} and use download=True to "
        "unpack them; or name another root; or list the characters there are in a file and pass "
        "it as splits"
    )
