"""What a request to the Hub failed of: behind which wrappers, with which status, and whether waiting helps."""

import time
from contextlib import suppress
from email.utils import parsedate_to_datetime

_TRANSIENT = (408, 429, 500, 502, 503, 504)


def http_error(error: Exception) -> Exception:
    """The failure of a request, where the client has put something around it; else the error itself."""
    from huggingface_hub.errors import HTTPError

    link: BaseException | None = error
    while link is not None and not isinstance(link, HTTPError):
        link = link.__cause__ or link.__context__
    return link or error


def status_of(error: Exception) -> int | None:
    """The answer's HTTP status; None where there was no answer."""
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def pause(error: Exception, attempt: int) -> float | None:
    """Seconds to wait before another attempt; None when another one would end alike."""
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import parse_ratelimit_headers

    status, default = status_of(error), 2.0**attempt
    if status is None:  # the connection was refused, cut or timed out
        return default if isinstance(error, HTTPError) else None
    if status not in _TRANSIENT:
        return None
    headers = error.response.headers  # type: ignore[attr-defined]
    limit, retry_after = parse_ratelimit_headers(headers), headers.get("Retry-After", "").strip()
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds + 1.0
    if retry_after.isdigit():
        return float(retry_after)
    with suppress(ValueError):  # no date either
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    return default
