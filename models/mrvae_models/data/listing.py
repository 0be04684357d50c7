"""What `mrvae data` prints: the public sets there are, and what is known of one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from . import checksums, public
from .checks import DataError, Raw, check_type, check_values
from .public import PUBLIC


def listing() -> Iterator[str]:
    """A line each: name, whether its files are there, what it is, and where from."""
    yield f"public sets, for --data; files are looked for in {public.root()} (MRVAE_DATA)"
    for name, entry in PUBLIC.items():
        path = public.place(name)
        if not entry.files:
            state = "always there"
        elif path is not None:
            state = f"in {path}"
        elif entry.repository is not None:
            state = f"not there; fetched when asked for, from hf:{entry.repository}"
        else:
            state = "not there; mrvae data " + name + " says what to put where"
        yield f"\n{name}\n    {entry.about}\n    {entry.source}; {state}"


def description(source: str) -> Iterator[str]:
    """Where the files of a set lie, whether they are the published ones, and its arrays with their SHA-256.

    Reads the whole set, and fetches it where no files are there. DataError as `load` raises it.
    """
    name, _ = public.split_name(source)
    if name not in PUBLIC:
        raise DataError(f"{source!r} is no public set; expected one of {', '.join(PUBLIC)}")
    entry, path = PUBLIC[name], public.place(name)
    yield f"{source}: {entry.about}\nsource: {entry.source}"
    if path is not None:
        yield f"files: {path}"
        yield from _published(path)
    elif entry.files:
        yield f"files: none in {public.root() / entry.folders[0]}; expected {entry.files}"
        if entry.repository is not None:
            yield f"so from hf:{entry.repository}, which Hugging Face datasets keeps in its cache (HF_HOME)"
    for split, read in public.sets(source).items():
        raw = read()
        yield f"{split}: {_arrays(raw)}"
        if raw.factors is not None:
            sizes = ", ".join(f"{name} {size}" for name, size in zip(raw.factors.names, raw.factors.sizes, strict=True))
            yield f"    factors: {sizes}"
        if entry.files:
            key = checksums.key_of(source, public.origin(name, path), split, raw)
            kept = checksums.entries(public.root() / checksums.FILE).get(key)
            known = f"as at the first load, {kept['first_load']}" if kept else "not kept"
            yield f"    SHA-256 {kept['sha256'] if kept else checksums.sha256(raw)} ({known})"


def _arrays(raw: Raw) -> str:
    check_type(raw.images, raw.origin)
    kind = "0 to 255" if check_values(raw.images, raw.origin) == 255 else f"{raw.images.dtype} in [0, 1]"
    shape = " x ".join(map(str, raw.images.shape[1:]))
    what = "clips" if raw.images.ndim == 5 or "T" in (raw.layout or "") else "images"
    labels = "no labels" if raw.labels is None else f"labels {raw.labels.min()} to {raw.labels.max()}"
    return f"{len(raw.images):,} {what} of {shape}, {kind}, {labels}"


def _published(path: Path) -> Iterator[str]:
    """A line for each file of which the MD5 is known."""
    for file in sorted(path.iterdir()):
        expected = public.OFFICIAL_MD5.get(file.name)
        if expected is not None and file.is_file():
            found = public.md5(file)
            verdict = "as published" if found == expected else f"NOT as published, whose MD5 is {expected}"
            yield f"    {file.name}: MD5 {found}, {verdict}"
