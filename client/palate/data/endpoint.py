"""An OpenAI-compatible endpoint: where it is, the key for it, and what the ledger knows it by. Sends nothing."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from palate.errors import ConfigurationError, PalateError

if TYPE_CHECKING:
    from palate.session import Session

NO_KEY = "none"
"""What is sent where no key is known: servers without keys take anything."""

OPENAI_URL = "https://api.openai.com/v1"


class EndpointError(PalateError, RuntimeError):
    """An endpoint refused a call that no retry can mend, or is gone.

    Attributes:
        endpoint: Its base URL.
        model: The model that was asked.
        status: The HTTP status of the last answer; None when there was none.
    """

    def __init__(self, message: str, *, endpoint: str, model: str, status: int | None = None) -> None:
        self.endpoint = endpoint
        self.model = model
        self.status = status
        super().__init__(message)


@dataclass(frozen=True)
class Endpoint:
    """Where chat completions are asked.

    Args:
        base_url: With its path, such as `http://127.0.0.1:8000/v1`; no user name and no query, which may be secrets.
        api_key: Sent as bearer token; in no repr, error or file.
        key_source: Where the key comes from, in words, for errors.
        identity: What finished calls are remembered by; default: the base URL. A service keeps its own over restarts,
            which change its port.
        is_service: Whether it is a Palate service, which has to prove that it knows the key before the key is sent.

    Raises:
        ConfigurationError: The URL cannot be used.
    """

    base_url: str
    api_key: str = field(default=NO_KEY, repr=False)
    key_source: str = "no key"
    identity: str = ""
    is_service: bool = False

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if "@" in parts.netloc or parts.query:
            raise ConfigurationError(
                f"the base URL of {parts.hostname} carries a user name or a query, which would end up in messages: "
                "give the URL alone and name the environment variable that holds the key (--api-key-env)"
            )
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ConfigurationError(f"base URL {self.base_url!r} is no http:// or https:// URL, such as {OPENAI_URL}")
        object.__setattr__(self, "base_url", self.base_url.rstrip("/"))
        object.__setattr__(self, "identity", self.identity or self.base_url)

    @classmethod
    def from_environment(cls, base_url: str | None = None, api_key_env: str | None = None) -> Endpoint:
        """Returns the endpoint that the OpenAI client would take.

        Args:
            base_url: Default: OPENAI_BASE_URL, else OpenAI's own.
            api_key_env: Environment variable with the key; it must be set. Default: OPENAI_API_KEY if it is set.

        Raises:
            ConfigurationError: No endpoint is known, or the named variable is not set.
        """
        url = base_url or os.environ.get("OPENAI_BASE_URL") or ""
        name = api_key_env or "OPENAI_API_KEY"
        key = os.environ.get(name, "").strip()
        if api_key_env and not key:
            raise ConfigurationError(f"environment variable {api_key_env} is not set: it should hold the API key")
        if not url and not key:
            raise ConfigurationError(
                "no endpoint to ask: give --service NAME or --base-url URL, or set OPENAI_BASE_URL or OPENAI_API_KEY"
            )
        return cls(url or OPENAI_URL, key or NO_KEY, f"environment variable {name}" + ("" if key else " (not set)"))

    @classmethod
    def other(cls, base_url: str, api_key_env: str | None = None) -> Endpoint:
        """Returns an endpoint that gets a key only if one is named for it: a key meant for elsewhere stays at home.

        Raises:
            ConfigurationError: The named variable is not set.
        """
        if api_key_env:
            return cls.from_environment(base_url, api_key_env)
        return cls(base_url, key_source="no key (--judge-api-key-env names one)")

    @classmethod
    def of_service(cls, name: str, session: Session | None = None) -> Endpoint:
        """Returns the endpoint of a running Palate service.

        Raises:
            RunNotFoundError: No service of that name.
            ServiceError: It is not running.
        """
        from palate.predictor import Predictor

        predictor = Predictor(name, session=session)
        body = predictor.manifest.body
        weights = json.dumps([body["model"], body.get("tuned_uri")], sort_keys=True)
        return cls(
            f"{predictor.endpoint}/v1",
            predictor.access_token,
            f"the token of service {name}",
            identity=f"service:{hashlib.sha256(weights.encode()).hexdigest()[:32]}",
            is_service=True,
        )

    def without_key(self, text: str) -> str:
        """Returns a text, such as what the server says, with the key blotted out."""
        return text if self.api_key == NO_KEY else text.replace(self.api_key, "***")
