"""What publishing changes in a repository: which files it sends and deletes, and the card that the repository has then.

A repository holds GGUFs of one model, or one safetensors directory: its files have names that every other one has, too.
"""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from bitwright.converter.publishing import card as model_card
from bitwright.converter.publishing.bundle import (
    CARD,
    RECIPES,
    FinishedArtifact,
    files_to_publish,
    published_report,
    with_own_imatrix,
    written_paths,
)
from bitwright.converter.publishing.repository import HubRepository, RemoteFile, RepositoryFile, RepositoryState
from bitwright.converter.report.data import PublishedReport
from bitwright.converter.report.records import REPORT
from bitwright.converter.report.run_lines import hub_lines
from bitwright.converter.source.front_matter import LARGEST_CARD_BYTES
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.regular_file import LARGEST_METADATA_BYTES

_REPORTS = re.compile(rf"{RECIPES}/([^/]+)/{re.escape(REPORT)}")
# What a card is not made of raises.
_NO_REPORT = (ValueError, ArithmeticError, RecursionError)


@dataclass(frozen=True)
class Base:
    """The model that an artifact was made of, as the Hub knows it; card: what its card says."""

    model_id: str | None
    card: Mapping[str, Any]


@dataclass(frozen=True)
class Change:
    """What a repository becomes: its files by name as they are to be, those to send, those to delete, its card. run:
    the commands that run this artifact from there."""

    files: list[RepositoryFile]
    sent: list[RepositoryFile]
    deleted: list[str]
    card: str
    run: list[str]


class UnreadableReport(ConvertError):
    """A published report that lacks what a card needs."""


@dataclass(frozen=True)
class Publication:
    """An artifact and what is asked of its publishing. stem: its name in the repository. replace: put it in the place
    of another one that has its name. note: told what the user should know."""

    repository: HubRepository
    artifact: FinishedArtifact
    base: Base
    stem: str
    replace: bool
    note: Callable[[str], None]

    def change(self, state: RepositoryState | None) -> Change:
        """What this artifact changes in the repository at this state, None for one that is still to be made."""
        report = published_report(self.artifact, self.stem, self.base.model_id)
        present = state.files if state is not None else {}
        others = self._other_reports(state, report) if state is not None else []
        earlier = self._earlier(state) if state is not None else None
        if _is_taken(report, present, earlier, others):
            report = with_own_imatrix(report)
        files = files_to_publish(self.artifact, self.stem, report)
        deleted = self._obsolete(state, report, files, earlier, others) if state is not None else []
        kept = present.keys() - deleted
        card = self._card(state, report, others, kept)
        run = hub_lines(self.repository.name, report.artifact, kept | {file.path for file in files})
        files.append(RepositoryFile.of_bytes(CARD, card.encode()))
        sent = [file for file in files if file.path not in present or not present[file.path].same_as(file)]
        return Change(files, sent, deleted, card, run)

    def _card(
        self,
        state: RepositoryState | None,
        report: PublishedReport,
        others: list[PublishedReport],
        kept: Collection[str],
    ) -> str:
        """The card of all artifacts, written into the one in the repository, else into the directory's own. kept: paths
        of the files that stay in the repository."""
        repository, base, own = self.repository, self.base, self.artifact.card
        entries = model_card.front_matter(
            base.model_id,
            base.card,
            repository.name.partition("/")[0],
            report.calibration is not None,
            report.artifact.is_directory,
        )
        try:
            section = model_card.section(
                repository.name, base.model_id, [report, *others], self.artifact.has_chat_template, kept
            )
        except _NO_REPORT as error:  # the others have been tried
            raise ConvertError(
                f"the report lacks what the card says: {type(error).__name__} {error}",
                str(self.artifact.work_dir / REPORT),
                "run the same conversion again, it makes it anew",
            ) from None
        if own is not None:
            own = model_card.write_card(own, entries, section, f"{self.artifact.location}: {CARD}")
        if state is None or CARD not in state.files:
            return own or model_card.write_card(None, entries, section, "")
        where = f"{repository.name}: {CARD}"
        try:
            existing = self._fetch(state, CARD, LARGEST_CARD_BYTES).decode()
        except UnicodeDecodeError:
            raise ConvertError("the card is no UTF-8 text", where, "mend it on the Hub") from None
        card = model_card.write_card(existing, entries, section, where)
        if own not in (None, card):
            self.note(f"the repository has a {CARD}, whose words stay; those of the directory's own are not taken over")
        return card

    def _other_reports(self, state: RepositoryState, ours: PublishedReport) -> list[PublishedReport]:
        """The reports of the other artifacts in the repository, which must be GGUFs of the same model."""
        reports = []
        for path in sorted(state.files):
            found = _REPORTS.fullmatch(path)
            if found is None or found[1] == self.stem:
                continue
            report, where = self._read_report(state, path), f"{self.repository.name}: {path}"
            if not report.hashes.keys() <= state.files.keys():
                self.note(f"{path} is of a file that is no longer there: the card leaves it out")
            elif report.source_model != ours.source_model:
                raise ConvertError(
                    f"the repository holds quantizations of {report.source_model},"
                    f" and this is one of {ours.source_model}",
                    where,
                    "publish to a repository of its own; where both are the same model, name it with --base-model",
                )
            elif report.artifact.is_directory or ours.artifact.is_directory:
                kind = "a safetensors directory" if report.artifact.is_directory else "GGUFs"
                raise ConvertError(
                    f"the repository holds {kind}, and a directory shares a repository with nothing else",
                    where,
                    "publish to a repository of its own",
                )
            else:
                reports.append(report)
        return reports

    def _read_report(self, state: RepositoryState, path: str) -> PublishedReport:
        """A report that was published before, with all that the card needs of it."""
        content = self._fetch(state, path, LARGEST_METADATA_BYTES)
        try:
            report = PublishedReport.from_dict(json.loads(content))
            model_card.section(self.repository.name, report.base_model, [report], chat_template=True)
        except _NO_REPORT as error:
            raise UnreadableReport(
                f"a report in the repository cannot be read: {type(error).__name__} {error}",
                f"{self.repository.name}: {path}",
                "publish that artifact again with --replace, or delete the file on the Hub",
            ) from None
        return report

    def _fetch(self, state: RepositoryState, path: str, limit: int) -> bytes:
        """A file of the repository. Raises ConvertError for more than `limit` bytes."""
        if (size := state.files[path].n_bytes) > limit:
            raise ConvertError(
                f"the file has {size} bytes, and {limit} are the most for its kind",
                f"{self.repository.name}: {path}",
                "delete it on the Hub, or publish to another repository",
            )
        return self.repository.read(path, state.commit)

    def _earlier(self, state: RepositoryState) -> PublishedReport | None:
        """The report of what has this artifact's name in the repository; None where there is none, and for one that
        nobody can read and that is to be replaced."""
        path = f"{RECIPES}/{self.stem}/{REPORT}"
        if path not in state.files:
            return None
        try:
            return self._read_report(state, path)
        except UnreadableReport:
            if not self.replace:
                raise
            return None

    def _obsolete(
        self,
        state: RepositoryState,
        report: PublishedReport,
        files: list[RepositoryFile],
        earlier: PublishedReport | None,
        others: list[PublishedReport],
    ) -> list[str]:
        """Files that an earlier state of this artifact left and the new one lacks, and no other one has. Refuses to
        replace another artifact."""
        path = f"{RECIPES}/{self.stem}/{REPORT}"
        in_the_way = [
            file.path
            for file in files
            if file.path in report.hashes and file.path in state.files and not state.files[file.path].same_as(file)
        ]
        is_other = bool(in_the_way) if earlier is None else earlier.identity != report.identity
        if is_other and not self.replace:
            theirs = f"profile {earlier.profile}" if earlier is not None else "published by other means"
            what, other_way = f"{self.stem}.gguf", "give this one another name (bitwright publish ... --name)"
            if report.artifact.is_directory:
                what, other_way = in_the_way[0] if in_the_way else path, "publish to a repository of its own"
            raise ConvertError(
                f"the repository has another artifact of this name ({theirs})",
                f"{self.repository.name}: {what}",
                f"{other_way}, or put it in the other's place (--replace)",
            )
        shared = {other.calibration.file for other in others if other.calibration is not None}
        obsolete = (written_paths(self.stem, earlier) & state.files.keys()) - {file.path for file in files} - shared
        hashes = {} if earlier is None else dict(earlier.hashes)
        if earlier is not None and earlier.calibration is not None:
            hashes[earlier.calibration.file] = earlier.calibration.sha256
        return sorted(name for name in obsolete if name not in hashes or self._is_still(state, name, hashes[name]))

    def _is_still(self, state: RepositoryState, path: str, sha256: str) -> bool:
        """Whether the repository's file is the one of this hash, which the Hub tells of large files alone."""
        if (theirs := state.files[path].sha256) is not None:
            return theirs == sha256
        return hashlib.sha256(self._fetch(state, path, LARGEST_METADATA_BYTES)).hexdigest() == sha256


def _is_taken(
    report: PublishedReport,
    present: Mapping[str, RemoteFile],
    earlier: PublishedReport | None,
    others: list[PublishedReport],
) -> bool:
    """Whether the name of the model's importance matrix is another file's in the repository. present: its files.
    earlier: the report of this artifact's earlier state, others: those of the other artifacts."""
    if report.calibration is None or report.calibration.file not in present:
        return False
    name, sha256 = report.calibration.file, report.calibration.sha256
    of_others = {other.calibration.sha256 for other in others if other.calibration and other.calibration.file == name}
    if of_others:
        return of_others != {sha256}
    is_ours = earlier is not None and earlier.calibration is not None and earlier.calibration.file == name
    return not is_ours and present[name].sha256 != sha256
