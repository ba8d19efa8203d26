"""Verbs about the objects of any store: ls, cp, rm, cat, url. Know what is shown and asked, no kind of store."""

from __future__ import annotations

import sys
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from palate.cli.words import number_of, say_next, seconds, size
from palate.store.errors import ObjectNotFoundError, StoreUsageError
from palate_recipes.visible import visible

if TYPE_CHECKING:
    from palate.store import ObjectInfo, Progress
    from palate.store.between import Place

_Uri = Annotated[str, typer.Argument(help="A path, file://, s3:// or oss://.")]
_Recursive = Annotated[bool, typer.Option("--recursive", "-r", help="A folder, with everything below it.")]

_EVERY_S, _EVERY_S_ON_A_TERMINAL = 10.0, 0.2


def ls(
    uri: _Uri,
    long: Annotated[bool, typer.Option("--long", "-l", help="With bytes and time (UTC).")] = False,
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Every object below, not the folders.")] = False,
) -> None:
    """List what is in a folder: its folders, with a slash at their end, and its objects."""
    place = _open(uri)
    rows: dict[str, ObjectInfo | None] = {}
    below = f"{place.key}/" if place.key else ""
    for info in place.store.list(place.key):
        name = info.key.removeprefix(below)
        first, slash, _ = name.partition("/")
        if slash and not recursive:
            rows[f"{first}/"] = None
        else:
            rows[name] = info
    if not rows and place.key and not (place.path is not None and place.path.is_dir()):
        rows[place.name] = _object(place)
    if not long:
        for name in rows:
            print(visible(name))
        return
    from palate.terminal import print_table

    print_table(
        ("bytes", "modified", "name"),
        [(info.size, _when(info.modified_s), name) if info else ("", "", name) for name, info in rows.items()],
    )


def cp(
    source: _Uri,
    target: Annotated[str, typer.Argument(help="Likewise. One object goes into a folder, or a URI that ends with /.")],
    recursive: _Recursive = False,
) -> None:
    """Copy an object, or with -r what is below a folder; prints where it is. A tree goes on where it broke off."""
    from palate.store import Progress
    from palate.store.between import copy_object, copy_tree

    origin, place = _open(source), _open(target)
    begun = time.monotonic()
    shown = _Shown()
    if recursive:
        files = len(copy_tree(origin, place, progress=shown))
    else:
        info = _object(origin, "it is a folder: give -r to copy what is below it")
        if not place.key or target.endswith("/") or (place.path is not None and place.path.is_dir()):
            place = _open(f"{place.uri.rstrip('/')}/{origin.name}")
        files, done = 1, 0

        def moved(count: int) -> None:
            nonlocal done
            done += count
            shown(Progress(files_done=0, files_total=1, bytes_done=done, bytes_total=info.size))

        copy_object(origin, place, moved=moved)
    shown.end()
    took_s = time.monotonic() - begun
    print(f"{number_of(files, 'file')}, {size(shown.bytes_total)} in place after {took_s:.1f} s", file=sys.stderr)
    print(place.uri)
    say_next("store", "ls", "-l", place.uri)


def rm(
    uris: Annotated[list[str], typer.Argument(help="Paths, file://, s3:// or oss://.")],
    recursive: _Recursive = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove objects, or with -r folders; says how much it is, and asks on a terminal (elsewhere it needs --yes)."""
    places = [_open(uri) for uri in uris]
    for place in places:
        if not place.key:
            raise StoreUsageError(f"{place.uri} is a whole store: name a file or folder in it")
        if recursive:
            infos = list(place.store.list(place.key))
            if not infos:
                raise ObjectNotFoundError(f"{place.uri} holds no object: nothing to remove; check the name")
            what = f"{number_of(len(infos), 'object')}, {size(sum(info.size for info in infos))}, below {place.uri}"
        else:
            info = _object(place, "it is a folder: give -r to remove what is below it")
            what = f"1 object, {size(info.size)}: {place.uri}"
        print(what, file=sys.stderr)
    if not yes:
        if not sys.stdin.isatty():
            raise StoreUsageError("nothing was removed: nobody can be asked here; give --yes to remove it")
        typer.confirm("remove it?", abort=True, err=True)
    for place in places:
        if recursive:
            place.store.delete_tree(place.key)
        else:
            place.store.delete(place.key)
        print(f"{place.uri}\tdeleted")


def cat(uris: Annotated[list[str], typer.Argument(help="Paths, file://, s3:// or oss://.")]) -> None:
    """Write objects to stdout, one after the other."""
    for uri in uris:
        place = _open(uri)
        for block in place.store.stream(place.key):
            sys.stdout.buffer.write(block)
    sys.stdout.buffer.flush()


def url(
    uri: _Uri,
    expires: Annotated[
        str, typer.Option(metavar="AGE", help="How long it lives, such as 30min, 1h, 7d (at most).")
    ] = "1h",
    put: Annotated[bool, typer.Option("--put", help="A link to write the object with, by an HTTP PUT.")] = False,
) -> None:
    """Print a link with which anybody can read (or with --put write) one object of a bucket, without credentials."""
    place = _open(uri)
    link = place.store.presigned_url(
        place.key, expires_s=int(seconds(expires, "--expires")), method="PUT" if put else "GET"
    )
    if not put:
        _object(place)
    print(link)
    print(f"whoever has this link can {'write' if put else 'read'} the object for {expires}", file=sys.stderr)


def _open(uri: str) -> Place:
    from palate.session import get_default_session
    from palate.store.between import open_place

    return open_place(uri, options=get_default_session().options_for(uri))


def _object(place: Place, folder: str = "it is a folder") -> ObjectInfo:
    info = place.store.stat(place.key) if place.key else None
    if info is not None:
        return info
    if not place.key or next(place.store.list(place.key), None) is not None:
        raise StoreUsageError(f"{place.uri}: {folder}")
    raise ObjectNotFoundError(f"{place.uri} is not there: check the name, or wait until it is written")


def _when(modified_s: float) -> str:
    return datetime.fromtimestamp(modified_s, UTC).isoformat(" ", "seconds").removesuffix("+00:00")


class _Shown:
    """Says on stderr how far a copy is: one line that is rewritten on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._every_s = _EVERY_S_ON_A_TERMINAL if self._terminal else _EVERY_S
        self._next = time.monotonic() + self._every_s
        self.bytes_total = 0

    def __call__(self, state: Progress) -> None:
        self.bytes_total = state.bytes_total
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self._every_s
        text = (
            f"{state.files_done:,}/{state.files_total:,} files  {size(state.bytes_done)} of {size(state.bytes_total)}"
        )
        print(
            f"\r{text:60}" if self._terminal else text, end="" if self._terminal else "\n", file=sys.stderr, flush=True
        )

    def end(self) -> None:
        if self._terminal:
            print("\r" + " " * 60 + "\r", end="", file=sys.stderr)


def register(group: typer.Typer) -> None:
    """Adds these verbs to `palate store`."""
    for verb in (ls, cp, rm, cat, url):
        group.command()(verb)
