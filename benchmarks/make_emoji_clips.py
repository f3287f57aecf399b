# mypy: ignore-errors
"""Creates the animations of the bundled model ``emoji-video`` from packages of the npm registry.

    cd PACKAGES_FOLDER
    npm pack emoji-datasource-google@16.0.0 fluentui-emoji-js@1.2.1
    for k in 1 2 3 4; do npm pack @lobehub/fluent-emoji-anim-$k@1.0.0; done
    python benchmarks/make_emoji_clips.py PACKAGES_FOLDER [OUT]

writes ``clips.png``, one RGBA sheet with a row of eight frames per name, equally spaced over the animation, whose
metadata list the names; and the licences, ``NOTICE`` and ``LICENSE-microsoft.txt``. OUT is
``models/bundled/emoji-video`` by default.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

from make_emoji_art import ANIMALS, FACES, FOOD, GOOGLE, MICROSOFT, THINGS, Package, microsoft_licence
from PIL import Image, PngImagePlugin

SIDE, FRAMES = 48, 8
OUT = Path(__file__).resolve().parents[1] / "models" / "bundled" / "emoji-video"

# Of the names of make_emoji_art.py that move, those that move most (mean absolute difference of successive frames).
NAMES = """
laughing-face heart-eyes star-eyes masked-face sick-face hot-face exploding-head cowboy party-face sad-face
surprised-face angry-face angel devil ogre skull clown ghost poop wolf cat lion unicorn zebra cow sheep rabbit bear
koala chick penguin peacock parrot frog turtle whale fish octopus crab snail butterfly bee rocket ufo rainbow star
pumpkin heart
"""
NOTICE = """The animations in clips.png are not fewstep's. They are Fluent Emoji by Microsoft. Eight frames of each were
cut from these packages of the npm registry, reduced to {side} x {side} pixels and arranged in one sheet by
benchmarks/make_emoji_clips.py; nothing else was changed:

{packages}
The packages contain no licence text; their package.json states "{licence}". Microsoft publishes the animations in
https://github.com/microsoft/fluentui-emoji-animated, under the MIT License since October 2024; before that they had no
open licence. Only emoji that have a folder there are used. Whether the frames in the packages equal those in the
repository pixel by pixel was not checked. Microsoft's licence, LICENSE-microsoft.txt, was copied from {microsoft}, a
package that redistributes its still emoji under it.
"""


def frames(package: Package, name: str) -> list[Image.Image]:
    """``FRAMES`` frames of an animation, equally spaced."""
    with Image.open(io.BytesIO(package.files[name])) as animation:
        found = []
        for number in range(FRAMES):
            animation.seek(number * animation.n_frames // FRAMES)
            found.append(animation.convert("RGBA").resize((SIDE, SIDE), Image.Resampling.LANCZOS))
        return found


def main(folder: Path, out: Path = OUT) -> None:
    google, microsoft = Package(folder, GOOGLE), Package(folder, MICROSOFT)
    known_as = {name: other or name for name, _, other in
                (word.partition("=") for word in (FACES + ANIMALS + FOOD + THINGS).split())}  # fmt: skip
    codes = {entry["short_name"]: entry["unified"].lower() for entry in json.loads(google.files["emoji.json"])}
    names, rows, packages, licences = NAMES.split(), {}, [], set()
    for part in range(1, 5):  # one package at a time: each fills 200 MB
        package = Package(folder, f"lobehub-fluent-emoji-anim-{part}-*.tgz")
        packages.append(f"    {package.title}\n")
        licences.add(package.about["license"])
        for name in names:
            code = codes[known_as[name]]
            for file in {f"assets/{code}.webp", f"assets/{code.removesuffix('-fe0f')}.webp"} & package.files.keys():
                rows[name] = frames(package, file)
    sheet = Image.new("RGBA", (FRAMES * SIDE, len(names) * SIDE))
    for row, name in enumerate(names):
        for column, frame in enumerate(rows[name]):
            sheet.paste(frame, (column * SIDE, row * SIDE))
    about = PngImagePlugin.PngInfo()
    about.add_text("names", " ".join(names))
    out.mkdir(parents=True, exist_ok=True)
    sheet.save(out / "clips.png", pnginfo=about, optimize=True)
    notice = NOTICE.format(
        side=SIDE, packages="".join(packages), licence=" and ".join(sorted(licences)), microsoft=microsoft.title
    )
    (out / "NOTICE").write_text(notice)
    (out / "LICENSE-microsoft.txt").write_text(microsoft_licence(microsoft))
    print(f"{len(names)} animations in {out / 'clips.png'}: {(out / 'clips.png').stat().st_size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(Path, sys.argv[2:]))
