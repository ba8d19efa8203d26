"""Preference data from a Google Sheet: one worksheet becomes one CSV file, cells as they are shown. Knows no row format.

A service account reads it, by GOOGLE_SHEETS_CLIENT_EMAIL and GOOGLE_SHEETS_PRIVATE_KEY of the environment. No message holds
the key: whatever comes from the libraries is cleaned of it.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from palate.sources.select import Fetched, few
from palate_recipes.errors import (
    ConfigurationError,
    DataError,
    MissingDependencyError,
    StoreDeniedError,
    StoreError,
    StoreUnreachableError,
)

if TYPE_CHECKING:
    from gspread import Client, Spreadsheet, Worksheet


EMAIL = "GOOGLE_SHEETS_CLIENT_EMAIL"
PRIVATE_KEY = "GOOGLE_SHEETS_PRIVATE_KEY"
ENDPOINT = "GOOGLE_SHEETS_ENDPOINT"
TOKEN_URI = "GOOGLE_SHEETS_TOKEN_URI"

_GOOGLE = "https://sheets.googleapis.com"
_GOOGLE_TOKENS = "https://oauth2.googleapis.com/token"
_SCOPES = ("https://www.googleapis.com/auth/spreadsheets.readonly",)
_TIMEOUT_S = 60.0
_GRAMMAR = (
    "gsheet://ID/Worksheet name, or the address of the open sheet: https://docs.google.com/spreadsheets/d/ID/edit#gid=0"
)
_ADDRESS = re.compile(r"https://docs\.google\.com/spreadsheets/(?:u/\d+/)?d/(?P<id>[\w-]{10,})(?:[/?#].*)?", re.ASCII)
_GID = re.compile(r"[?#&]gid=(\d{1,18})(?!\d)", re.ASCII)


@dataclass(frozen=True)
class _Account:
    email: str
    private_key: str = field(repr=False)

    def clean(self, text: object) -> str:
        """Returns a text of a library without anything of the key, on one line."""
        said = " ".join(str(text).split())
        for line in self.private_key.split():
            if len(line) > 8:  # shorter ones are words of the key's own frame
                said = said.replace(line, "***")
        return said


def fetch_sheet(uri: str, folder: Path) -> Fetched:
    """Writes a worksheet to a CSV file in `folder`: its first row is the header, every other row a row.

    Args:
        uri: `gsheet://ID/Worksheet name` or the address of an open sheet. Without a worksheet the spreadsheet must have one alone.
        folder: On this machine.

    Raises:
        ConfigurationError: The URI cannot be understood, or the service account is not set.
        DataError: No such spreadsheet or worksheet; no header, an empty or doubled header cell, no rows.
        MissingDependencyError: gspread is not installed.
        StoreDeniedError: Google refuses the account, or the sheet is not shared with it.
        StoreUnreachableError: Google does not answer.
    """
    key, title, gid = _parse(uri)
    try:
        import gspread  # noqa: F401  # before the settings are asked for: without it they are of no use
    except ImportError:
        raise MissingDependencyError(f"{uri} needs gspread, not installed here: pip install 'palate[data]'") from None
    account = _account(uri)
    with _explained(uri, account):
        spreadsheet = _connect(uri, account).open_by_key(key)
        worksheet = _worksheet(uri, spreadsheet, title, gid)
        cells = [[str(cell) for cell in row] for row in worksheet.get_all_values()]
    origin = f"gsheet://{key}/{worksheet.title}"
    path = (
        folder / f"{worksheet.title.replace('/', '-').lstrip('.')[:60] or 'sheet'}.csv"
    )  # in bytes a name may be too long
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(_table(origin, cells))
    return Fetched((path,), origin, None)


def _parse(uri: str) -> tuple[str, str | None, int | None]:
    """Returns the spreadsheet's id and the worksheet's title or gid."""
    if uri.startswith("gsheet://"):
        key, _, title = uri.removeprefix("gsheet://").partition("/")
        if re.fullmatch(r"[\w-]+", key, re.ASCII):
            return key, title or None, None
    elif found := _ADDRESS.fullmatch(uri):
        gid = _GID.findall(uri)
        return found["id"], None, int(gid[-1]) if gid else None
    raise ConfigurationError(f"{uri!r} names no Google Sheet: write {_GRAMMAR}")


def _account(uri: str) -> _Account:
    email, given = os.environ.get(EMAIL, "").strip(), os.environ.get(PRIVATE_KEY, "").strip()
    missing = [name for name, value in ((EMAIL, email), (PRIVATE_KEY, given)) if not value]
    if missing:
        raise ConfigurationError(
            f"{uri} is read by a Google service account: set {' and '.join(missing)} "
            "(client_email and private_key of the account's JSON key file)"
        )
    # .env files keep quotes and write line breaks as \n.
    return _Account(email, given.strip("\"'").replace("\\n", "\n"))


def _connect(uri: str, account: _Account) -> Client:
    import gspread
    from google.oauth2.service_account import Credentials

    base = os.environ.get(ENDPOINT, "").strip().rstrip("/") or _GOOGLE
    facts = {
        "client_email": account.email,
        "private_key": account.private_key,
        "token_uri": os.environ.get(TOKEN_URI, "").strip() or _GOOGLE_TOKENS,
    }
    try:
        credentials = Credentials.from_service_account_info(facts, scopes=_SCOPES)
    except Exception:  # of several libraries, and some repeat what they were given
        raise ConfigurationError(
            f"{uri}: {PRIVATE_KEY} is no private key in PEM form. It begins with -----BEGIN PRIVATE KEY----- and is "
            "the whole of private_key in the account's JSON key file; line breaks may be written \\n"
        ) from None
    client = gspread.Client(credentials)
    client.set_timeout(_TIMEOUT_S)
    ask = client.http_client.request

    def request(method: str, endpoint: str, *args: Any, **options: Any) -> Any:
        return ask(method, endpoint.replace(_GOOGLE, base, 1), *args, **options)

    # gspread writes Google's address into each request: this is the one place to name another.
    client.http_client.request = request
    return client


def _worksheet(uri: str, spreadsheet: Spreadsheet, title: str | None, gid: int | None) -> Worksheet:
    sheets = spreadsheet.worksheets()
    if title is not None:
        found = [sheet for name in (title, unquote(title)) for sheet in sheets if sheet.title == name]
    elif gid is not None:
        found = [sheet for sheet in sheets if sheet.id == gid]
    else:
        found = sheets if len(sheets) == 1 else []
    if found:
        return found[0]
    asked = (
        f"no worksheet {title!r}"
        if title
        else f"no worksheet with gid={gid}"
        if gid is not None
        else "no worksheet named"
    )
    ways = "\n  ".join(f"gsheet://{spreadsheet.id}/{sheet.title}" for sheet in sheets)
    raise DataError(f"{uri}: {asked} among those of {spreadsheet.title!r}. Give one of them:\n  {ways}")


def _table(origin: str, cells: list[list[str]]) -> list[list[str]]:
    """Returns header and rows without the empty columns at the right, or raises DataError."""
    width = max((index + 1 for row in cells for index, cell in enumerate(row) if cell.strip()), default=0)
    cells = [row[:width] + [""] * (width - len(row)) for row in cells]
    if not width or not any(cell.strip() for cell in cells[0]):
        raise DataError(
            f"{origin} has no header: its first row must name the columns, such as prompt, chosen, rejected"
        )
    header = cells[0]
    empty = [_column(index) + "1" for index, name in enumerate(header) if not name.strip()]
    if empty:
        raise DataError(f"{origin}: empty header cell {few(empty)}. Name the column there, or delete it")
    seen: dict[str, int] = {}
    for index, name in enumerate(header):
        first = seen.setdefault(name.strip(), index)
        if first != index:
            raise DataError(
                f"{origin}: the header {name.strip()!r} stands in {_column(first)}1 and {_column(index)}1. Rename or delete one"
            )
    if len(cells) == 1:
        raise DataError(
            f"{origin} has a header ({few(header)}) and no rows below it: add rows, or name another worksheet"
        )
    return cells


def _column(index: int) -> str:
    """Returns a column's letters, `A` for 0 and `AA` for 26."""
    letters = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        letters = chr(ord("A") + rest) + letters
    return letters


@contextmanager
def _explained(uri: str, account: _Account) -> Iterator[None]:
    """Turns what gspread, google-auth and requests raise into errors with URI, cause and remedy, without the key."""
    import requests
    from google.auth.exceptions import GoogleAuthError, TransportError
    from gspread.exceptions import APIError, GSpreadException, SpreadsheetNotFound

    share = f"share the sheet with {account.email} (as Viewer)"
    # `from None` throughout: the causes hold requests, and those the signed assertion.
    try:
        yield
    except (ConfigurationError, DataError):
        raise
    except SpreadsheetNotFound:
        raise DataError(f"{uri} is not there: check the id in its address, and {share}") from None
    except PermissionError as error:  # open_by_key's own word for 403
        raise _denied(uri, account, error.__cause__ or error, share) from None
    except APIError as error:
        status, said = error.response.status_code, account.clean(error.error.get("message", "")) or "no reason given"
        if status in (401, 403):
            raise _denied(uri, account, error, share) from None
        if status == 429 or status >= 500:
            raise StoreUnreachableError(
                f"{uri}: Google Sheets answers {status}: {said}. Wait a minute and try again"
            ) from None
        raise DataError(
            f"{uri}: Google Sheets answers {status}: {said}. Check the id, and that it is a Google Sheet and no uploaded "
            "Excel file"
        ) from None
    except (TransportError, requests.RequestException) as error:
        raise StoreUnreachableError(
            f"{uri} cannot be reached: {account.clean(error)}. Check the network, proxy settings, {ENDPOINT} and {TOKEN_URI}"
        ) from None
    except GoogleAuthError as error:
        raise StoreDeniedError(
            f"{uri}: the service account {account.email} is refused: {account.clean(error)}. Check that {EMAIL} and {PRIVATE_KEY} "
            "belong together and are not revoked, and this machine's clock"
        ) from None
    except (GSpreadException, KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{uri}: the answer is not that of Google Sheets ({type(error).__name__}: {account.clean(error)}). Check {ENDPOINT}"
        ) from None


def _denied(uri: str, account: _Account, error: BaseException, share: str) -> StoreDeniedError:
    said = account.clean(error)
    if "disabled" in said or "has not been used" in said:
        return StoreDeniedError(f"{uri}: {said}. Enable the Google Sheets API in the account's project")
    return StoreDeniedError(f"{uri} may not be read ({said}): {share}")
