"""Sets of images: what they hold, and that damaged, cut short and other files are refused; nothing is downloaded."""

import dataclasses
import gzip
import pickle
import zipfile

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from sparseflow_kernels import data, files
from sparseflow_kernels.cli.main import app
from sparseflow_kernels.data import images, photos


def drawn(n, shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, *shape), dtype=np.uint8), rng.integers(0, 10, n).astype(np.int64)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The published sets have few images, and no folder is set."""
    monkeypatch.setenv("SPARSEFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(images, "COUNTS", dict.fromkeys(images.SHAPES, (50, 20)))
    monkeypatch.setattr(images, "_DEBIAN", tmp_path / "no-such-folder")
    for name in ("FASHION_MNIST", "CIFAR10"):
        monkeypatch.delenv(f"SPARSEFLOW_{name}", raising=False)
    images._read.cache_clear()
    images._of_wheel.cache_clear()
    return tmp_path


def whole(sets, train, test):
    """The set's rows are these images, a tenth of the training ones held out."""
    assert (len(sets.train), len(sets.val), len(sets.test)) == (45, 5, 20) and sets.levels == 256
    every = torch.cat([sets.train, sets.val]).view(50, *sets.shape).numpy()
    labels = torch.cat([sets.train_labels, sets.val_labels]).numpy()
    order, wanted = (np.lexsort(rows.reshape(50, -1).T) for rows in (every, train[0]))
    assert np.array_equal(every[order], train[0][wanted]) and np.array_equal(labels[order], train[1][wanted])
    assert np.array_equal(sets.test.view(20, *sets.shape).numpy(), test[0])
    assert sets.train.dtype == torch.float32 and sets.test_labels.tolist() == test[1].tolist()


def test_digits_are_the_same_images_as_the_density_of_that_name():
    pytest.importorskip("sklearn")
    found, rows = data.load("digits_images"), data.load("digits")
    assert torch.equal(found.train, (rows.train * 17).floor()) and torch.equal(found.test_labels, rows.test_labels)
    assert (found.shape, found.levels, found.dim) == ((1, 8, 8), 17, 64)


def test_crops_of_photographs_share_no_pixels():
    pytest.importorskip("sklearn")
    pytest.importorskip("PIL")
    crops = data.load("photo_crops")
    assert (len(crops.train), len(crops.val), len(crops.test)) == (6100, 300, 600) and crops.shape == (3, 32, 32)
    image = photos._photographs("test")[0]
    start = 640 * 88 // 100
    first = torch.from_numpy(image[8:40, start : start + 32].copy()).permute(2, 0, 1).flatten()
    assert bool((crops.test == first).all(1).any()) and not bool((crops.train == first).all(1).any())
    assert float(crops.train.max()) == 255


# ------------------------------------------------------------------------------------------------------ Fashion-MNIST


def write_idx(path, values):
    content = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes() + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def fashion(small):
    parts = drawn(50, (28, 28)), drawn(20, (28, 28), 1)
    for name, (pixels, classes), end in (("train", parts[0], ".gz"), ("t10k", parts[1], "")):
        write_idx(small / f"{name}-images-idx3-ubyte{end}", pixels)
        write_idx(small / f"{name}-labels-idx1-ubyte{end}", classes)
    return small, [(pixels[:, None], classes) for pixels, classes in parts]


def test_fashion_mnist_comes_from_a_folder(fashion, monkeypatch):
    folder, parts = fashion
    sets = data.load("fashion_mnist", folder=folder)
    whole(sets, *parts)
    monkeypatch.setenv("SPARSEFLOW_FASHION_MNIST", str(folder))
    assert torch.equal(data.load("fashion_mnist").train, sets.train) and images.is_there("fashion_mnist")
    assert not torch.equal(data.load("fashion_mnist", seed=1).train, sets.train)
    with pytest.raises(ValueError, match="not fetched; get the four"):
        data.load("fashion_mnist", download=True)


def test_damaged_idx_files_are_refused(fashion):
    folder, _ = fashion
    path, packed = folder / "t10k-images-idx3-ubyte", folder / "train-images-idx3-ubyte.gz"
    content = path.read_bytes()
    for damaged, words in (
        (content[:-1], "it is cut short or another file"), (content + b"0", "another file"),
        (b"\x00\x00\x0d\x03" + content[4:], "no idx file of bytes with 3 axes"), (b"", "no idx file"),
        (content[:9], "has 9 bytes"),
    ):  # fmt: skip
        path.write_bytes(damaged)
        with pytest.raises(data.DamagedFileError, match=words):
            images.read_idx(path, 3)
    packed.write_bytes(packed.read_bytes()[:-50])
    with pytest.raises(data.DamagedFileError, match="no gzip file, or a damaged one"):
        images.read_idx(packed, 3)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        data.load("fashion_mnist", folder=folder)


def test_sets_of_another_size_are_refused(fashion):
    folder, _ = fashion
    write_idx(folder / "t10k-images-idx3-ubyte", drawn(20, (28, 27))[0])
    with pytest.raises(data.DamagedFileError, match="where the published set has"):
        data.load("fashion_mnist", folder=folder)
    write_idx(folder / "t10k-labels-idx1-ubyte", np.full(20, 10))
    with pytest.raises(data.DamagedFileError, match="classes must be whole numbers 0 to 9"):
        data.load("fashion_mnist", folder=folder)


# ------------------------------------------------------------------------------------------------------------ CIFAR-10


@pytest.mark.parametrize("binary", [False, True])
def test_cifar_comes_from_a_folder(small, binary):
    parts = drawn(50, (3, 32, 32)), drawn(20, (3, 32, 32), 1)
    inner = small / ("cifar-10-batches-bin" if binary else "cifar-10-batches-py")
    inner.mkdir()
    batches = {f"data_batch_{i + 1}": slice(10 * i, 10 * i + 10) for i in range(5)}
    for name, (pixels, classes) in [
        *((name, (parts[0][0][rows], parts[0][1][rows])) for name, rows in batches.items()), ("test_batch", parts[1]),
    ]:  # fmt: skip
        flat = pixels.reshape(len(pixels), -1)
        if binary:
            (inner / f"{name}.bin").write_bytes(np.column_stack([classes.astype(np.uint8), flat]).tobytes())
        else:
            (inner / name).write_bytes(pickle.dumps({"data": flat, "labels": classes.tolist()}, protocol=2))
    whole(data.load("cifar10", folder=small), *parts)
    path = inner / ("data_batch_3.bin" if binary else "data_batch_3")
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(data.DamagedFileError, match="no multiple of 3,073" if binary else "cannot be read as arrays"):
        images.read_cifar_batch(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="SPARSEFLOW_CIFAR10"):
        data.load("cifar10", folder=small)


class Evil:
    def __reduce__(self):
        return print, ("ran",)


@pytest.mark.parametrize("content, words", [
    ({"data": Evil()}, "holds __builtin__.print, which is no part of an array"),
    ({"labels": [1]}, "no batch of CIFAR-10"), ([1, 2], "no batch of CIFAR-10"),
    ({"data": np.zeros((1, 3072)), "labels": [1]}, "levels 0 to 255"),
    ({"data": np.zeros((1, 3071), np.uint8), "labels": [1]}, r"\[n, 3072\]"),
    ({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}, "labels of shape"),
    ({"data": np.zeros((1, 3072), np.uint8), "labels": [-1]}, "classes must be"),
])  # fmt: skip
def test_pickles_that_are_no_batch_are_refused(tmp_path, content, words, capsys):
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(data.DamagedFileError, match=words):
        images.read_cifar_batch(path)
    assert "ran" not in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------------- MNIST


def test_mnist_is_opt_in_and_checked(small, monkeypatch):
    with pytest.raises(FileNotFoundError, match="sparseflow data fetch mnist"):
        data.load("mnist")
    (pixels, classes), test = drawn(50, (784,)), drawn(20, (784,), 1)
    scaled = lambda values: (values / np.float32(256)).astype(np.float32)
    content = ((scaled(pixels[:40]), classes[:40]), (scaled(pixels[40:]), classes[40:]), (scaled(test[0]), test[1]))
    planted = images.MNIST.path
    planted.parent.mkdir(parents=True)
    with zipfile.ZipFile(planted, "w") as archive:
        archive.writestr("mnist/data/mnist.pkl.gz", gzip.compress(pickle.dumps(content, protocol=2)))
    with pytest.raises(data.ChecksumError, match="delete the file"):
        data.load("mnist", download=True)
    monkeypatch.setattr(images, "MNIST", dataclasses.replace(images.MNIST, sha256=files.sha256(planted)))
    whole(data.load("mnist"), (pixels.reshape(-1, 1, 28, 28), classes), (test[0].reshape(-1, 1, 28, 28), test[1]))
    listed = CliRunner().invoke(app, ["data", "list"], env={"COLUMNS": "200"}).output
    assert "cached" in next(line for line in listed.splitlines() if " mnist " in line)
    assert "SPARSEFLOW_CIFAR10" in listed
    said = CliRunner().invoke(app, ["data", "fetch", "mnist"]).output
    assert "mnist: 45 train, 5 val, 20 test rows" in said.replace("\n", " ")
    for values in (np.full((1, 784), 0.3, np.float32), np.ones((1, 784), np.float32), np.zeros((1, 783), np.float32)):
        with pytest.raises(data.DamagedFileError, match="pixels must be k / 256"):
            images.bytes_of(values)


def test_the_command_says_where_other_sets_come_from():
    result = CliRunner().invoke(app, ["data", "fetch", "cifar10"])
    assert result.exit_code == 1 and "www.cs.toronto.edu" in result.output.replace("\n", "")


# -------------------------------------------------------------------------------------------------- images of one's own


def test_images_of_ones_own():
    pixels, classes = drawn(30, (3, 4, 4))
    sets = images.of_images("mine", (pixels, classes), (pixels[:5], classes[:5]))
    assert (len(sets.train), len(sets.val), len(sets.test), sets.shape) == (27, 3, 5, (3, 4, 4))
    for part, words in (
        ((pixels.astype(np.float32), classes), "must be uint8"), ((pixels[:, 0], classes), "must be uint8"),
        ((pixels, classes[:3]), "30 training images, and classes of shape"), ((pixels[:9], classes[:9]), "10 training"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            images.of_images("mine", part, (pixels[:5], classes[:5]))
    with pytest.raises(ValueError, match="training images have level 2.., the largest must be 16"):
        images.of_images("mine", (pixels, classes), (pixels[:5], classes[:5]), levels=17)
    with pytest.raises(ValueError, match="the others"):
        images.of_images("mine", (pixels, classes), (pixels[:5, :2], classes[:5]))
