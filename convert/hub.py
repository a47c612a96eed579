"""What every talk with the Hub needs: patience, and one sentence for what it answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from formats.errors import SourceError

#: Pauses before a request to the Hub is tried again, where it does not say itself how long to wait.
RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0)

_T = TypeVar("_T")


def retried(request: Callable[[], _T]) -> _T:
    """Tries again when the Hub is busy (429, 5xx) or the line drops: huggingface_hub itself does so for some requests only."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # httpx or httpx2, whichever it is built on

    for wait_seconds in RETRY_SECONDS:
        try:
            return request()
        except HfHubHTTPError as error:
            if error.response.status_code != 429 and error.response.status_code < 500:
                raise
            asked = error.response.headers.get("Retry-After", "")
            time.sleep(min(float(asked), 300.0) if asked.isdigit() else wait_seconds)
        except (httpx.TransportError, ConnectionError, TimeoutError):  # of hf_xet, Python's own
            time.sleep(wait_seconds)
    return request()


@contextmanager
def hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Turns what huggingface_hub raises into one sentence that says what to do."""
    try:
        yield
    except Exception as error:
        message = _message(error, repo, revision)
        if message is None:
            raise
        raise SourceError(message) from None


def _message(error: Exception, repo: str, revision: str | None) -> str | None:
    from huggingface_hub import constants
    from huggingface_hub import errors as hub
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # httpx or httpx2, whichever it is built on

    endpoint = constants.ENDPOINT
    match error:
        case hub.GatedRepoError():
            return f"{repo} is gated: ask for access at {endpoint}/{repo}, then log in with: hf auth login"
        case hub.RepositoryNotFoundError():
            return f"{repo} does not exist on {endpoint}, or it is private; check the name, or log in with: hf auth login"
        case hub.RevisionNotFoundError():
            return f"{repo} has no revision {revision}; see {endpoint}/{repo}/commits/main"
        case hub.LocalEntryNotFoundError() | hub.OfflineModeIsEnabled():
            return f"{repo} is not in the cache and cannot be fetched; check the connection"
        case hub.HfHubHTTPError():
            return f"{repo}: {endpoint} answered {error.response.status_code}; try again later"
        case OSError(filename=str(place)):
            return f"{repo}: the cache cannot be used: {place} ({error.strerror}); HF_HOME says where it lies"
        case OSError() | httpx.TransportError():
            return f"{repo}: {endpoint} cannot be reached ({error}); check the connection, or set HF_HUB_OFFLINE=1 to use the cache"
    return None
