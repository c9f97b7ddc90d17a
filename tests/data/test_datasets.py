"""Named data sets, their downloads (from a server on this machine), and the user's own data."""

import functools
import gzip
import hashlib
import itertools
import os
import shutil
import socket
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scipy.io import savemat
from scipy.sparse import csr_array
from sklearn.datasets import load_digits

from pyro_vae.data import datasets
from pyro_vae.data.datasets import DATASETS, Dataset, data_root, is_available, load_dataset

SHARED = Path(os.environ.get("PYRO_VAE_DATA") or Path(__file__).parents[3] / "shared" / "data")
SPLITS = ("train", "valid", "test")
WORDS = ["20newsgroups"]
IMAGES = [name for name, info in DATASETS.items() if name not in WORDS and info.num_steps is None]  # nor sequences
DOWNLOADED = [name for name, info in DATASETS.items() if info.files]


@functools.cache
def load(name: str) -> Dataset:
    if not DATASETS[name].is_local(SHARED):
        pytest.skip(f"{name} is not in {SHARED}")
    return load_dataset(name, SHARED)


def shared(file: str) -> Path:
    path = SHARED / file
    if not path.exists():
        pytest.skip(f"there is no {path}")
    return path


def rows(*images: torch.Tensor) -> list[bytes]:
    """All images, sorted: equal for two sets if they hold the same images equally often."""
    return sorted(image.tobytes() for x in images for image in x.numpy())


def pixel_mean(*images: torch.Tensor) -> float:
    return sum(int(x.sum()) for x in images) / sum(x.numel() for x in images) / 255


def listing(folder: Path) -> list[tuple[str, int, int]]:
    return sorted((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in folder.rglob("*"))


# ---- What the sets hold


@pytest.mark.parametrize("name", [*IMAGES, *WORDS])
def test_set_is_described(name: str) -> None:
    data, info = load(name), DATASETS[name]
    assert data.name == info.name == name
    assert data.binarize == info.binarize
    assert info.split.endswith(".")
    assert info.citation
    assert name in repr(data)
    assert str(tuple(data.test.shape)) in repr(data)
    assert "\n" not in repr(data)


@pytest.mark.parametrize("name", WORDS)
def test_words_are_as_registered(name: str) -> None:
    data, info = load(name), DATASETS[name]
    assert data.train_labels is data.label_names is None
    assert len(data.vocab) == info.shape[0]
    for split, size in zip(SPLITS, info.sizes, strict=True):
        counts = getattr(data, split)
        assert isinstance(counts, csr_array)
        assert counts.dtype == np.int32
        assert counts.shape == (size, *info.shape)
        assert counts.has_canonical_format
        assert counts.data.min() == 1
        assert counts.sum(1).min() >= 1


@pytest.mark.parametrize("name", IMAGES)
def test_images_are_as_registered(name: str) -> None:
    data, info = load(name), DATASETS[name]
    assert data.vocab is data.train_lengths is data.test_states is None
    for split, size in zip(SPLITS, info.sizes, strict=True):
        images, labels = getattr(data, split), getattr(data, f"{split}_labels")
        assert images.dtype == torch.uint8
        assert images.shape == (size, *info.shape)
        assert images.is_contiguous()
        assert images.max() > 200
        if labels is None:
            assert data.label_names is None
        else:
            assert labels.dtype == torch.int64
            assert labels.shape == (size,)
            assert labels.min() >= 0
            assert labels.max() < len(data.label_names)


def test_labels_are_given_where_there_are_any() -> None:
    unlabelled = {name for name in (*IMAGES, *WORDS) if load(name).train_labels is None}
    assert unlabelled == {"binarized-mnist", "frey-face", "20newsgroups"}


def test_digits() -> None:
    data, source = load_dataset("digits"), load_digits()
    images = torch.cat([data.train, data.valid, data.test])
    labels = torch.cat([data.train_labels, data.valid_labels, data.test_labels])
    assert labels.bincount().tolist() == np.bincount(source.target).tolist()
    order = np.random.default_rng(0).permutation(1797)
    assert (images.numpy() == np.rint(source.images[order] * 255 / 16)).all()
    assert (labels.numpy() == source.target[order]).all()


def test_mnist() -> None:
    data = load("mnist")
    assert pixel_mean(data.train, data.valid) == pytest.approx(0.1307, abs=5e-5)
    counts = (data.train_labels.bincount() + data.valid_labels.bincount()).tolist()
    assert counts == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert data.test_labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert data.train_labels[:5].tolist() == [5, 0, 4, 1, 9]  # in the official order
    assert data.label_names == tuple("0123456789")


def test_fashion_mnist() -> None:
    data = load("fashion-mnist")
    assert pixel_mean(data.train, data.valid) == pytest.approx(0.2860, abs=5e-5)
    assert (data.train_labels.bincount() + data.valid_labels.bincount()).tolist() == [6000] * 10
    assert data.test_labels.bincount().tolist() == [1000] * 10
    assert data.label_names[data.train_labels[0]] == "Ankle boot"


@pytest.mark.parametrize("name", ["binarized-mnist", "caltech101-silhouettes"])
def test_binary_images_scale_to_exactly_zero_and_one(name: str) -> None:
    for split in SPLITS:
        images = getattr(load(name), split)
        assert ((images == 0) | (images == 255)).all()
        assert (images[:100] / 255).unique().tolist() == [0.0, 1.0]


def test_binarized_mnist_has_the_ink_of_mnist() -> None:
    assert pixel_mean(load("binarized-mnist").train) == pytest.approx(0.1307, abs=2e-3)


def test_frey_face_splits_hold_each_frame_once() -> None:
    data = load("frey-face")
    frames = torch.from_numpy(np.load(SHARED / "frey_face.npz")["images"])
    assert len(set(rows(frames))) == 1965
    assert rows(data.train, data.valid, data.test) == rows(frames)


def test_omniglot_splits_by_drawer() -> None:
    data = load("omniglot")
    source = np.load(SHARED / "omniglot_28.npz")
    images, alphabet = source["images"], source["alphabet"]
    assert rows(data.train, data.valid) == rows(torch.tensor(images[:, :15]).reshape(-1, 28, 28))
    assert (data.test.numpy() == images[:, 15:].reshape(-1, 28, 28)).all()
    assert (data.test_labels.numpy() == np.repeat(alphabet, 5)).all()
    counts = data.train_labels.bincount() + data.valid_labels.bincount()
    assert counts.tolist() == (15 * np.bincount(alphabet)).tolist()
    assert data.label_names[0] == "Arcadian"


def test_caltech_is_black_on_white_and_upright() -> None:
    data = load("caltech101-silhouettes")
    source = np.unpackbits(np.load(SHARED / "caltech101_silhouettes_28.npz")["images"], axis=1) * np.uint8(255)
    upright = torch.from_numpy(source.reshape(-1, 28, 28)).mT.contiguous()
    assert rows(data.train, data.valid, data.test) == rows(upright)
    assert data.train[:, 0, 0].float().mean() > 0.9 * 255  # corners are background
    planes = data.train[data.train_labels == data.label_names.index("Airplanes Side 2")] == 0
    assert planes.any(1).sum(1).float().mean() > planes.any(2).sum(1).float().mean()  # wider than high


def test_newsgroups_is_as_it_was_distributed() -> None:
    """Train and valid are the training documents, each once; the counts are those that were stored."""
    data, stored = load("20newsgroups"), np.load(SHARED / "news20_prodlda.npz")
    dense = {}
    for split in ("train", "test"):
        starts = stored[f"{split}_indptr"]
        dense[split] = np.zeros((len(starts) - 1, 1995), np.int32)
        rows = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        dense[split][rows, stored[f"{split}_indices"]] = stored[f"{split}_counts"]
    order = np.random.default_rng(0).permutation(11_258)
    assert (data.train.toarray() == dense["train"][order[:10_258]]).all()
    assert (data.valid.toarray() == dense["train"][order[10_258:]]).all()
    assert (data.test.toarray() == dense["test"]).all()
    assert [data.train.sum() + data.valid.sum(), data.test.sum()] == [991_493, 629_312]
    assert data.vocab[:4] == ("_eos_", "write", "one", "use")
    assert data.train[:, [0]].sum() == 0  # no document ends
    assert data.train[:, [data.vocab.index("god")]].sum() > 1000


@pytest.mark.parametrize("name", ["digits", "frey-face", "caltech101-silhouettes", "omniglot"])
def test_loading_twice_gives_the_same(name: str) -> None:
    first, second = load(name), load_dataset(name, SHARED)
    assert all(torch.equal(getattr(first, split), getattr(second, split)) for split in SPLITS)


def test_permutation_is_pinned() -> None:
    """A numpy that permutes differently would silently change every split."""
    parts = datasets._permuted([1565, 200, 200], np.arange(1965), np.arange(1965) % 7)
    assert sorted(np.concatenate([parts[split] for split in SPLITS])) == list(range(1965))
    assert all((parts[split] % 7 == parts[f"{split}_labels"]).all() for split in SPLITS)
    digest = hashlib.sha256(np.concatenate([parts[split] for split in SPLITS]).astype("<i8").tobytes())
    assert digest.hexdigest().startswith("3865142d351c84a0")


# ---- Names, and where data are


def test_unknown_name_lists_the_names_and_suggests_one() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'fashion-mnist'\?.*digits, mnist, .*caltech101"):
        load_dataset("Fashion_MNIST")


@pytest.mark.parametrize("name", ["", "zzz"])
def test_unlikely_names(name: str) -> None:
    with pytest.raises(ValueError, match="unknown data set"):
        load_dataset(name)


def test_binarize_overrides_the_default() -> None:
    assert load_dataset("digits", binarize="none").binarize == "none"
    with pytest.raises(ValueError, match="'sometimes'"):
        load_dataset("digits", binarize="sometimes")  # type: ignore[arg-type]


def test_data_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYRO_VAE_DATA", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert data_root("c") == Path("c")
    assert data_root() == tmp_path / "a"
    monkeypatch.delenv("PYRO_VAE_DATA")
    assert data_root() == tmp_path / "b" / "pyro_vae"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data_root() == Path.home() / ".cache" / "pyro_vae"


def test_nothing_is_written_where_the_data_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copy(shared("frey_face.npz"), tmp_path)
    shutil.copytree(shared("MNIST"), tmp_path / "MNIST")
    before = listing(tmp_path)
    monkeypatch.setenv("PYRO_VAE_DATA", str(tmp_path))
    assert is_available("frey-face")
    assert DATASETS["frey-face"].is_local()
    assert is_available("mnist", tmp_path)
    assert not is_available("omniglot")
    load_dataset("frey-face")
    load_dataset("mnist", root=tmp_path)
    assert listing(tmp_path) == before


def test_extracted_idx_files_are_read(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for file in shared("FashionMNIST/raw").glob("*.gz"):
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    assert torch.equal(load_dataset("fashion-mnist", tmp_path).test, load("fashion-mnist").test)
    labels = raw / "t10k-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte is damaged.*10008 bytes.*10007.*Delete"):
        load_dataset("fashion-mnist", tmp_path)


# ---- Damaged files


def test_corrupt_gz(tmp_path: Path) -> None:
    shutil.copytree(shared("FashionMNIST"), tmp_path / "FashionMNIST")
    path = tmp_path / "FashionMNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte.gz is damaged: expected md5:bef4\w+, found md5"):
        load_dataset("fashion-mnist", tmp_path)


@pytest.mark.parametrize("size", [0, 100, -100])
def test_truncated_npz(tmp_path: Path, size: int) -> None:
    data = shared("frey_face.npz").read_bytes()[: size or None]
    (tmp_path / "frey_face.npz").write_bytes(data if size else b"")
    with pytest.raises(ValueError, match=r"frey_face.npz is damaged: expected .* found \d+ bytes.*Delete"):
        load_dataset("frey-face", tmp_path)


def test_npz_with_other_contents(tmp_path: Path) -> None:
    path = tmp_path / "frey_face.npz"
    for arrays, message in [
        ({"frames": np.zeros((1965, 28, 20))}, r"`images` of shape \(1965, 28, 20\), found none"),
        ({"images": np.zeros((3, 28, 20))}, r"found \(3, 28, 20\)"),
        ({"images": np.zeros((1965, 28, 20), np.uint8)}, "with sha256 2438"),
    ]:
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=message):
            load_dataset("frey-face", tmp_path)


# ---- Downloads


class Server:
    """Serves a folder; counts the requests; can cut the answers short."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.requests, self.truncate = folder, list[str](), False
        outer = self

        class Handler(SimpleHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                outer.requests.append(self.path)

            def copyfile(self, source, outputfile) -> None:  # type: ignore[no-untyped-def]
                data = source.read()
                outputfile.write(data[: len(data) // 2] if outer.truncate else data)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.http.server_port}/"

    def offer(self, monkeypatch: pytest.MonkeyPatch, name: str, **changes: object) -> None:
        """Let a set be downloaded from here."""
        info = replace(DATASETS[name], source=self.url, **changes)  # type: ignore[arg-type]
        monkeypatch.setitem(DATASETS, name, info)
        if info.convert is None:
            cls = getattr(torchvision.datasets, Path(info.files[0]).parts[0])
            monkeypatch.setattr(cls, "mirrors", [self.url])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "served"
    folder.mkdir()
    server = Server(folder)
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.http.shutdown()
    server.http.server_close()
    thread.join()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "new" / "root"


def serve_frey_face(server: Server) -> None:
    frames = np.load(shared("frey_face.npz"))["images"]
    savemat(server.folder / "frey_rawface.mat", {"ff": frames.reshape(1965, 560).T})


def test_mnist_is_downloaded_once(server: Server, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in shared("FashionMNIST/raw").glob("*.gz"):
        shutil.copy(file, server.folder)
    server.offer(monkeypatch, "fashion-mnist")
    data = load_dataset("fashion-mnist", root)
    assert torch.equal(data.valid, load("fashion-mnist").valid)
    assert {str(f.relative_to(root)) for f in root.rglob("*") if f.is_file()} == set(DATASETS["fashion-mnist"].files)
    count = len(server.requests)
    load_dataset("fashion-mnist", root)
    assert len(server.requests) == count


def test_frey_face_is_downloaded_once(server: Server, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_frey_face(server)
    server.offer(monkeypatch, "frey-face")
    data = load_dataset("frey-face", root)
    assert torch.equal(data.train, load("frey-face").train)
    assert [f.name for f in root.iterdir()] == ["frey_face.npz"]
    count = len(server.requests)
    load_dataset("frey-face", root)
    assert len(server.requests) == count
    assert socket.getdefaulttimeout() is None


def test_two_at_once_download_once(server: Server, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_frey_face(server)
    server.offer(monkeypatch, "frey-face")
    found: list[Dataset] = []
    threads = [threading.Thread(target=lambda: found.append(load_dataset("frey-face", root))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert len(server.requests) == 2  # torchvision asks once for redirections, once for the file


def test_caltech_is_converted(server: Server, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = np.load(shared("caltech101_silhouettes_28.npz"))
    names = np.empty((1, 101), object)
    names[0] = list(source["class_names"])
    file = server.folder / "caltech101_silhouettes_28.mat"
    images = np.unpackbits(source["images"], axis=1)
    savemat(file, {"X": images, "Y": source["labels"][None] + 1, "classnames": names}, do_compression=True)
    checksum = f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"
    server.offer(monkeypatch, "caltech101-silhouettes", originals={file.name: checksum})
    data, expected = load_dataset("caltech101-silhouettes", root), load("caltech101-silhouettes")
    assert torch.equal(data.test, expected.test)
    assert torch.equal(data.test_labels, expected.test_labels)
    assert data.label_names == expected.label_names


def test_amat_is_converted(server: Server, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    originals, images = {}, {}
    for split, size in zip(SPLITS, (30, 20, 10), strict=True):
        images[split] = np.random.default_rng(size).integers(0, 2, (size, 784))
        file = server.folder / f"binarized_mnist_{split}.amat"
        np.savetxt(file, images[split], fmt="%d")
        originals[file.name] = f"md5:{hashlib.md5(file.read_bytes()).hexdigest()}"
    arrays = {split: ((len(x), 98), "") for split, x in images.items()}
    server.offer(monkeypatch, "binarized-mnist", originals=originals, arrays=arrays)
    data = load_dataset("binarized-mnist", root)
    for split in SPLITS:
        assert (getattr(data, split).numpy() == 255 * images[split].reshape(-1, 28, 28)).all()


def test_omniglot_is_converted(server: Server, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the numbers in the file names, not of the alphabets' names, by exact area averaging."""
    bitmaps = np.random.default_rng(0).random((3, 20, 105, 105)) < 0.1  # ink
    where = [("background", "Zulu_(Z)", 1), ("background", "Armenian", 2), ("evaluation", "Angelic", 3)]
    originals = {}
    for part in ("evaluation", "background"):
        with zipfile.ZipFile(server.folder / f"images_{part}.zip", "w") as archive:
            for _, alphabet, number in [w for w in where if w[0] == part]:
                for drawer in reversed(range(20)):
                    name = f"images_{part}/{alphabet}/character01/{number:04}_{drawer + 1:02}.png"
                    with archive.open(name, "w") as file:
                        Image.fromarray(~bitmaps[number - 1, drawer]).save(file, "png")
    for part in ("background", "evaluation"):
        data = (server.folder / f"images_{part}.zip").read_bytes()
        originals[f"images_{part}.zip"] = f"md5:{hashlib.md5(data).hexdigest()}"
    arrays = {"images": ((3, 20, 28, 28), ""), "alphabet": ((3,), ""), "alphabet_names": ((3,), "")}
    server.offer(monkeypatch, "omniglot", originals=originals, arrays=arrays, sizes=(40, 5, 15))
    found = load_dataset("omniglot", root)
    assert found.label_names == ("Zulu (Z)", "Armenian", "Angelic")
    assert found.test_labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    fine = bitmaps[:, 15:].repeat(4, axis=-2).repeat(4, axis=-1).reshape(15, 28, 15, 28, 15)
    expected = np.rint(255 * fine.mean((2, 4)))
    assert (found.test.numpy() == expected).all()


def feat(counts: csr_array, seed: int = 0) -> str:
    """Documents in the format of the original: a label, then the words, numbered from 1, in any order."""
    rng = np.random.default_rng(seed)
    lines = []
    for start, stop in itertools.pairwise(counts.indptr):
        order = start + rng.permutation(stop - start)
        lines.append(" ".join(["1", *(f"{counts.indices[i] + 1}:{counts.data[i]}" for i in order)]))
    return "\n".join([*lines, "1", ""])  # the originals end in a line without words


def test_newsgroups_is_downloaded_and_converted(server: Server, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stored arrays written in the original's format, of which only the beginning was seen, are themselves again:
    the converted arrays have the registered checksums."""
    stored = np.load(shared("news20_prodlda.npz"))
    for split in ("train", "test"):
        parts = (stored[f"{split}_{part}"] for part in ("counts", "indices", "indptr"))
        (server.folder / f"{split}.feat").write_text(feat(csr_array(tuple(parts))))
    (server.folder / "vocab.new").write_text("".join(f"{word} 0 \n" for word in stored["vocab"]))
    server.offer(monkeypatch, "20newsgroups")
    data, expected = load_dataset("20newsgroups", root), load("20newsgroups")
    assert [f.name for f in root.iterdir()] == ["news20_prodlda.npz"]
    assert data.vocab == expected.vocab
    for split in SPLITS:
        assert (getattr(data, split) != getattr(expected, split)).nnz == 0
    count = len(server.requests)
    load_dataset("20newsgroups", root)
    assert len(server.requests) == count


def test_words_are_counted_from_one_in_any_order(tmp_path: Path) -> None:
    """Three lines as the original begins, which are two documents."""
    (tmp_path / "train.feat").write_text("1 3:2 1:4\n1\n1 2:1\n")
    (tmp_path / "test.feat").write_text("1 1:7\n")
    (tmp_path / "vocab.new").write_text("_eos_ 0 \nwrite 0 \none 0 \n")
    arrays = datasets._convert_20newsgroups(*(tmp_path / f for f in ("train.feat", "test.feat", "vocab.new")))
    assert {name: array.tolist() for name, array in arrays.items()} == {
        "vocab": ["_eos_", "write", "one"],
        "train_indptr": [0, 2, 3],
        "train_indices": [0, 2, 1],
        "train_counts": [4, 2, 1],
        "test_indptr": [0, 1],
        "test_indices": [0],
        "test_counts": [7],
    }


def test_newsgroups_with_other_counts_is_refused(tmp_path: Path) -> None:
    arrays = dict(np.load(shared("news20_prodlda.npz")))
    arrays["train_counts"] = arrays["train_counts"].copy()
    arrays["train_counts"][0] += 1
    np.savez(tmp_path / "news20_prodlda.npz", **arrays)
    with pytest.raises(ValueError, match=r"expected `train_counts` with sha256 537d.*Delete"):
        load_dataset("20newsgroups", tmp_path)


def test_original_placed_by_hand_needs_no_server(root: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_frey_face(server)
    root.mkdir(parents=True)
    shutil.move(server.folder / "frey_rawface.mat", root)
    server.offer(monkeypatch, "frey-face")
    assert torch.equal(load_dataset("frey-face", root).test, load("frey-face").test)
    assert server.requests == []


def refuse(name: str, root: Path, match: str) -> None:
    with pytest.raises(ConnectionError, match=match):
        load_dataset(name, root)
    assert not root.exists()


def test_truncated_download_leaves_nothing(server: Server, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_frey_face(server)
    for file in shared("FashionMNIST/raw").glob("*.gz"):
        shutil.copy(file, server.folder)
    server.truncate = True
    server.offer(monkeypatch, "fashion-mnist")
    refuse("fashion-mnist", root, "File not found or corrupted")
    server.offer(monkeypatch, "frey-face")
    refuse("frey-face", root, "frey-face is not in .*root, and cannot be downloaded")


def test_wrong_checksum_is_refused(server: Server, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (server.folder / "caltech101_silhouettes_28.mat").write_bytes(b"something else")
    server.offer(monkeypatch, "caltech101-silhouettes")
    refuse("caltech101-silhouettes", root, "expected sha256:862d0a4b.* found sha256")
    savemat(server.folder / "frey_rawface.mat", {"ff": np.zeros((560, 1965), np.uint8)})
    server.offer(monkeypatch, "frey-face")
    refuse("frey-face", root, "expected `images` with sha256 2438")


@pytest.mark.parametrize("name", DOWNLOADED)
def test_without_network(server: Server, root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server.url = "http://127.0.0.1:9/"  # nobody listens
    server.offer(monkeypatch, name)
    refuse(
        name,
        root,
        f"{name} is not in {root}, and cannot be downloaded from http://127.0.0.1:9/ .*PYRO_VAE_DATA",
    )


def test_failure_leaves_other_files(server: Server, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root.mkdir(parents=True)
    (root / "notes.txt").write_text("mine")
    server.offer(monkeypatch, "omniglot")
    with pytest.raises(ConnectionError, match=r"HTTP Error 404.*images_background.zip, images_evaluation.zip"):
        load_dataset("omniglot", root)
    assert [f.name for f in root.rglob("*")] == ["notes.txt"]


def test_root_that_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    for root in (path, path / "below"):
        with pytest.raises(OSError, match=r"frey-face is not in .*cannot be downloaded into it .*written to"):
            load_dataset("frey-face", root)


# ---- The user's own data


def test_npy_is_cut_8_1_1(tmp_path: Path) -> None:
    x = np.random.default_rng(1).normal(size=(50, 3)).astype(">f4")  # the other byte order
    np.save(tmp_path / "x.npy", x)
    data = load_dataset(tmp_path / "x.npy")
    assert data.name == "x.npy"
    assert data.binarize == "none"
    assert data.train.dtype == torch.float32
    assert [len(data.train), len(data.valid), len(data.test)] == [40, 5, 5]
    assert data.train_labels is None
    order = np.random.default_rng(0).permutation(50)
    assert (torch.cat([data.train, data.valid, data.test]).numpy() == x[order]).all()
    assert load_dataset(str(tmp_path / "x.npy"), binarize="dynamic").binarize == "dynamic"


@pytest.mark.parametrize(("key", "labels"), [("x", "y"), ("images", "labels"), ("data", "y"), ("anything", "labels")])
def test_npz_with_one_array(tmp_path: Path, key: str, labels: str) -> None:
    x = np.arange(20, dtype=np.uint8).reshape(10, 2)
    np.savez(tmp_path / "a.npz", **{key: x, labels: x[:, 0] // 2})
    data = load_dataset(tmp_path / "a.npz")
    for split in SPLITS:
        assert (getattr(data, split)[:, 0] // 2).tolist() == getattr(data, f"{split}_labels").tolist()
    assert sorted(torch.cat([data.train, data.valid, data.test])[:, 1].tolist()) == x[:, 1].tolist()


def test_npz_with_splits_is_kept_as_stored(tmp_path: Path) -> None:
    x = {split: np.full((n, 2), n, np.float64) for split, n in zip(SPLITS, (5, 3, 2), strict=True)}
    labels = {"train_labels": np.array(list("abcab")), "test_labels": np.array(["c", "d"])}
    np.savez(tmp_path / "a.npz", **x, **labels, other=np.zeros(1))
    data = load_dataset(tmp_path / "a.npz")
    assert all((getattr(data, split).numpy() == x[split]).all() for split in SPLITS)
    assert data.label_names == ("a", "b", "c", "d")
    assert data.train_labels.tolist() == [0, 1, 2, 0, 1]
    assert data.valid_labels is None
    assert data.test_labels.tolist() == [2, 3]


def test_missing_split_is_taken_out_of_train(tmp_path: Path) -> None:
    x, test = np.arange(60).reshape(30, 2), np.zeros((4, 2), int)
    np.savez(tmp_path / "a.npz", train=x, train_labels=np.arange(30), test=test)
    data = load_dataset(tmp_path / "a.npz")
    assert [len(data.train), len(data.valid), len(data.test)] == [27, 3, 4]
    assert sorted(data.train_labels.tolist() + data.valid_labels.tolist()) == list(range(30))


def test_smallest_data(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.eye(3))
    assert len(load_dataset(tmp_path / "x.npy").test) == 1
    np.save(tmp_path / "x.npy", np.eye(2))
    with pytest.raises(ValueError, match="enough data"):
        load_dataset(tmp_path / "x.npy")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.eye(9), "b": np.eye(9)}, r"one `x`, `images` or `data`, found \['a', 'b'\]"),
        ({"x": np.eye(9), "data": np.eye(9)}, r"found \['x', 'data'\]"),
        ({"y": np.arange(9)}, r"found \[\]"),
        ({"x": np.eye(9).astype(str)}, "found <U"),
        ({"x": np.eye(9) * 1j}, "found complex128"),
        ({"x": np.arange(9)}, r"found shape \(9,\)"),
        ({"x": np.zeros((0, 9))}, r"found shape \(0, 9\)"),
        ({"x": np.eye(9), "y": np.arange(8)}, r"expected 9 integers .* found int64 \(8,\)"),
        ({"x": np.eye(9), "y": np.eye(9)}, r"found float64 \(9, 9\)"),
        (
            {"train": np.eye(9), "test": np.ones((9, 8))},
            r"like `train`, float64 \(9, 9\).*found float64 \(9, 8\)",
        ),
        ({"train": np.eye(9), "test": np.eye(9, dtype=int)}, r"found int64 \(9, 9\)"),
        ({"x": np.array([{}, {}])}, "without pickled objects"),
    ],
)
def test_npz_that_will_not_do(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=message) as error:
        load_dataset(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize("content", [b"", b"not an array", b"\x93NUMPY\x01", b"PK\x03\x04"])
def test_file_that_is_no_array(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a.{suffix} is damaged: .* found {len(content)} bytes"):
        load_dataset(path)


@pytest.mark.parametrize("name", ["no/such/folder", "nothing.npz"])
def test_path_that_does_not_exist(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=name):
        load_dataset(name)


def save_images(folder: Path, count: int, shape: tuple[int, ...] = (6, 5), value: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(np.full(shape, value + i, np.uint8)).save(folder / f"{i:02}.png")


def test_folder_of_images(tmp_path: Path) -> None:
    save_images(tmp_path / "faces", 10)
    (tmp_path / "faces" / ".DS_Store").write_text("no image")
    data = load_dataset(tmp_path / "faces")
    assert data.name == "faces"
    assert data.train.shape == (8, 6, 5)
    assert data.train.dtype == torch.uint8
    assert data.train_labels is None
    values = torch.cat([data.train, data.valid, data.test])[:, 0, 0]
    assert values.tolist() == np.random.default_rng(0).permutation(10).tolist()


def test_folders_are_classes(tmp_path: Path) -> None:
    save_images(tmp_path / "dog", 10, (4, 4, 3), value=100)
    save_images(tmp_path / "cat", 10, (4, 4, 3))
    data = load_dataset(str(tmp_path))
    assert data.train.shape == (16, 4, 4, 3)
    assert data.label_names == ("cat", "dog")
    for split in SPLITS:
        assert (getattr(data, split)[:, 0, 0, 0] >= 100).long().tolist() == getattr(data, f"{split}_labels").tolist()


def test_folder_with_splits(tmp_path: Path) -> None:
    save_images(tmp_path / "train" / "b", 10)
    save_images(tmp_path / "train" / "a", 10)
    save_images(tmp_path / "test" / "b", 3)
    data = load_dataset(tmp_path)
    assert [len(data.train), len(data.valid), len(data.test)] == [18, 2, 3]
    assert data.test_labels.tolist() == [1, 1, 1]
    (tmp_path / "val").mkdir()
    with pytest.raises(ValueError, match="expected train, valid, test in it, found val as well"):
        load_dataset(tmp_path)


def test_images_partly_in_classes(tmp_path: Path) -> None:
    save_images(tmp_path, 3)
    save_images(tmp_path / "a", 2)
    with pytest.raises(ValueError, match="5 integers or strings as labels"):
        load_dataset(tmp_path)


@pytest.mark.parametrize("shape", [(5, 6), (6, 5, 3)])
def test_images_of_different_size_or_mode(tmp_path: Path, shape: tuple[int, ...]) -> None:
    save_images(tmp_path / "a", 3)
    save_images(tmp_path / "b", 1, shape)
    with pytest.raises(ValueError, match=r"b/00.png has shape .*unlike .*a/00.png.*\(6, 5\)") as error:
        load_dataset(tmp_path)
    assert str(shape) in str(error.value)


def test_images_of_bits_and_palettes(tmp_path: Path) -> None:
    ink = np.eye(6, dtype=bool)
    for i in range(4):
        Image.fromarray(ink).save(tmp_path / f"{i}.png")
    assert (load_dataset(tmp_path).train.numpy() == 255 * ink).all()
    colour = np.random.default_rng(0).choice([0, 255], (6, 5, 3)).astype(np.uint8)
    for i in range(4):
        Image.fromarray(colour).quantize(8).save(tmp_path / f"{i}.png")
    assert (load_dataset(tmp_path).train.numpy() == colour).all()


def test_images_of_16_bits(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 1000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep.png: expected an image of 8 bits a channel, found mode I"):
        load_dataset(tmp_path)


@pytest.mark.parametrize("keep", [0, 20, 1000])
def test_file_that_is_no_image(tmp_path: Path, keep: int) -> None:
    save_images(tmp_path, 3)
    broken = tmp_path / "02.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 50), np.uint8)).save(broken)
    broken.write_bytes(broken.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"02.png is not an image that can be read"):
        load_dataset(tmp_path)


def test_current_folder_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_images(tmp_path / "faces", 3)
    monkeypatch.chdir(tmp_path / "faces")
    assert load_dataset(".").name == "faces"


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected images, found none"):
        load_dataset(tmp_path)
