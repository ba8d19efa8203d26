"""Preference data from a Google Sheet: one worksheet becomes one CSV file, with the displayed values. Knows no row format.

A service account reads it, from the variables GOOGLE_SHEETS_CLIENT_EMAIL and GOOGLE_SHEETS_PRIVATE_KEY. No message contains
the key: it is removed from the libraries' messages.
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
_GRAMMAR = "gsheet://ID/Worksheet name, or the URL of the sheet: https://docs.google.com/spreadsheets/d/ID/edit#gid=0"
_ADDRESS = re.compile(r"https://docs\.google\.com/spreadsheets/(?:u/\d+/)?d/(?P<id>[\w-]{10,})(?:[/?#].*)?", re.ASCII)
_GID = re.compile(r"[?#&]gid=(\d{1,18})(?!\d)", re.ASCII)


@dataclass(frozen=True)
class _Account:
    email: str
    private_key: str = field(repr=False)

    def clean(self, text: object) -> str:
        """Returns a library's message on one line, without any part of the key."""
        said = " ".join(str(text).split())
        for line in self.private_key.split():
            if len(line) > 8:  # shorter ones are words of the PEM header and footer
                said = said.replace(line, "***")
        return said


def fetch_sheet(uri: str, folder: Path) -> Fetched:
    """Writes a worksheet to a CSV file in `folder`; its first row is the header.

    Args:
        uri: `gsheet://ID/Worksheet name` or the URL of a sheet. Without a worksheet, the spreadsheet must have only one.
        folder: Local folder.

    Raises:
        ConfigurationError: The URI is invalid, or the service account is not set.
        DataError: No such spreadsheet or worksheet; no header, an empty or duplicate header cell, no rows.
        MissingDependencyError: gspread is not installed.
        StoreDeniedError: Google rejects the account, or the sheet is not shared with it.
        StoreUnreachableError: Google does not respond.
    """
    key, title, gid = _parse(uri)
    try:
        import gspread  # noqa: F401  # before the settings are read: they are useless without it
    except ImportError:
        raise MissingDependencyError(
            f"{uri} needs gspread, which is not installed: pip install 'palate[data]'"
        ) from None
    account = _account(uri)
    with _explained(uri, account):
        spreadsheet = _connect(uri, account).open_by_key(key)
        worksheet = _worksheet(uri, spreadsheet, title, gid)
        cells = [[str(cell) for cell in row] for row in worksheet.get_all_values()]
    origin = f"gsheet://{key}/{worksheet.title}"
    path = (
        folder / f"{worksheet.title.replace('/', '-').lstrip('.')[:60] or 'sheet'}.csv"
    )  # 60 characters: file names are limited to 255 bytes
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
    raise ConfigurationError(f"{uri!r} is not a Google Sheet: expected {_GRAMMAR}")


def _account(uri: str) -> _Account:
    email, given = os.environ.get(EMAIL, "").strip(), os.environ.get(PRIVATE_KEY, "").strip()
    missing = [name for name, value in ((EMAIL, email), (PRIVATE_KEY, given)) if not value]
    if missing:
        raise ConfigurationError(
            f"{uri} needs a Google service account: set {' and '.join(missing)} "
            "(client_email and private_key of the account's JSON key file)"
        )
    # Values from .env files can have quotes, and line breaks as \n.
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
    except Exception:  # from several libraries; some messages contain the key, so none is chained
        raise ConfigurationError(
            f"{uri}: {PRIVATE_KEY} is not a private key in PEM format. Set it to the whole private_key of the account's "
            "JSON key file, which begins with -----BEGIN PRIVATE KEY-----; line breaks may be written as \\n"
        ) from None
    client = gspread.Client(credentials)
    client.set_timeout(_TIMEOUT_S)
    ask = client.http_client.request

    def request(method: str, endpoint: str, *args: Any, **options: Any) -> Any:
        return ask(method, endpoint.replace(_GOOGLE, base, 1), *args, **options)

    # gspread hard-codes Google's URL in each request, so the endpoint can only be replaced here.
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
        else "several worksheets, and none selected"
    )
    ways = "\n  ".join(f"gsheet://{spreadsheet.id}/{sheet.title}" for sheet in sheets)
    raise DataError(f"{uri}: {asked} in {spreadsheet.title!r}. Use one of:\n  {ways}")


def _table(origin: str, cells: list[list[str]]) -> list[list[str]]:
    """Returns header and rows without trailing empty columns; raises DataError for a bad header or no rows."""
    width = max((index + 1 for row in cells for index, cell in enumerate(row) if cell.strip()), default=0)
    cells = [row[:width] + [""] * (width - len(row)) for row in cells]
    if not width or not any(cell.strip() for cell in cells[0]):
        raise DataError(
            f"{origin} has no header: its first row must name the columns, such as prompt, chosen, rejected"
        )
    header = cells[0]
    empty = [_column(index) + "1" for index, name in enumerate(header) if not name.strip()]
    if empty:
        raise DataError(f"{origin}: empty header cell {few(empty)}. Name the column, or delete it")
    seen: dict[str, int] = {}
    for index, name in enumerate(header):
        first = seen.setdefault(name.strip(), index)
        if first != index:
            raise DataError(
                f"{origin}: the header {name.strip()!r} is in both {_column(first)}1 and {_column(index)}1. Rename or delete one"
            )
    if len(cells) == 1:
        raise DataError(f"{origin} has a header ({few(header)}) but no rows: add rows, or select another worksheet")
    return cells


def _column(index: int) -> str:
    """Returns the letters of a column: `A` for 0, `AA` for 26."""
    letters = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        letters = chr(ord("A") + rest) + letters
    return letters


@contextmanager
def _explained(uri: str, account: _Account) -> Iterator[None]:
    """Turns exceptions of gspread, google-auth and requests into errors with URI, cause and remedy, without the key."""
    import requests
    from google.auth.exceptions import GoogleAuthError, TransportError
    from gspread.exceptions import APIError, GSpreadException, SpreadsheetNotFound

    share = f"share the sheet with {account.email} (as Viewer)"
    # `from None` everywhere: the causes contain requests with the signed assertion.
    try:
        yield
    except (ConfigurationError, DataError):
        raise
    except SpreadsheetNotFound:
        raise DataError(f"{uri} does not exist: check the id in its URL, and {share}") from None
    except PermissionError as error:  # open_by_key raises it for 403
        raise _denied(uri, account, error.__cause__ or error, share) from None
    except APIError as error:
        status, said = error.response.status_code, account.clean(error.error.get("message", "")) or "no reason given"
        if status in (401, 403):
            raise _denied(uri, account, error, share) from None
        if status == 429 or status >= 500:
            raise StoreUnreachableError(
                f"{uri}: Google Sheets returned status {status}: {said}. Wait a minute and try again"
            ) from None
        raise DataError(
            f"{uri}: Google Sheets returned status {status}: {said}. Check the id, and that it is a Google Sheet and not an "
            "uploaded Excel file"
        ) from None
    except (TransportError, requests.RequestException) as error:
        raise StoreUnreachableError(
            f"{uri} cannot be reached: {account.clean(error)}. Check the network, proxy settings, {ENDPOINT} and {TOKEN_URI}"
        ) from None
    except GoogleAuthError as error:
        raise StoreDeniedError(
            f"{uri}: Google rejected the service account {account.email}: {account.clean(error)}. Check that {EMAIL} and "
            f"{PRIVATE_KEY} belong together and are not revoked, and check this machine's clock"
        ) from None
    except (GSpreadException, KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{uri}: the response is not from Google Sheets ({type(error).__name__}: {account.clean(error)}). Check {ENDPOINT}"
        ) from None


def _denied(uri: str, account: _Account, error: BaseException, share: str) -> StoreDeniedError:
    said = account.clean(error)
    if "disabled" in said or "has not been used" in said:
        return StoreDeniedError(f"{uri}: {said}. Enable the Google Sheets API in the account's project")
    return StoreDeniedError(f"access to {uri} was denied ({said}): {share}")
