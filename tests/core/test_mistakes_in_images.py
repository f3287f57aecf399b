"""What real folders and tables contain besides images: it is used as its owner means it, or named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from fewstep.core.errors import UserError
from fewstep.core.image_data import ImageData, captions_of, kind_of, open_images
from fewstep.core.image_rows import Columns
from fewstep.models.hub.encode import captioned_folder


def picture(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(file)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of one image each."""
    picture(tmp_path / "set" / "bee" / "1.png")
    picture(tmp_path / "set" / "cat" / "1.png")
    return tmp_path / "set"


def table(folder: Path, text: str) -> ImageData:
    (folder / "a.csv").write_text(text)
    return ImageData("dataset", str(folder / "a.csv"))


# --- folders: an image that would be left out in silence, or a class without images, is an error ----------------------


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (lambda f: (f / "notes").mkdir(), r"set.notes contains no images .*each subfolder of .*set is a class"),
        (lambda f: picture(f / "dog" / "deep" / "1.png"), r"set.dog contains no images"),
        (lambda f: picture(f / "1.png"), r"set.1\.png lies beside the subfolders.* of which each is a class"),
        (lambda f: picture(f / "cat" / "2.tif"), r"set.cat.2\.tif is none of \.png.*: convert it"),
        (lambda f: picture(f / "2.GIF"), r"set.2\.GIF is none of \.png"),
    ],
    ids=["no images", "deeper", "beside", "another type", "another type beside"],
)
def test_what_a_folder_cannot_use_is_named(folder: Path, add: Callable[[Path], object], message: str) -> None:
    add(folder)
    with pytest.raises(UserError, match=message):
        open_images(ImageData("folder", str(folder)))


def test_hidden_files_and_notes_are_no_images(folder: Path) -> None:
    (folder / "bee" / "._1.png").write_bytes(b"what macOS keeps beside each file")
    (folder / "bee" / "sources.txt").write_text("x")
    (folder / "README.md").write_text("x")
    (folder / ".cache").mkdir()
    assert open_images(ImageData("folder", str(folder))).class_names == ("bee", "cat")


@pytest.mark.parametrize("kind", ["folder", "npz", "idx", "dataset"])
def test_a_path_that_the_system_refuses_is_an_error_that_names_it(kind: str) -> None:
    with pytest.raises(UserError, match=r"xxx is not a readable .*File name too long"):
        open_images(ImageData(kind, "x" * 300))


def test_a_folder_that_may_not_be_listed_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(UserError, match=r"set is not a readable set of images .*Permission denied"):
        open_images(ImageData("folder", str(folder)))
    with pytest.raises(UserError, match=r"set is not a readable set of images .*Permission denied"):
        kind_of(str(folder))


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["0.0", "1.0"], r"row 1: the column label has the label 0\.0"),
        (["0", "1.5"], r"row 2: the column label has the label 1\.5"),
        (["0", "-1"], "row 2: the column label has the label -1;"),
        (["1", "2e3"], r"row 2: the column label has the label 2000\.0"),
        (["1", "9" * 30], "row 2: the column label has the label "),
        (["bee", " "], "row 2: the column label has no label"),
    ],
)
def test_numbers_that_are_no_labels_are_not_the_names_of_classes(folder: Path, labels: list[str], message: str) -> None:
    """A spreadsheet writes whole numbers as 1.0 where a cell of the column was empty."""
    rows = "".join(f"{name}/1.png,{label}\n" for name, label in zip(("bee", "cat"), labels, strict=True))
    with pytest.raises(UserError, match=message):
        open_images(table(folder, "file_name,label\n" + rows))


def test_space_around_labels_has_no_meaning(folder: Path) -> None:
    head, rows = "file_name,label\n", "bee/1.png,{0}\ncat/1.png,{1}\ncat/1.png,{2}\n"
    numbers = open_images(table(folder, head + rows.format(" 10", "2 ", "0")))
    assert (numbers.labels.tolist(), numbers.class_names) == ([10, 2, 0], ())
    names = open_images(table(folder, head + rows.format("cat", " cat", "a cat ")))
    assert (names.labels.tolist(), names.class_names) == ([1, 1, 0], ("a cat", "cat"))


def test_a_row_without_a_caption_is_named_where_captions_are_needed(folder: Path) -> None:
    data = table(folder, "file_name,caption\nbee/1.png,a bee\ncat/1.png,\n")
    assert open_images(data).captions is None
    with pytest.raises(UserError, match=r"a\.csv, row 2: the column caption has no text"):
        captions_of(data)


def test_several_columns_of_captions_or_labels_matter_only_where_one_is_needed(tmp_path: Path) -> None:
    picture(tmp_path / "0.png")
    picture(tmp_path / "1.png")
    (tmp_path / "a.csv").write_text("image,label,class,prompt,text\n0.png,1,0,a,b\n1.png,0,1,c,d\n")
    data = ImageData("dataset", str(tmp_path / "a.csv"))
    table = open_images(data)
    with pytest.raises(UserError, match=r"may be the label.* data.columns.label=NAME, or --label NAME"):
        table.labels_of(2)
    with pytest.raises(UserError, match=r"may be the caption.* data.columns.caption=NAME"):
        captions_of(data)
    named = ImageData("dataset", data.path, columns=Columns(label="class", caption="text"))
    assert open_images(named).labels_of(2).tolist() == [0, 1]
    assert captions_of(named) == ["b", "d"]


def test_captions_of_a_folder_are_texts_beside_its_images(folder: Path) -> None:
    data = ImageData("folder", str(folder))
    with pytest.raises(UserError, match="use a folder with a text file beside each image"):
        captions_of(data)
    (folder / "bee" / "1.txt").write_text("a bee\n")
    assert open_images(data).captions is None, "a model of classes needs none"
    with pytest.raises(UserError, match=r"cat.1\.png has no caption: 1\.txt is missing.* every image needs a caption"):
        captions_of(data)
    (folder / "cat" / "1.txt").write_text("a cat\n")
    assert captions_of(data) == ["a bee", "a cat"]
    assert [caption for _, caption in captioned_folder(folder / "cat")] == ["a cat"], (
        "as fewstep data encode reads them"
    )
