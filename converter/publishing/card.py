"""The model card of a repository of quantizations: front matter for the Hub, and a section written from reports.

The section, card.md.j2, lies between two marked lines and is written anew each time; what a person has written outside
of them stays, and so do the front matter's entries that are not the publisher's to decide.
"""

import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import yaml
from markupsafe import Markup

from bitwright.calibration.evaluation.quality import QualityReport
from bitwright.calibration.text.corpus import EMBEDDED
from bitwright.converter.job.recipe import command_text, from_files
from bitwright.converter.publishing import directory_card
from bitwright.converter.report.data import PublishedReport
from bitwright.converter.report.run_lines import hub_lines
from bitwright.converter.report.templates import templates
from bitwright.converter.report.text import agreement_text, figure, perplexity_change
from bitwright.converter.report.verdict import MEANINGS, findings, needs_better
from bitwright.converter.source.front_matter import SenselessFrontMatter, is_listable, parse_front_matter
from bitwright.formats.errors import ConvertError
from bitwright.profiles.planning.summary import TensorGroup
from bitwright.profiles.sizes import size_text

BEGIN = (
    "<!-- bitwright:begin (from here on `bitwright publish` writes, anew each time; write your own text outside) -->"
)
END = "<!-- bitwright:end -->"
_SECTION = re.compile(r"<!-- bitwright:begin\b.*?<!-- bitwright:end -->", re.DOTALL)
_FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
# What the source's card says that holds for its quantizations too.
_INHERITED = ("license", "license_name", "license_link", "pipeline_tag", "language")
# Tags that the Hub derives by itself, or that speak of the source's files.
_DERIVED_TAGS = re.compile(
    r"(base_model|license|region|arxiv|dataset|doi):.*|safetensors|pytorch|transformers|endpoints.*"
)
# What means something to Markdown: an underscore only where it is not between letters or digits, as in Q4_K.
_MARKUP = re.compile(r"[|`\[\]*\\~]|(?<![^\W_])_|_(?![^\W_])|^[#>]")


def front_matter(
    base_model: str | None, source_card: Mapping[str, Any], owner: str, calibrated: bool, directory: bool = False
) -> dict[str, Any]:
    """The entries for the Hub. base_model: in the Hub's own letters, the link back depends on them. directory: of
    safetensors, no GGUFs."""
    entries: dict[str, Any] = {}
    if base_model is not None:
        entries |= {"base_model": base_model, "base_model_relation": "quantized"}
    entries |= {"quantized_by": owner, "library_name": directory_card.LIBRARY if directory else "gguf"}
    source_card = {key: value for key, value in source_card.items() if is_listable(value)}
    entries |= {key: source_card[key] for key in _INHERITED if source_card.get(key)}
    link = str(entries.get("license_link", "https:"))
    if base_model is not None and not link.startswith("http"):  # a file of the source's repository
        entries["license_link"] = f"https://huggingface.co/{base_model}/blob/main/{link}"
    tags = [*directory_card.TAGS] if directory else ["gguf", "bitwright", *(["imatrix"] if calibrated else [])]
    inherited = source_card.get("tags") or []
    for tag in inherited if isinstance(inherited, list) else [inherited]:
        if tag not in (*tags, source_card.get("pipeline_tag")) and not _DERIVED_TAGS.fullmatch(str(tag)):
            tags.append(str(tag))
    return {**entries, "tags": tags}


def write_card(existing: str | None, entries: Mapping[str, Any], section: str, where: str) -> str:
    """The card with this front matter and this section. existing: the card that is there.

    Raises ConvertError for a card whose front matter or marked lines cannot be made sense of.
    """
    block = f"{BEGIN}\n\n{section.strip()}\n\n{END}"
    if existing is None:
        return f"---\n{_dump(entries)}---\n\n{block}\n"
    found = _FRONT_MATTER.match(existing)
    body = existing[found.end() :] if found else existing
    head = _merged_front_matter(found, entries, where)
    if (body.count("<!-- bitwright:begin"), body.count(END)) not in ((0, 0), (1, 1)):
        raise _unclear_marks(where)
    if _SECTION.search(body):
        return head + _SECTION.sub(lambda _: block, body)
    if END in body:
        raise _unclear_marks(where)
    return f"{head}{body.rstrip()}\n\n{block}\n" if body.strip() else f"{head}\n{block}\n"


def _merged_front_matter(found: re.Match[str] | None, entries: Mapping[str, Any], where: str) -> str:
    """The front matter that is there with our entries in it, letter by letter the same where they are in it already.

    What we know better than anybody is set: base_model, its relation, library_name. Tags are added to. Everything else
    is set only where it is missing.
    """
    try:
        present = parse_front_matter(found[1]) if found else {}
    except SenselessFrontMatter as error:
        raise ConvertError(f"the front matter of the card makes no sense: {error}", where, "mend it there") from None
    merged = dict(present)
    for key, value in entries.items():
        if key == "tags":
            tags = merged.get("tags") or []
            tags = tags if isinstance(tags, list) else [tags]
            merged[key] = [*tags, *(tag for tag in value if tag not in tags)]
        elif key == "base_model" and isinstance(merged.get(key), list) and value in merged[key]:
            continue
        elif key in ("base_model", "base_model_relation", "library_name") or key not in merged:
            merged[key] = value
    if found and merged == present:
        return found[0]
    return f"---\n{_dump(merged)}---\n" + ("" if found else "\n")


def _dump(entries: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(dict(entries), sort_keys=False, allow_unicode=True, width=1000)
    return text


def _unclear_marks(where: str) -> ConvertError:
    return ConvertError(
        "the card's marked lines are not one pair of bitwright:begin and bitwright:end",
        where,
        "take the lines out, or put back the one that is missing; the section is then written again",
    )


def section(
    repository: str,
    base_model: str | None,
    reports: Sequence[PublishedReport],
    chat_template: bool,
    other_files: Collection[str] = (),
) -> str:
    """The text about these artifacts, smallest first. other_files: paths of what else is in the repository. Raises
    ArithmeticError or ValueError for figures that no conversion measures."""
    reports = sorted(reports, key=lambda report: (report.artifact.bytes, report.artifact.first.path))
    all_files = {*other_files, *(file.path for report in reports for file in report.artifact.files)}
    scored = sorted({_scored(report.quality) for report in reports if report.quality is not None})
    return _TEMPLATES.get_template("card.md.j2").render(
        name=(base_model or reports[0].model).rpartition("/")[2],
        repository=repository,
        base_model=base_model,
        reports=reports,
        chat_template=chat_template,
        run_lines=lambda artifact: hub_lines(repository, artifact, all_files),
        meanings=MEANINGS,
        needs_better=needs_better,
        findings=findings,
        revisions=sorted({report.revision for report in reports if report.revision}),
        tools=sorted({report.tool for report in reports}),
        measured_on=", ".join(scored),
        unmeasured=", ".join(report.name for report in reports if report.quality is None),
    )


def _coarsest_group(report: PublishedReport) -> TensorGroup:
    """The group with the fewest bits a weight of those that are a hundredth of the model at least."""
    large = (group for group in report.groups if group.weights >= report.n_weights // 100)
    return min(large, key=lambda group: group.bits_per_weight)


def _scored(quality: QualityReport) -> str:
    return f"{quality.tokens} tokens of {_corpus(quality.corpus)}"


def _corpus(name: str) -> str:
    return f"{name}, the text that comes with Bitwright" if name == EMBEDDED else name


def _from_files(report: PublishedReport) -> list[str]:
    """The arguments of the same conversion with what was measured taken from the repository's files."""
    manifests = {"imatrix": report.calibration, "sensitivity": report.sensitivity}
    files = {option: manifest.file for option, manifest in manifests.items() if manifest is not None}
    arguments = list(report.arguments)
    return from_files(arguments, report.recipe_directory, files, report.reads_text_later) if files else arguments


def _plain(value: object) -> Markup:
    """A text that means nothing to Markdown or HTML."""
    if isinstance(value, Markup):
        return value
    escaped = " ".join(str(value).replace("&", "&amp;").replace("<", "&lt;").split())
    escaped = _MARKUP.sub(r"\\\g<0>", escaped).replace("://", "&#58;//")  # GitHub makes links of bare addresses
    return Markup(re.sub(r"(www)\.", r"\1&#46;", escaped, flags=re.IGNORECASE))


def _code(value: str) -> Markup:
    """A text between backticks."""
    text = " ".join(value.split()).replace("`", "'").replace("|", "\\|").replace("<", "(")
    return Markup(f"`{text}`")


def _commands(lines: Sequence[str], language: str = "sh") -> Markup:
    """Commands as a block that nothing in them ends: neither its fence nor the section's last line."""
    text = "\n".join(lines).replace("<!--", "<! --")
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return Markup(f"{fence}{language}\n{text}\n{fence}")


def _link(path: str) -> Markup:
    return Markup(f"[{_plain(path.rpartition('/')[2])}]({quote(path)})")


_TEMPLATES = templates(
    "bitwright.converter.publishing",
    {
        "agreement_text": agreement_text,
        "arguments_from_files": _from_files,
        "coarsest_group": _coarsest_group,
        "code": _code,
        "command": command_text,
        "commands": _commands,
        "corpus": _corpus,
        "fmt": figure,
        "link": _link,
        "quoted": shlex.quote,
        "must_be_dequantized": directory_card.must_be_dequantized,
        "perplexity_change": perplexity_change,
        "runs_in_transformers": directory_card.runs_in_transformers,
        "scored": _scored,
        "size": size_text,
        "web": lambda path: Markup(quote(path)),
    },
    escape=_plain,
)
