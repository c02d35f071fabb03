"""Every layout gives the same images, and what is wrong with a source is said in one sentence."""

import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ssltrain import UsageError, data

CLASSES = ["ant", "bee"]


def draw(path: Path, value: int, mode: str = "L", size: tuple[int, int] = (6, 5)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 0, 255)).save(path)


@pytest.fixture
def folder(tmp_path):
    """6 training and 2 test images of 6 x 5 pixels; the grey level of each tells which one it is."""
    root = tmp_path / "set"
    for c, name in enumerate(CLASSES):
        for i in range(3):
            draw(root / "train" / name / f"{i}.png", 10 * c + i)
        draw(root / "test" / name / "0.png", 100 + c)
    return root


def pack(folder: Path, layout: str) -> Path:
    if layout == "folder":
        return folder
    if layout == "zip":
        return Path(shutil.make_archive(str(folder), "zip", folder.parent, folder.name))
    path = folder.with_suffix("." + layout)
    with tarfile.open(path, "w:" + layout.removeprefix("tar.").removeprefix("tar")) as archive:
        for file in sorted(folder.rglob("*.*"), reverse=True):  # an archive has an order of its own
            archive.add(file, f"./{file.relative_to(folder.parent)}")
    return path


@pytest.mark.parametrize("layout", ["folder", "zip", "tar", "tar.gz", "tar.xz"])
def test_layouts(folder, layout):
    images = data.load(str(pack(folder, layout)))
    assert images.classes == CLASSES
    assert images.train.dtype == torch.uint8 and images.train.shape == (6, 1, 5, 6) and images.size == (5, 6)
    assert images.train[:, 0, 0, 0].tolist() == [0, 1, 2, 10, 11, 12]
    assert images.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images.test[:, 0, 0, 0].tolist() == [100, 101] and images.test_labels.tolist() == [0, 1]
    assert images.notes == []


def test_without_a_test_folder_a_fifth_of_every_class_is_held_out(tmp_path):
    for name in CLASSES:
        for i in range(10):
            draw(tmp_path / name / f"{i}.png", i)
    images, again = data.load(str(tmp_path)), data.load(str(tmp_path))
    assert images.test_labels.tolist() == [0, 0, 1, 1] and len(images.train) == 16
    assert torch.equal(images.test, again.test)
    for c in (0, 1):  # nothing is lost and nothing is in both
        levels = [
            part[part_labels == c][:, 0, 0, 0].tolist()
            for part, part_labels in ((images.train, images.train_labels), (images.test, images.test_labels))
        ]
        assert sorted(sum(levels, [])) == list(range(10))
    assert "no test folder" in images.notes[0]


def test_images_that_are_held_out_take_the_place_of_the_test_set(folder):
    whole, images, again = (data.load(str(folder), held_out=count) for count in (None, 2, 2))
    levels = [part[:, 0, 0, 0].tolist() for part in (images.train, images.test)]
    assert len(levels[1]) == 2 and sorted(sum(levels, [])) == whole.train[:, 0, 0, 0].tolist()  # and no test image
    assert [[level // 10 for level in part] for part in levels] == [
        images.train_labels.tolist(),
        images.test_labels.tolist(),
    ]
    assert torch.equal(images.test, again.test) and "the real test set is not used" in images.notes[-1]
    assert len(data.load(str(folder), limit=3, held_out=2).train) == 3
    for name in CLASSES:  # without classes
        shutil.move(folder / "train" / name / "0.png", folder / f"{name}.png")
    shutil.rmtree(folder / "train"), shutil.rmtree(folder / "test")
    assert len(data.load(str(folder), held_out=1).train) == 1
    with pytest.raises(UsageError, match="^--held-out 2: would leave no training image; hold out fewer.$"):
        data.load(str(folder), held_out=2)


def test_a_corrupt_file_is_left_out_and_named(folder):
    broken = folder / "train" / "ant" / "1.png"
    broken.write_bytes(broken.read_bytes()[:40])
    images = data.load(str(folder))
    assert images.train[:, 0, 0, 0].tolist() == [0, 2, 10, 11, 12]
    assert any(n.startswith("warning: 1 files") and "train/ant/1.png" in n for n in images.notes)


def test_one_colour_image_makes_the_set_colour_and_sizes_are_made_equal(folder):
    draw(folder / "train" / "ant" / "9.png", 7, "RGB", (12, 12))
    images = data.load(str(folder))
    assert images.train.shape == (7, 3, 5, 6)
    assert images.train[3, :, 0, 0].tolist() == [7, 0, 255] and images.train[1, :, 0, 0].tolist() == [1, 1, 1]
    assert any("1 images were scaled" in n for n in images.notes)
    assert data.load(str(folder), image_size=8).size == (8, 8)


def test_16_bit_and_palette_images(folder):
    Image.fromarray(np.full((5, 6), 200 * 256 + 3, np.uint16)).save(folder / "train" / "ant" / "3.png")
    assert data.load(str(folder)).train[3, 0, 0, 0] == 200
    Image.new("P", (6, 5)).save(folder / "train" / "ant" / "4.png")
    assert data.load(str(folder)).channels == 3


def test_classes_without_images_are_named(folder):
    (folder / "train" / "cow").mkdir()
    for file in (folder / "train" / "bee").iterdir():
        file.write_bytes(b"no image")
    for file in (folder / "test" / "bee").iterdir():
        file.unlink()
    draw(folder / "train" / "dog" / "0.png", 5)
    notes = data.load(str(folder)).notes
    assert "warning: no image in test/bee, train/bee, train/cow" in notes


@pytest.mark.parametrize("layout", ["folder", "zip", "tar"])
@pytest.mark.parametrize(
    "train, test", [("TRAIN", "Test"), ("training", "Testing"), ("Train", "valid"), ("train", "VAL")]
)
def test_a_split_has_any_of_its_usual_names(folder, layout, train, test):
    (folder / "train").rename(folder / train)
    (folder / "test").rename(folder / test)
    images = data.load(str(pack(folder, layout)))
    assert images.classes == CLASSES and len(images.train) == 6 and len(images.test) == 2 and not images.notes


def test_of_several_test_folders_one_is_taken_and_the_others_are_named(folder):
    draw(folder / "Validation" / "ant" / "7.png", 7)
    images = data.load(str(folder))
    assert images.classes == CLASSES and len(images.test) == 2
    assert images.notes == ["1 images outside of the train and test class folders are not used: Validation/ant/7.png"]


def test_a_test_folder_beside_the_classes_is_no_class(tmp_path):
    for name, level in (("ant/0", 0), ("ant/1", 1), ("bee/0", 2), ("bee/1", 3), ("Test/ant/0", 4), ("Test/bee/0", 5)):
        draw(tmp_path / f"{name}.png", level)
    images = data.load(str(tmp_path))
    assert images.classes == CLASSES and images.train[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert images.test[:, 0, 0, 0].tolist() == [4, 5] and images.test_labels.tolist() == [0, 1] and not images.notes


def test_classes_may_be_called_train_or_valid(tmp_path):
    for name in ("train", "bus", "valid"):
        draw(tmp_path / name / "0.png", 0)
        draw(tmp_path / name / "1.png", 1)
    assert data.load(str(tmp_path)).classes == ["bus", "train", "valid"]


@pytest.mark.parametrize(
    "names, train, test",
    [
        (["a", "b", "c"], 3, 0),
        (["ant/a", "ant/b", "c"], 3, 0),
        (["set/ant/a", "set/ant/b", "c"], 3, 0),
        (["val/a", "val/b", "val/c"], 3, 0),
        (["train/a", "train/b", "test/c"], 2, 1),
        (["Train/ant/a", "Train/b", "test/ant/c", "test/bee/d"], 2, 2),
    ],
)
def test_without_classes_all_images_train_and_there_are_no_labels(tmp_path, names, train, test):
    for level, name in enumerate(names):
        draw(tmp_path / f"{name}.png", level)
    images = data.load(str(tmp_path))
    assert images.classes == [] and (len(images.train), len(images.test)) == (train, test)
    assert sorted(images.train[:, 0, 0, 0].tolist()) == list(range(train)) and not images.train_labels.any()
    assert [n for n in images.notes if "no labels to probe with" in n] == images.notes


def test_loose_files_beside_the_folder_of_a_set_are_named(folder):
    draw(folder / "logo.png", 9)
    images = data.load(str(pack(folder, "zip")))
    assert images.classes == CLASSES and len(images.train) == 6
    assert any(n.startswith("1 images outside") and n.endswith("set/logo.png") for n in images.notes)


def cifar10(root: Path, **replaced) -> Path:
    """The published files with 10 images a batch; the first pixel of each tells batch and place."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for b, name in enumerate([*data.CIFAR10_TRAIN, data.CIFAR10_TEST]):
        pixels = np.zeros((10, 3072), np.uint8)
        pixels[:, 0], pixels[:, 1024] = 10 * b + np.arange(10), 200  # red and green of the first pixel
        content = {b"data": pixels, b"labels": list(range(10)), b"batch_label": name.encode()}
        (folder / name).write_bytes(pickle.dumps(replaced.get(name, content), protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"plane", *[b"x%d" % i for i in range(9)]]}))
    return folder


@pytest.mark.parametrize("layout", ["folder", "parent", "tar.gz"])
def test_cifar10_as_published(tmp_path, layout):
    path = cifar10(tmp_path)
    if layout == "parent":
        path = tmp_path
    elif layout == "tar.gz":
        archive = tmp_path / "cifar-10-python.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(path, path.name)
        path = archive
    images = data.load(str(path))
    assert images.train.shape == (50, 3, 32, 32) and images.test.shape == (10, 3, 32, 32)
    assert images.train[:, 0, 0, 0].tolist() == list(range(50)) and images.test[3, :, 0, 0].tolist() == [53, 200, 0]
    assert images.train_labels.tolist() == 5 * list(range(10)) and images.classes[0] == "plane"


class Evil:
    def __reduce__(self):
        return print, ("this must not run",)


def test_a_pickle_that_calls_something_is_refused(tmp_path, capsys):
    path = cifar10(tmp_path, test_batch=Evil())
    with pytest.raises(UsageError, match="it calls .*print.*download it again"):
        data.load(str(path))
    assert "must not run" not in capsys.readouterr().out
    (path / "data_batch_3").unlink()
    with pytest.raises(UsageError, match="data_batch_3 is missing"):
        data.load(str(path))


def test_mnist5k():
    images = data.load("mnist5k")
    assert images.train.shape == (4000, 1, 28, 28) and images.test.shape == (1000, 1, 28, 28)
    assert (
        images.train_labels.bincount().tolist() == [400] * 10 and images.test_labels.bincount().tolist() == [100] * 10
    )
    assert images.train.max() == 255


def test_a_limit_keeps_a_shuffled_subset():
    images = data.load("digits", limit=200)
    assert len(images.train) == 200 and len(images.train_labels.unique()) == 10


def test_mistakes(folder, tmp_path):
    def sentence(source, **options) -> str:
        with pytest.raises(UsageError) as error:
            data.load(str(source), **options)
        text = str(error.value)
        assert "\n" not in text and text.endswith(".")
        return text

    assert "no such folder" in sentence(tmp_path / "nothing")
    assert "fixed size" in sentence("digits", image_size=16)
    (tmp_path / "empty").mkdir()
    assert "no image files" in sentence(tmp_path / "empty")
    (tmp_path / "text.tar").write_text("not an archive")
    assert "can be read" in sentence(tmp_path / "text.tar")
    cut = pack(folder, "tar.gz")
    cut.write_bytes(cut.read_bytes()[:-40])
    assert "can be read" in sentence(cut)
    draw(tmp_path / "tests" / "test" / "ant" / "a.png", 1)
    draw(tmp_path / "tests" / "Val" / "ant" / "a.png", 1)
    assert "no train folder beside Val, test" in sentence(tmp_path / "tests")
    draw(tmp_path / "few" / "ant" / "a.png", 1)
    draw(tmp_path / "few" / "bee" / "a.png", 1)
    assert "at least two are needed" in sentence(tmp_path / "few")
    draw(folder / "test" / "cow" / "0.png", 1)
    assert "'cow' is in test but not in train" in sentence(folder)
    for file in folder.rglob("*.png"):
        file.write_bytes(b"no image")
    assert "none of its 9 image files" in sentence(folder)
