"""Captions of images: a text file with one per line, or a table, which may pair them with files by name."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fewstep.core.errors import UserError
from fewstep.core.tables import TABLE_SUFFIXES, read_table, read_texts, table_columns

COLUMNS = ("file", "caption")
SHOWN = 5  # names in a message


@dataclass(frozen=True)
class Captions:
    """The ``texts`` of a file; ``files`` names the image of each, if the file is a table."""

    path: Path
    texts: tuple[str, ...]
    files: tuple[str, ...] | None = None

    @staticmethod
    def read(path: Path) -> Captions:
        """Raises ``UserError`` that names a missing file, or an invalid line of it."""
        if not path.is_file():
            raise UserError(
                f"The captions {path} were not found: give a text file, one caption per line, or a table (.csv, .jsonl "
                "or .parquet with caption, and file to pair them with images) with --captions."
            )
        if path.suffix.lower() not in TABLE_SUFFIXES or COLUMNS[0] not in table_columns(path):
            return Captions(path, tuple(read_texts(path)))
        files, texts = zip(*((file, text.strip()) for file, text in read_table(path, COLUMNS)), strict=True)
        if repeated := [name for name, count in Counter(files).items() if count > 1]:
            raise UserError(f"{path} has several captions for {_listed(repeated)}.")
        return Captions(path, texts, files)

    @property
    def sha256(self) -> str:
        """The hash of the texts and names, independent of the path and of the format of the table."""
        return hashlib.sha256(json.dumps([self.texts, self.files]).encode()).hexdigest()

    @property
    def conditions(self) -> int:
        """The number of captions whose images are compared with each other."""
        return len(self.texts if self.files is None else set(self.texts))

    def pair(self, names: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
        """The names of images in the order in which image k shows caption ``k % len(captions)``, and these captions.

        With a text file, that order is the natural order of the names; numbers in them must be consecutive, and every
        caption must have equally many images. With a table, images pair by name, and those of one caption may be
        anywhere in it. Raises ``UserError`` if images and captions do not belong together.
        """
        if self.files is None:
            if self.path.suffix.lower() in TABLE_SUFFIXES:
                raise UserError(f"{self.path} has no column file, which says which image each caption belongs to.")
            self._check_numbers(names)
            return list(names), self.texts
        by_name = dict(zip(self.files, self.texts, strict=True))
        if unknown := [name for name in names if name not in by_name]:
            raise UserError(f"{self.path} has no caption for {_listed(unknown)}.")
        if missing := sorted(set(by_name) - set(names)):
            raise UserError(f"{self.path} has captions for images that are missing: {_listed(missing)}.")
        images: dict[str, list[str]] = {}
        for file, text in by_name.items():
            images.setdefault(text, []).append(file)
        if len({len(group) for group in images.values()}) == 1:  # round by round, as the metrics expect
            return [file for turn in zip(*images.values(), strict=True) for file in turn], tuple(images)
        return list(self.files), self.texts

    def _check_numbers(self, names: Sequence[str]) -> None:
        found = [re.fullmatch(r"(.*?)(\d+)", str(Path(name).with_suffix(""))) for name in names]
        numbers = [int(match[2]) for match in found if match]
        if len(numbers) == len(names) and len({match[1] for match in found if match}) == 1:
            if missing := sorted(set(range(min(numbers), max(numbers) + 1)) - set(numbers)):
                raise UserError(
                    f"The images are numbered {min(numbers)} to {max(numbers)}, without {_listed(missing)}, so "
                    f"captions in {self.path} would belong to other images; add the missing ones, or give a table "
                    "(.csv or .jsonl with file and caption)."
                )
            if len(set(numbers)) < len(numbers):
                raise UserError(f"Several of the images have the same number ({len(numbers) - len(set(numbers))} do).")
        if len(names) % len(self.texts):
            raise UserError(
                f"{len(names):,} images and {len(self.texts):,} captions in {self.path}: each caption must have "
                "equally many images. Give a table (.csv or .jsonl with file and caption) if they differ."
            )


def _listed(items: Sequence[object]) -> str:
    """``"3, 4 and 9 more"``"""
    more = f" and {len(items) - SHOWN:,} more" if len(items) > SHOWN else ""
    return ", ".join(map(str, items[:SHOWN])) + more
