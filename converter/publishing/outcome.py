"""What publishing has done, or would do: as plain data, and as text for people."""

from typing import Any

from bitwright.converter.publishing.bundle import CARD
from bitwright.converter.publishing.change import Change
from bitwright.converter.publishing.repository import HubRepository, RepositoryState
from bitwright.converter.report.text import labelled_lines, table

# What becomes of a file: before it is done, and after.
_WORDS = {
    "new": ("to send", "sent"),
    "changed": ("to send", "sent"),
    "same": ("there already", "there already"),
    "kept": ("untouched", "untouched"),
    "deleted": ("to delete", "deleted"),
}


def outcome(
    repository: HubRepository,
    private: bool,
    state: RepositoryState | None,
    change: Change,
    commit: str | None,
    notes: list[str],
) -> dict[str, Any]:
    """What the repository holds: every file, and what becomes of it. private: where it does not exist yet, will it be.
    commit: None where nothing was done."""
    present = state.files if state is not None else {}
    rows: list[dict[str, Any]] = []
    for file in change.files:
        becomes = "same" if file not in change.sent else "changed" if file.path in present else "new"
        rows.append({"path": file.path, "bytes": file.n_bytes, "sha256": file.sha256, "change": becomes})
    for path in sorted(present.keys() - {file.path for file in change.files}):
        becomes = "deleted" if path in change.deleted else "kept"
        rows.append({"path": path, "bytes": present[path].n_bytes, "sha256": present[path].sha256, "change": becomes})
    return {
        "repository": repository.name,
        "url": repository.url,
        "exists": state is not None,
        "private": state.private if state is not None else private,
        "commit": commit,
        "files": rows,
        "card": change.card,
        "run": change.run,
        "notes": notes,
    }


def outcome_text(result: dict[str, Any]) -> str:
    """The repository for people."""
    done = result["commit"] is not None
    rows = [
        [row["path"], str(row["bytes"]), (row["sha256"] or "")[:16], _WORDS[row["change"]][done]]
        for row in result["files"]
    ]
    files = table(["file", "bytes", "sha256", ""], rows)
    where = f"{result['url']} ({'private' if result['private'] else 'public'})"
    if done:
        lines = [f"published    {where}, commit {result['commit']}", *labelled_lines("run it", result["run"])]
        return "\n".join([files, "", *lines])
    sent = sum(row["bytes"] for row in result["files"] if row["change"] in ("new", "changed"))
    verb = "change" if result["exists"] else "create"
    return (
        f"{files}\n\nwould {verb} {where} and send {sent} bytes; nothing was written\n\n"
        f"{CARD} would be:\n\n{result['card'].rstrip()}"
    )
