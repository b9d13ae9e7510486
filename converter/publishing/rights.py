"""Who may publish where: the stored token, the name of a repository, and what the Hub says of the token's rights."""

import re
from typing import Any

from bitwright.converter.source.hub import first_line
from bitwright.formats.errors import ConvertError

LOG_IN = "hf auth login"
# The roles in an organization under which its repositories can be made.
_WRITING_ROLES = ("admin", "write", "contributor")


def stored_token() -> str | None:
    """The token of the environment or of `hf auth login`. Raises ConvertError for one that cannot be sent."""
    from huggingface_hub import get_token

    token = get_token()
    if token is not None and not re.fullmatch(r"[\x21-\x7e]+", token):
        raise ConvertError(
            "the token for the Hub has characters that no token has",
            "HF_TOKEN, or the stored login",
            f"{LOG_IN} --force",
        )
    return token


def check_repository_name(name: str, where: str) -> None:
    """Raises ConvertError for what cannot be the name of a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        reason = None if "/" in name else "it has no owner"
    except HFValidationError as error:
        reason = first_line(error)
    if reason is not None:
        raise ConvertError(f"{name!r} is no name of a repository: {reason}", where, "write org/name, or user/name")


def with_known_owner(identity: dict[str, Any], name: str) -> str:
    """The repository's name with its owner in the letters that the Hub writes it with. identity: the Hub's whoami."""
    owner, _, rest = name.partition("/")
    known = {str(entry.get("name")).casefold(): entry["name"] for entry in (identity, *identity.get("orgs", []))}
    return f"{known.get(owner.casefold(), owner)}/{rest}"


def why_read_only(identity: dict[str, Any]) -> str | None:
    """Why a token with this whoami cannot write at all; None for one that can."""
    return "it may only read" if _token(identity).get("role") == "read" else None


def why_not_creatable(identity: dict[str, Any], name: str) -> str | None:
    """Why a token with this whoami may not create the repository; None where nothing is known against it."""
    owner, user, token = name.partition("/")[0], str(identity.get("name", "")), _token(identity)
    if token.get("role") == "fineGrained":
        for scope in token.get("fineGrained", {}).get("scoped", []):
            entity = str(scope.get("entity", {}).get("name", ""))
            if entity.casefold() == owner.casefold() and "repo.write" in scope.get("permissions", []):
                return None
        return f"it is fine-grained, and writing to the repositories of {owner} is not among its scopes"
    if owner.casefold() == user.casefold():
        return None
    roles = {str(org.get("name", "")).casefold(): org.get("roleInOrg") for org in identity.get("orgs", [])}
    if owner.casefold() not in roles:
        return f"{user} is no member of {owner}"
    role = roles[owner.casefold()]
    return None if role in (None, *_WRITING_ROLES) else f"the role of {user} in {owner} is {role!r}"


def _token(identity: dict[str, Any]) -> dict[str, Any]:
    token: dict[str, Any] = identity.get("auth", {}).get("accessToken", {})
    return token
