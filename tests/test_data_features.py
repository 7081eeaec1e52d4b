"""Region features: every layout of files, stores, and with `--butd-dir` (or HF_VLP_BUTD_DIR) genuine rows."""

import base64
import io
import pickle
import sys
import warnings

import numpy as np
import pytest
import torch
from data_fixtures import picture
from datasets import Dataset, Features, Image, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from hf_vlp.cli import app
from hf_vlp.data.feature_files import read_feature_file
from hf_vlp.data.features import RegionStore, RegionWriter, convert_features, with_regions
from hf_vlp.models.regions import stack_regions

WIDTH, HEIGHT = 64, 48
SCALE = np.array([WIDTH, HEIGHT, WIDTH, HEIGHT], np.float32)
LABELS = ("object_ids", "object_scores", "attribute_ids", "attribute_scores")


def pixel_row(seed=0, regions=3, dim=64):
    """Boxes in pixels, and features with the statistics of genuine ones."""
    draw = np.random.default_rng(seed)
    corners = np.sort(draw.uniform(0, 1, (regions, 2, 2)), axis=1).reshape(regions, 4) * SCALE
    features = draw.exponential(1.7, (regions, dim)) * (draw.random((regions, dim)) > 0.3) * 0.8
    features[0, 0] = 30
    return {
        "image_h": HEIGHT,
        "image_w": WIDTH,
        "object_ids": draw.integers(0, 1600, regions),
        "object_scores": draw.random(regions, np.float32),
        "attribute_ids": draw.integers(0, 400, regions),
        "attribute_scores": draw.random(regions, np.float32),
        "boxes": corners.astype(np.float32),
        "features": features.astype(np.float32),
    }


def region_row(seed=0, regions=3, dim=8):
    """What a store takes."""
    row = pixel_row(seed, regions, dim)
    size = [row.pop("image_h"), row.pop("image_w")]
    return row | {"boxes": row["boxes"] / SCALE, "image_size": size}


def encode(value):
    if isinstance(value, np.ndarray):
        return base64.b64encode(value.tobytes()).decode()
    return str(value)


def tsv_line(image_id, row, columns=10, **changes):
    values = {"image_id": image_id, "num_boxes": len(row["boxes"]), **row, **changes}
    names = ["image_id", "image_h", "image_w", *LABELS, "num_boxes", "boxes", "features"]
    if columns == 6:
        names = ["image_id", "image_w", "image_h", "num_boxes", "boxes", "features"]
    return "\t".join(encode(values[name]) for name in names)


def write_tsv(path, rows, columns=10):
    path.write_text("".join(tsv_line(name, row, columns) + "\n" for name, row in rows.items()))
    return path


def read(path):
    """Rows of a file; odd statistics are the matter of their own test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(read_feature_file(path))


def check_rows(found, expected, labels=True):
    assert list(found) == list(expected)
    for name, row in expected.items():
        np.testing.assert_array_equal(found[name]["features"], row["features"])
        np.testing.assert_allclose(found[name]["boxes"], row["boxes"] / SCALE, atol=1e-6)
        assert found[name]["image_size"].tolist() == [HEIGHT, WIDTH]
        for label in LABELS:
            assert (label in found[name]) == labels
            if labels:
                np.testing.assert_array_equal(found[name][label], row[label])


@pytest.fixture
def rows():
    return {f"image{i}": pixel_row(i, regions=2 + i) for i in range(3)}


@pytest.fixture
def store(tmp_path):
    with RegionWriter(tmp_path / "store", rows_per_file=2) as writer:
        for i in range(5):
            writer.write(i, region_row(i, regions=2 + i))
    return RegionStore(tmp_path / "store")


def test_command(tmp_path, rows):
    file, out = write_tsv(tmp_path / "rows.tsv", rows), tmp_path / "store"
    done = CliRunner().invoke(app, ["convert", "features", str(file), "--out", str(out)])
    assert done.exit_code == 0 and f"{len(rows)} images, features of width" in done.output
    assert RegionStore(out).ids == list(rows)


def test_pairs_of_images_in_one_column(store):
    pairs = Dataset.from_dict({"image_ids": [["0", "3"], ["4", "4"]], "sentence": ["a", "b"]})
    first, second = with_regions(pairs, store, key="image_ids")["regions"]
    assert [len(row["boxes"]) for row in first] == [2, 5]
    assert [len(row["boxes"]) for row in second] == [6, 6]


class TestLayouts:
    @pytest.mark.parametrize("columns", [6, 10])
    def test_tsv(self, tmp_path, rows, columns):
        found = read(write_tsv(tmp_path / "rows.tsv.0", rows, columns))
        check_rows(found, rows, labels=columns == 10)
        assert found["image0"]["boxes"].dtype == np.float32

    def test_tsv_of_other_scripts(self, tmp_path, rows):
        row = rows["image0"]
        line = tsv_line("image0", row, boxes=f"b'{encode(row['boxes'])}'") + "\r\n"
        (tmp_path / "rows.tsv").write_bytes(line.encode())
        check_rows(read(tmp_path / "rows.tsv"), {"image0": row})

    def test_npz(self, tmp_path, rows):
        own, extractors, transposed = rows.values()
        np.savez(tmp_path / "image0.npz", **own)
        for name, row in (("image1.jpg", extractors), ("image2", transposed)):
            labels = {
                "objects_id": row["object_ids"],
                "objects_conf": row["object_scores"],
                "attrs_id": row["attribute_ids"],
                "attrs_conf": row["attribute_scores"],
            }
            features = row["features"].T if row is transposed else row["features"]
            size = {"image_h": HEIGHT, "image_w": WIDTH}
            info = np.array({"pickled": True}, dtype=object)
            np.savez(tmp_path / f"{name}.npz", x=features, bbox=row["boxes"], info=info, **size, **labels)
        check_rows(read(tmp_path), rows)

    def test_hdf5_groups(self, tmp_path, rows):
        h5py = pytest.importorskip("h5py")
        with h5py.File(tmp_path / "rows.h5", "w") as file:
            for name, row in rows.items():
                group = file.create_group(name)
                for key, value in row.items():
                    if key == "image_w":
                        group.attrs[key] = value
                    else:
                        group[key] = value
        check_rows(read(tmp_path / "rows.h5"), rows)

    def test_hdf5_padded_arrays(self, tmp_path, rows):
        h5py = pytest.importorskip("h5py")
        padded = {
            key: np.stack([np.resize(row[key], (9, *row[key].shape[1:])) for row in rows.values()])
            for key in ("boxes", "features")
        }
        with h5py.File(tmp_path / "rows.hdf5", "w") as file:
            file["image_id"] = [name.encode() for name in rows]
            file["num_boxes"] = [len(row["boxes"]) for row in rows.values()]
            file["image_h"], file["image_w"] = [HEIGHT] * 3, [WIDTH] * 3
            file["features"], file["boxes"] = padded["features"], padded["boxes"]
        check_rows(read(tmp_path / "rows.hdf5"), rows, labels=False)

    def test_hdf5_with_pickled_ids(self, tmp_path, rows):
        h5py = pytest.importorskip("h5py")
        boxes = np.concatenate([row["boxes"] for row in rows.values()])
        ends = np.cumsum([len(row["boxes"]) for row in rows.values()])
        with h5py.File(tmp_path / "train.hdf5", "w") as file:
            file["image_features"] = np.concatenate([row["features"] for row in rows.values()])
            file["image_bb"] = boxes
            file["spatial_features"] = np.concatenate([boxes / SCALE, boxes[:, 2:]], axis=1)
            file["pos_boxes"] = np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1)
        with pytest.raises(ValueError, match="train_imgid2idx.pkl is not beside it"):
            read(tmp_path / "train.hdf5")
        ids = pickle.dumps({index: index for index in (2, 0, 1)})
        (tmp_path / "train_imgid2idx.pkl").write_bytes(ids)
        check_rows(read(tmp_path / "train.hdf5"), dict(zip("012", rows.values(), strict=True)), labels=False)

    def test_hdf5_needs_h5py(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "h5py", None)
        (tmp_path / "rows.h5").write_bytes(b"")
        with pytest.raises(ImportError, match="pip install h5py"):
            read(tmp_path / "rows.h5")

    def test_no_such_layout(self, tmp_path):
        (tmp_path / "rows.txt").write_text("")
        for path, message in (
            (tmp_path / "missing.tsv", "does not exist"),
            (tmp_path / "rows.txt", "neither .tsv"),
            (tmp_path, "has no images"),
        ):
            with pytest.raises(ValueError, match=message):
                read(path)


class TestBadFiles:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"boxes": np.zeros((4, 4), np.float32)}, r"boxes holds 16 numbers.*num_boxes 3"),
            ({"features": np.zeros(100, np.float32)}, "features holds 100 numbers"),
            ({"features": np.zeros((3, 63), np.float32)}, "width 63, those before it 64"),
            ({"features": np.full((3, 64), np.nan, np.float32)}, "NaN"),
            ({"object_ids": np.zeros(2, int)}, "object_ids holds 2"),
            ({"features": "AAAA*AAA"}, "features is not float32 in base64"),
            ({"features": encode(np.zeros(192, np.float32))[:-3]}, "features is not float32 in base64"),
            ({"num_boxes": "three"}, "num_boxes is b'three'"),
            ({"num_boxes": 0}, "num_boxes is b'0'"),
            ({"image_h": 0}, "image_h is b'0'"),
            ({"boxes": np.float32([[0, 0, 9, 9], [0, 0, 64.01, 9], [0, 0, 9, 9]])}, "box 1 is .*64 x 48 pix"),
            ({"boxes": np.float32([[0, 0, 9, 9], [0, 0, 9, 9], [0, -1, 9, 9]])}, "box 2 is"),
            ({"boxes": np.float32([[9, 0, 8, 9]] * 3)}, "box 0 is"),
            ({"boxes": np.float32([[0, 0, np.nan, 9]] * 3)}, "box 0 is .*nan"),
            ({"boxes": np.float32([[0, 0, 1, 0.9]] * 3)}, "all boxes lie in 0..1"),
        ],
    )
    def test_names_the_line_and_leaves_nothing(self, tmp_path, changes, message):
        lines = [tsv_line("good", pixel_row()), tsv_line("bad", pixel_row(), **changes)]
        (tmp_path / "rows.tsv").write_text("\n".join(lines))
        with pytest.raises(ValueError, match=rf"rows.tsv, line 2\b.*{message}"):
            convert_features(tmp_path / "rows.tsv", tmp_path / "store", progress=False)
        assert [path.name for path in tmp_path.iterdir()] == ["rows.tsv"]

    def test_a_file_that_was_cut_off(self, tmp_path):
        text = tsv_line("a", pixel_row()) + "\n" + tsv_line("b", pixel_row())
        (tmp_path / "rows.tsv").write_text(text[: text.rindex("\t") - 50])
        with pytest.raises(ValueError, match="line 2: 9 columns instead of 10 or 6"):
            read(tmp_path / "rows.tsv")

    def test_npz(self, tmp_path):
        row = pixel_row()
        whole = io.BytesIO()
        np.savez(whole, **row)
        for content, message in (
            (whole.getvalue()[:-50], "a.npz is not a whole NPZ file"),
            (self.saved(row, "image_h"), "a.npz: none of the arrays image_h"),
            (self.saved(row | {"object_ids": np.zeros(2)}), "object_ids has shape"),
            (self.saved(row | {"boxes": row["boxes"][:2]}), r"features \(3, 64\) and boxes \(2, 4\)"),
        ):
            (tmp_path / "a.npz").write_bytes(content)
            with pytest.raises(ValueError, match=message):
                read(tmp_path)

    @staticmethod
    def saved(row, *without):
        content = io.BytesIO()
        np.savez(content, **{key: value for key, value in row.items() if key not in without})
        return content.getvalue()

    def test_hdf5(self, tmp_path):
        pytest.importorskip("h5py")
        (tmp_path / "a.h5").write_bytes(b"no HDF5")
        with pytest.raises(ValueError, match="a.h5 is not a whole HDF5 file"):
            read(tmp_path / "a.h5")


class TestStatistics:
    @staticmethod
    def warnings_of(tmp_path, change):
        rows = {f"image{i}": pixel_row(i, regions=20) for i in range(3)}
        for row in rows.values():
            row["features"] = change(row["features"])
        path = write_tsv(tmp_path / "rows.tsv", rows)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            list(read_feature_file(path))
        return [str(warning.message) for warning in caught]

    def test_features_like_genuine_ones(self, tmp_path):
        assert self.warnings_of(tmp_path, lambda features: features) == []

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda features: features - 0.1, "negative values"),
            (lambda x: x / np.linalg.norm(x, axis=1, keepdims=True), "L2-normalised"),
            (lambda features: features / 10, "mean 0.0"),
            (lambda features: features + 0.01, r"zeros 0 \(genuine 0.24 to 0.39\)"),
        ],
    )
    def test_one_warning_says_what_is_odd(self, tmp_path, change, message):
        (warning,) = self.warnings_of(tmp_path, change)
        assert message.replace("\\", "") in warning
        assert "rows.tsv" in warning


class TestStore:
    @given(counts=st.lists(st.integers(1, 6), min_size=1, max_size=9), per_file=st.integers(1, 4))
    @settings(max_examples=15, deadline=None)
    def test_round_trip(self, tmp_path_factory, counts, per_file):
        folder = tmp_path_factory.mktemp("store")
        expected = {f"image{i}": region_row(i, regions) for i, regions in enumerate(counts)}
        for name in list(expected)[::2]:  # some rows have no labels
            expected[name] = {k: v for k, v in expected[name].items() if k not in LABELS}
        with RegionWriter(folder, rows_per_file=per_file) as writer:
            for name, row in expected.items():
                writer.write(name, row)
        store = RegionStore(folder)
        assert store.ids == list(expected)
        assert store.feature_dim == 8
        assert len(list(folder.iterdir())) == -(-len(counts) // per_file)
        for name, row in expected.items():
            found = store[name]
            assert set(found) == set(row)
            np.testing.assert_array_equal(found["features"], row["features"].astype(np.float16))
            for key in set(row) - {"features"}:
                np.testing.assert_array_equal(found[key], np.asarray(row[key]))

    def test_rows_are_views_and_batch(self, store):
        rows = [store[3], store["0"]]
        assert rows[0]["features"].dtype == np.float16
        assert not any(value.flags.owndata or value.flags.writeable for value in rows[0].values())
        regions = stack_regions(rows)
        assert regions.mask.sum(dim=1).tolist() == [5, 2]
        assert regions.features.dtype == torch.float32

    def test_contents(self, store):
        assert len(store) == 5
        assert "4" in store
        assert 4 in store
        assert 5 not in store
        with pytest.raises(KeyError, match="no regions of image '5'"):
            store[5]

    def test_opens_as_a_dataset(self, store):
        table = Dataset.from_file(str(store.folder / "regions-00000.arrow"))
        assert table["image_id"][:] == ["0", "1"]
        assert len(table[1]["features"]) == 3

    def test_going_on(self, store):
        with pytest.raises(RuntimeError), RegionWriter(store.folder) as writer:
            assert 4 in writer
            writer.write("5", region_row(5))
            raise RuntimeError
        assert RegionStore(store.folder).ids == ["0", "1", "2", "3", "4", "5"]
        assert RegionStore(store.folder)["0"]["features"].shape == (2, 8)

    def test_tensors(self, tmp_path):
        row = {key: torch.as_tensor(value) for key, value in region_row().items()}
        with RegionWriter(tmp_path) as writer:
            writer.write("a", row)
        np.testing.assert_array_equal(RegionStore(tmp_path)["a"]["boxes"], row["boxes"])

    @pytest.mark.parametrize(
        ("image_id", "change", "message"),
        [
            ("0", {}, "'0' is stored already"),
            ("new", {"features": np.ones((3, 7))}, "width 7, the store 8"),
            ("new", {"features": np.full((3, 8), 1e5)}, "float16 cannot hold"),
            ("new", {"features": np.full((3, 8), np.nan)}, "float16 cannot hold"),
            ("new", {"boxes": np.full((3, 4), 2.0)}, "'new': .*outside 0..1"),
            ("new", {"object_ids": [1]}, "'new': .*object_ids"),
        ],
    )
    def test_rows_that_do_not_fit(self, store, image_id, change, message):
        with RegionWriter(store.folder) as writer, pytest.raises(ValueError, match=message):
            writer.write(image_id, region_row() | change)
        assert len(RegionStore(store.folder)) == 5

    def test_incomplete_rows(self, tmp_path):
        with RegionWriter(tmp_path) as writer, pytest.raises(ValueError, match="no boxes and no image_size"):
            writer.write("a", {"features": np.ones((1, 8))})
        with pytest.raises(ValueError, match="holds no region features"):
            RegionStore(tmp_path)

    def test_a_write_that_fails_leaves_no_file(self, tmp_path, monkeypatch):
        writer = RegionWriter(tmp_path)
        writer.write("a", region_row())
        monkeypatch.setattr("pyarrow.ipc.RecordBatchStreamWriter.write_table", None)
        with pytest.raises(TypeError):
            writer.flush()
        assert list(tmp_path.iterdir()) == []
        monkeypatch.undo()
        writer.flush()
        assert RegionStore(tmp_path).ids == ["a"]

    def test_damaged_files(self, store):
        file = store.folder / "regions-00001.arrow"
        content = file.read_bytes()
        for damaged in (content[:-200], content[:5], b"x" * 100):
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match="regions-00001.arrow is not a whole file"):
                RegionStore(store.folder)

    def test_files_of_two_stores(self, store, tmp_path):
        with RegionWriter(tmp_path / "wide") as writer:
            writer.write("a", region_row(dim=9))
        (tmp_path / "wide" / "regions-00000.arrow").rename(store.folder / "regions-00009.arrow")
        with pytest.raises(ValueError, match="regions-00009.arrow .*columns or width are not those of"):
            RegionStore(store.folder)


@pytest.mark.filterwarnings("ignore:.*genuine")  # few numbers, far from their mean
class TestConvert:
    def test_several_files(self, tmp_path, rows):
        files = [write_tsv(tmp_path / f"{name}.tsv", {name: row}) for name, row in rows.items()]
        store = convert_features(files, tmp_path / "new" / "store", progress=False)
        assert store.ids == list(rows)
        np.testing.assert_array_equal(
            store["image2"]["features"], rows["image2"]["features"].astype(np.float16)
        )
        with pytest.raises(ValueError, match="not an empty folder"):
            convert_features(files, tmp_path / "new" / "store")

    def test_an_image_twice(self, tmp_path, rows):
        file = write_tsv(tmp_path / "rows.tsv", rows)
        with pytest.raises(ValueError, match="'image0' is stored already"):
            convert_features([file, file], tmp_path / "store", progress=False)
        assert [path.name for path in tmp_path.iterdir()] == ["rows.tsv"]
        with pytest.raises(ValueError, match="files is empty"):
            convert_features([], tmp_path / "store")


class TestWithRegions:
    def test_rows_columns_and_pairs(self, store):
        dataset = Dataset.from_dict({"image_id": [3, 1], "left": ["0", "1"], "right": ["2", "2"]})
        rows = with_regions(dataset, store)
        np.testing.assert_array_equal(rows[0]["regions"]["features"], store["3"]["features"])
        assert [len(row["boxes"]) for row in rows["regions"]] == [5, 3]
        assert rows["image_id"][:] == [3, 1]
        assert "regions" in rows.column_names
        pairs = with_regions(dataset, store, ["left", "right"])
        assert [[len(row["boxes"]) for row in pair] for pair in pairs[:]["regions"]] == [[2, 4], [3, 4]]

    def test_selected_shuffled_pickled(self, store):
        dataset = Dataset.from_dict({"image_id": [str(i % 5) for i in range(20)]}).select(range(1, 20))
        rows = with_regions(dataset, store).shuffle(seed=0).select(range(7))
        copy = pickle.loads(pickle.dumps(rows))
        loader = torch.utils.data.DataLoader(
            rows, batch_size=3, num_workers=1, collate_fn=list, multiprocessing_context="fork"
        )
        for found in (rows, copy, [row for batch in loader for row in batch]):
            assert len(found) == 7
            for row in found:
                np.testing.assert_array_equal(row["regions"]["boxes"], store[row["image_id"]]["boxes"])

    def test_images_stay_undecoded(self, store):
        features = Features({"image_id": Value("string"), "image": Image()})
        dataset = Dataset.from_dict({"image_id": ["0"], "image": [picture()]}, features=features)
        assert set(with_regions(dataset, store)[0]["image"]) == {"bytes", "path"}

    def test_after_a_transform(self, store):
        dataset = Dataset.from_dict({"image_id": ["0"], "caption": ["a cat"]})
        dataset = dataset.with_transform(lambda batch: {**batch, "caption": ["a dog"]})
        row = with_regions(dataset, store)[0]
        assert row["caption"] == "a dog"
        assert row["regions"]["boxes"].shape == (2, 4)

    def test_bad_datasets(self, store):
        dataset = Dataset.from_dict({"image_id": ["0", "7"]})
        with pytest.raises(ValueError, match="no regions of 1 images of the dataset, such as '7'"):
            with_regions(dataset, store)
        with pytest.raises(ValueError, match="key='image' must name columns"):
            with_regions(dataset, store, "image")
        with pytest.raises(ValueError, match="has the format numpy"):
            with_regions(dataset.with_format("numpy"), store)
        with pytest.raises(ValueError, match="regions must not be there yet"):
            with_regions(with_regions(dataset.select([0]), store), store)


def test_genuine_rows(butd_dir, tmp_path):
    file = butd_dir / "train2014_obj36.tsv"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        originals = dict(read_feature_file(file))
    assert len(originals) == 10
    store = convert_features(file, tmp_path / "store", progress=False)
    for name, row in originals.items():
        features, boxes = row["features"], row["boxes"]
        assert features.shape == (36, 2048)
        assert 0.49 <= features.mean() <= 0.85
        assert 1.27 <= features.std() <= 1.72
        assert 24.5 <= features.max() <= 35.5
        assert 0.235 <= (features == 0).mean() <= 0.395
        assert features.min() == 0
        height, width = row["image_size"].tolist()
        scale = min(600 / min(height, width), 1000 / max(height, width))
        assert boxes[:, 2].max() * width == pytest.approx((round(scale * width) - 1) / scale, abs=1e-3)
        assert row["object_ids"].max() < 1600
        assert row["attribute_ids"].max() < 400
        np.testing.assert_array_equal(store[name]["features"], features.astype(np.float16))
        for key in {*row} - {"features"}:
            np.testing.assert_array_equal(store[name][key], row[key])
