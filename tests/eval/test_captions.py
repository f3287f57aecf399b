"""Which caption belongs to which image, and files of captions that belong to other images."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep.core.errors import UserError
from fewstep.eval.captions import Captions


def captions(folder: Path, content: str, name: str = "captions.txt") -> Captions:
    (folder / name).write_text(content, encoding="utf-8")
    return Captions.read(folder / name)


def numbered(*numbers: int) -> list[str]:
    return [f"{k}.png" for k in numbers]


def test_each_caption_of_a_text_file_has_equally_many_images(tmp_path: Path) -> None:
    three = captions(tmp_path, "a\nb\nc\n")
    assert three.pair(numbered(*range(6))) == (numbered(*range(6)), ("a", "b", "c"))
    for count in (7, 5, 2):
        with pytest.raises(UserError, match=rf"{count} images and 3 captions .*a table"):
            three.pair(numbered(*range(count)))


def test_missing_and_repeated_numbers_are_named(tmp_path: Path) -> None:
    three = captions(tmp_path, "a\nb\nc\n")
    with pytest.raises(UserError, match="numbered 0 to 4, without 1, 3, so"):
        three.pair(numbered(0, 2, 4))
    with pytest.raises(UserError, match="same number"):
        three.pair(["1.png", "2.jpg", "2.png"])
    named = ["left/1.png", "right/1.png", "right/3.png"]
    assert three.pair(named) == (named, ("a", "b", "c")), "numbers of several series say nothing"


def test_a_table_pairs_by_name_in_any_order(tmp_path: Path) -> None:
    files = ["0.png", "1.png", "2.png"]
    expected = (["2.png", "0.png", "1.png"], ("two", "zero, \u00e4", "one"))
    table = captions(tmp_path, 'caption,file,seed\ntwo,2.png,0\n"zero, \u00e4",0.png,1\none,1.png,2\n', "a.csv")
    assert table.pair(files) == expected
    lines = [f'{{"file": "{file}", "caption": "{text}"}}' for file, text in zip(*expected, strict=True)]
    other = captions(tmp_path, "\n".join(lines), "a.jsonl")
    assert other.pair(files) == expected
    assert other.sha256 == table.sha256, "the content counts, not the format"


def test_the_images_of_one_caption_in_a_table_are_its_seeds(tmp_path: Path) -> None:
    """Image k then shows caption k modulo their number, as the metrics expect."""
    table = captions(tmp_path, "file,caption\na0.png,a\na1.png,a\nb0.png,b\nb1.png,b\n", "a.csv")
    assert table.conditions == 2
    assert table.pair(["a0.png", "a1.png", "b0.png", "b1.png"]) == (
        ["a0.png", "b0.png", "a1.png", "b1.png"],
        ("a", "b"),
    )
    uneven = captions(tmp_path, "file,caption\na0.png,a\na1.png,a\nb0.png,b\n", "b.csv")
    assert uneven.pair(["a0.png", "a1.png", "b0.png"]) == (["a0.png", "a1.png", "b0.png"], ("a", "a", "b"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file,caption\n0.png,a\n", r"no caption for 1\.png, 2\.png\."),
        ("file,caption\n0.png,a\n1.png,b\n2.png,c\n3.png,d\n", r"images that are missing: 3\.png"),
        ("file,caption\n0.png,a\n0.png,b\n", r"several captions for 0\.png"),
        ("name,caption\n0.png,a\n", "has no column file"),
        ("file,caption\n0.png,\n", "row 1 has no file or no caption"),
        ("file,caption\n", "contains no captions"),
    ],
)
def test_a_table_of_other_images_is_refused(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        captions(tmp_path, content, "a.csv").pair(numbered(0, 1, 2))


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.txt were not found: give a text file, one caption per line, or a table"):
        Captions.read(tmp_path / "no.txt")
    with pytest.raises(UserError, match=r"a\.jsonl, row 1 is not readable.*line 1"):
        captions(tmp_path, '{"file": ', "a.jsonl")


def test_a_table_of_prompts_alone_is_for_models(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('title,prompt\nx,"a red bag, on white"\ny,a dog\n')
    captions = Captions.read(tmp_path / "a.csv")
    assert (captions.texts, captions.files) == (("a red bag, on white", "a dog"), None)
    assert captions.conditions == 2
    with pytest.raises(UserError, match="has no column file"):
        captions.pair(["0.png", "1.png"])
