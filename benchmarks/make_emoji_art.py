# mypy: ignore-errors
"""Creates the art of the bundled model ``emoji`` from packages of the npm registry.

    cd PACKAGES_FOLDER
    npm pack emoji-datasource-google@16.0.0 @lobehub/fluent-emoji-3d@1.1.0 fluentui-emoji-js@1.2.1
    python benchmarks/make_emoji_art.py PACKAGES_FOLDER [OUT]

writes ``art.png``, one RGBA sheet with the names in reading order and the styles of each side by side, whose metadata
list both, and the licences, ``NOTICE`` and ``LICENSE-microsoft.txt``, as the packages state them. OUT is
``models/bundled/emoji`` by default. Style ``flat`` is Google's Noto Emoji, style ``shiny`` Microsoft's Fluent Emoji.

What Microsoft has not released (national flags, the paperclip, technologists, video games: README of
microsoft/fluentui-emoji) is not used, nor is what a mirror image would spoil: letters, arrows, clocks and hands.
"""

from __future__ import annotations

import io
import json
import re
import sys
import tarfile
from pathlib import Path

from PIL import Image, PngImagePlugin

GOOGLE, FLUENT, MICROSOFT = "emoji-datasource-google-*.tgz", "lobehub-fluent-emoji-3d-*.tgz", "fluentui-emoji-js-*.tgz"
STYLES = ("flat", "shiny")
SIDE, COLUMNS = 64, 16  # pixels of a drawing; names per row of the sheet
OUT = Path(__file__).resolve().parents[1] / "models" / "bundled" / "emoji"

# The words of captions: one word per name. "word=name in emoji.json" where they differ.
FACES = """
laughing-face=laughing heart-eyes=heart_eyes star-eyes=star-struck masked-face=mask sick-face=nauseated_face
hot-face=hot_face cold-face=cold_face exploding-head=exploding_head cowboy=face_with_cowboy_hat
party-face=partying_face sunglasses nerd=nerd_face sad-face=white_frowning_face surprised-face=open_mouth
crying-face=sob angry-face=rage angel=innocent devil=smiling_imp ogre=japanese_ogre skull clown=clown_face ghost alien
robot=robot_face poop=hankey
"""
ANIMALS = """
monkey=monkey_face gorilla dog wolf fox=fox_face cat lion=lion_face tiger horse unicorn=unicorn_face zebra=zebra_face
cow pig sheep camel=dromedary_camel giraffe=giraffe_face elephant mouse rabbit hedgehog bear koala panda=panda_face
rooster chick=hatching_chick penguin owl flamingo peacock parrot duck frog turtle snake dinosaur=sauropod whale fish
octopus jellyfish crab snail butterfly bee ladybug
"""
FOOD = """
grape=grapes watermelon tangerine lemon banana pineapple apple pear peach cherry=cherries strawberry
blueberry=blueberries kiwi=kiwifruit avocado eggplant carrot corn chili=hot_pepper broccoli mushroom pretzel
pancake=pancakes hamburger fries pizza taco popcorn sushi doughnut cookie cake cupcake lollipop icecream
"""
THINGS = """
rose sunflower tulip cactus palm-tree=palm_tree volcano castle=european_castle rocket ufo=flying_saucer sailboat=boat
car fire rainbow snowman=snowman_without_snow star moon=crescent_moon pumpkin=jack_o_lantern balloon gift trophy
football=soccer crown gem guitar heart
"""
NOTICE = """The drawings in art.png are not fewstep's. They were cut from these packages of the npm registry, reduced to
{side} x {side} pixels and arranged in one sheet by benchmarks/make_emoji_art.py; nothing else was changed.

Style "flat" (the left one of each pair): Noto Emoji by Google, from the images of {google}.
Its README states:
{quoted}
The text of the Apache License 2.0 is the file LICENSE of fewstep, which has the same licence.

Style "shiny" (the right one): Fluent Emoji by Microsoft (https://github.com/microsoft/fluentui-emoji), from the images
of {fluent}, which contains no licence text; its package.json states "{fluent_licence}".
Microsoft's licence, LICENSE-microsoft.txt, was copied from {microsoft}, a package that redistributes it.
"""


class Package:
    """A package as ``npm pack`` downloads it."""

    def __init__(self, folder: Path, pattern: str) -> None:
        found = sorted(folder.glob(pattern))
        if len(found) != 1:
            sys.exit(f"{folder} must contain exactly one {pattern}; get it with npm pack (see the top of this file)")
        with tarfile.open(found[0]) as archive:
            members = [member for member in archive if member.isfile()]
            self.files = {m.name.removeprefix("package/"): archive.extractfile(m).read() for m in members}
        self.about = json.loads(self.files["package.json"])
        self.title = f"{self.about['name']} {self.about['version']}"

    def image(self, name: str) -> Image.Image:
        """An image, reduced to ``SIDE`` pixels; Pillow weights the colours of RGBA by their opacity."""
        image = Image.open(io.BytesIO(self.files[name])).convert("RGBA")
        return image if image.size == (SIDE, SIDE) else image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def microsoft_licence(package: Package) -> str:
    """The text of Microsoft's licence in a package."""
    licence = package.files["LICENSE"].decode()
    if "Copyright (c) Microsoft Corporation" not in licence or "MIT License" not in licence:
        sys.exit(f"{package.title} does not contain Microsoft's MIT licence")
    return "".join(f"{line.strip()}\n" for line in licence.splitlines())


def main(folder: Path, out: Path = OUT) -> None:
    google, fluent, microsoft = (Package(folder, pattern) for pattern in (GOOGLE, FLUENT, MICROSOFT))
    codes = {entry["short_name"]: entry["unified"].lower() for entry in json.loads(google.files["emoji.json"])}
    pairs = [word.partition("=") for word in (FACES + ANIMALS + FOOD + THINGS).split()]
    width = len(STYLES) * SIDE
    sheet = Image.new("RGBA", (COLUMNS * width, len(pairs) // COLUMNS * SIDE))
    for number, (name, _, known_as) in enumerate(pairs):
        code = codes[known_as or name]
        short = code if f"assets/{code}.webp" in fluent.files else code.removesuffix("-fe0f")
        x, y = number % COLUMNS * width, number // COLUMNS * SIDE
        sheet.paste(google.image(f"img/google/64/{code}.png"), (x, y))
        sheet.paste(fluent.image(f"assets/{short}.webp"), (x + SIDE, y))
    about = PngImagePlugin.PngInfo()
    about.add_text("names", " ".join(name for name, _, _ in pairs))
    about.add_text("styles", " ".join(STYLES))
    out.mkdir(parents=True, exist_ok=True)
    sheet.save(out / "art.png", pnginfo=about, optimize=True)
    readme = google.files["README.md"].decode()
    quoted = [line for line in readme.splitlines() if re.search(r"noto", line, re.IGNORECASE)]
    notice = NOTICE.format(
        side=SIDE, google=google.title, quoted="\n".join(f"    {line}" for line in quoted), fluent=fluent.title,
        fluent_licence=fluent.about["license"], microsoft=microsoft.title,
    )  # fmt: skip
    (out / "NOTICE").write_text(notice)
    (out / "LICENSE-microsoft.txt").write_text(microsoft_licence(microsoft))
    print(f"{len(pairs)} names in {out / 'art.png'}: {(out / 'art.png').stat().st_size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(Path, sys.argv[2:]))
