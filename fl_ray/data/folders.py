"""Images in folders by domain and class: PACS, DomainNet, NICO++, OpenImage, or one's own."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from fl_ray.data.datasets import ImageData, read_image
from fl_ray.errors import DataMissingError, SettingError, require

__all__ = ["Layout", "image_folder"]

Layout = Literal["domain/class", "class/domain", "class/own"]
_SPLITS = ("train", "test")
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True)
class _Image:
    """A file, the names of the two folders that say what it is, and its part of the data."""

    file: Path
    outer: str
    inner: str
    part: str


def image_folder(
    root: Path,
    download: bool,
    path: str,
    image_size: int = 32,
    layout: Layout = "domain/class",
    domains: list[str] | int | None = None,
    per_class: int | None = None,
    owners: str | None = None,
) -> ImageData:
    """Images in folders, resized square to RGB; several domains.

    ``root/path`` holds ``<outer>/<inner>/*``, or ``<outer>/<split>/<inner>/*`` with splits ``train`` and ``test``.

    Args:
        root: the data folder. ``download`` has no effect here.
        path: the set's folder inside ``root``.
        image_size: pixels.
        layout: what the folders are. ``class/domain``: all classes have the same domains (NICO++'s common contexts);
            ``class/own``: each has its own, and its k-th by name belongs to domain k (NICO++'s unique contexts,
            OpenImage's sub-categories of a super-category).
        domains: which domains to use, in this order, or how many: the first by name; default: all, by name.
        per_class: use at most so many training images of each class and domain, chosen at random once and for all;
            where there is no test part, test images come out of these.
        owners: natural client ids: ``domain``, or a CSV file (inside the set's folder) with the columns ``path``
            (relative to the set's folder) and ``client``.
    """
    base = root / path
    if not base.is_dir():
        raise DataMissingError(
            f"data image_folder: no folder {base}. Give its parent as --data.root DIR or $FL_RAY_DATA, and its name as "
            "--data.path NAME; there is no download for folders"
        )
    require(per_class is None or per_class >= 1, "data.per_class", per_class, "at least 1")
    outers = _folders(base)
    if layout == "domain/class" and isinstance(domains, list):  # what stands beside them is not looked at
        outers = [base / name for name in domains]
    found = [image for outer in outers for image in _walk(outer)]
    if not found:
        raise SettingError(
            f"data image_folder: no images in {base}/<outer>/<inner>/ or {base}/<outer>/<split>/<inner>/"
        )
    names, number_of = _numbered(found, layout, domains)
    numbered = [(number_of(image), image) for image in found]
    used = sorted((pair for pair in numbered if pair[0] is not None), key=lambda pair: pair[0])
    class_of = (lambda image: image.inner) if layout == "domain/class" else (lambda image: image.outer)
    classes = sorted({class_of(image) for _, image in used})
    if per_class is not None:
        used = _at_most(per_class, used, class_of)
    arrays: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    for part in _SPLITS:
        chosen = [(domain, image) for domain, image in used if image.part == part]
        images = np.empty((len(chosen), 3, image_size, image_size), dtype=np.uint8)
        for row, (_, image) in enumerate(chosen):
            images[row] = read_image(image.file, image_size)
        labels = np.array([classes.index(class_of(image)) for _, image in chosen], dtype=np.int64)
        arrays[part] = images, labels, np.array([domain for domain, _ in chosen], dtype=np.int64)
    train, test = arrays["train"], arrays["test"]
    tests: tuple[np.ndarray | None, ...] = test if len(test[1]) else (None, None, None)
    owner_list = None
    if owners is not None:
        owner_of = _owners(base, owners)
        own = [owner_of(domain, image.file) for domain, image in used if image.part == "train"]
        owner_list = np.array(own, dtype=np.int64)
    grey = [0.5] * 3
    return ImageData(train[0], train[1], classes, grey, grey, tests[0], tests[1], train[2], tests[2], names, owner_list)


def _folders(inside: Path) -> list[Path]:
    return sorted(entry for entry in inside.iterdir() if entry.is_dir())


def _walk(outer: Path) -> list[_Image]:
    """The images of an outer folder; without split folders everything is of the training part."""
    if not outer.is_dir():
        raise SettingError(f"data.domains: no folder {outer.name!r} in {outer.parent}")
    inside = _folders(outer)
    # DomainNet and NICO++ have a class "train", which holds images: a split holds folders.
    splits = [(folder.name, _folders(folder)) for folder in inside if folder.name in _SPLITS and _folders(folder)]
    found = []
    for part, folders in splits or [("train", inside)]:
        for inner in folders:
            files = sorted(file for file in inner.iterdir() if file.suffix.lower() in _SUFFIXES)
            if not files:
                raise SettingError(f"data image_folder: the folder {inner} holds no images")
            found += [_Image(file, outer.name, inner.name, part) for file in files]
    return found


def _numbered(
    found: Sequence[_Image], layout: Layout, domains: list[str] | int | None
) -> tuple[list[str], Callable[[_Image], int | None]]:
    """The domains' names, and what gives an image's domain by number: None where that is not used."""
    if layout == "class/own":
        if isinstance(domains, list):
            raise SettingError(
                f"data.domains is {domains}, but with data.layout class/own each class has domains of its own; give "
                "how many to use, or leave it out"
            )
        own: dict[str, set[str]] = defaultdict(set)
        for image in found:
            own[image.outer].add(image.inner)
        place = {(outer, name): number for outer, names in own.items() for number, name in enumerate(sorted(names))}
        names = _first([str(number + 1) for number in range(max(place.values()) + 1)], domains)
        used = {key: number for key, number in place.items() if number < len(names)}
        return names, lambda image: used.get((image.outer, image.inner))
    name_of = (lambda image: image.outer) if layout == "domain/class" else (lambda image: image.inner)
    known = sorted({name_of(image) for image in found})
    names = list(domains) if isinstance(domains, list) else _first(known, domains)
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise SettingError(f"data.domains: no folder {unknown[0]!r} in any class; there are {', '.join(known)}")
    number = {name: place for place, name in enumerate(names)}
    return names, lambda image: number.get(name_of(image))


def _first(known: list[str], count: int | None) -> list[str]:
    wanted = len(known) if count is None else count
    require(1 <= wanted <= len(known), "data.domains", count, f"in 1..{len(known)}, of {', '.join(known)}")
    return known[:wanted]


def _at_most(
    count: int, used: Sequence[tuple[int, _Image]], class_of: Callable[[_Image], str]
) -> list[tuple[int, _Image]]:
    """With at most ``count`` training images of each class and domain, in their order."""
    groups: dict[tuple[int, str], list[int]] = defaultdict(list)
    for row, (domain, image) in enumerate(used):
        if image.part == "train":
            groups[domain, class_of(image)].append(row)
    rng = np.random.default_rng(0)
    kept = {rows[place] for rows in groups.values() for place in rng.permutation(len(rows))[:count]}
    return [entry for row, entry in enumerate(used) if row in kept or entry[1].part == "test"]


def _owners(base: Path, owners: str) -> Callable[[int, Path], int]:
    if owners == "domain":
        return lambda domain, file: domain
    table = base / owners
    try:
        with table.open(newline="", encoding="utf-8") as stream:
            rows = {row["path"]: row["client"] for row in csv.DictReader(stream)}
    except (OSError, KeyError) as error:
        raise SettingError(
            f"data.owners: {table} must be a CSV file with the columns path and client: {error}"
        ) from error
    numbers = {client: number for number, client in enumerate(sorted(set(rows.values())))}

    def owner(domain: int, file: Path) -> int:
        item = str(file.relative_to(base))
        if item not in rows:
            raise SettingError(f"data.owners: {table} has no row for {item}")
        return numbers[rows[item]]

    return owner
