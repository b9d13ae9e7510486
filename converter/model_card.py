"""The model card of a repository of quantizations: front matter for the Hub, and a section written from reports.

The section lies between two marked lines and is written anew each time; what a person has written outside of them
stays, and so do the front matter's entries that are not the publisher's to decide.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import yaml

from calibration.corpus import EMBEDDED
from converter.front_matter import SenselessFrontMatter, is_listable, parse_front_matter
from converter.progress import size_text
from converter.recipe import command_text, from_files
from converter.report import agreement_text, figure, perplexity_change
from converter.verdict import COHERENT, FAILED, NOTICEABLE, SEVERE, findings
from formats.errors import ConvertError

BEGIN = "<!-- bitwright:begin (from here on `convert publish` writes, anew each time; write your own text outside) -->"
END = "<!-- bitwright:end -->"
_SECTION = re.compile(r"<!-- bitwright:begin\b.*?<!-- bitwright:end -->", re.DOTALL)
_FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
# What the source's card says that holds for its quantizations too.
_INHERITED = ("license", "license_name", "license_link", "pipeline_tag", "language")
# Tags that the Hub derives by itself, or that speak of the source's files.
_DERIVED_TAGS = re.compile(
    r"(base_model|license|region|arxiv|dataset|doi):.*|safetensors|pytorch|transformers|endpoints.*"
)

Report = Mapping[str, Any]


def front_matter(
    base_model: str | None, source_card: Mapping[str, Any], owner: str, calibrated: bool
) -> dict[str, Any]:
    """The entries for the Hub. base_model: in the Hub's own letters, the link back depends on them."""
    entries: dict[str, Any] = {}
    if base_model is not None:
        entries |= {"base_model": base_model, "base_model_relation": "quantized"}
    entries |= {"quantized_by": owner, "library_name": "gguf"}
    source_card = {key: value for key, value in source_card.items() if is_listable(value)}
    entries |= {key: source_card[key] for key in _INHERITED if source_card.get(key)}
    link = str(entries.get("license_link", "https:"))
    if base_model is not None and not link.startswith("http"):  # a file of the source's repository
        entries["license_link"] = f"https://huggingface.co/{base_model}/blob/main/{link}"
    tags = ["gguf", "bitwright", *(["imatrix"] if calibrated else [])]
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
        raise ConvertError(
            f"the front matter of the card makes no sense: {error}", where, "mend it on the Hub"
        ) from None
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
    return yaml.safe_dump(dict(entries), sort_keys=False, allow_unicode=True, width=1000)


def _unclear_marks(where: str) -> ConvertError:
    return ConvertError(
        "the card's marked lines are not one pair of bitwright:begin and bitwright:end",
        where,
        "take the lines out, or put back the one that is missing; the section is then written again",
    )


def section(repository: str, base_model: str | None, reports: Sequence[Report], chat_template: bool) -> str:
    """The text about these artifacts, smallest first; reports: as they are published, names relative to the repository.

    Raises KeyError, TypeError or ValueError for what is no such report.
    """
    reports = sorted(reports, key=lambda report: (report["artifact"]["bytes"], report["artifact"]["files"][0]["path"]))
    parts = [f"# {_text((base_model or str(reports[0]['model'])).rpartition('/')[2])} GGUF"]
    parts += [warning for report in reports if (warning := _warning(report))]
    parts += [_origin(base_model, reports), _overview(reports), _running(repository, reports[0], chat_template)]
    parts += [_artifact(repository, report) for report in reports]
    parts.append(_limits(reports))
    return "\n\n".join(parts)


def _warning(report: Report) -> str | None:
    """What has to be said before anything else, of a file that is less than coherent."""
    verdict, name = report["verdict"], _text(report["artifact"]["files"][0]["path"])
    if verdict in (None, COHERENT):
        return None
    meaning = {
        NOTICEABLE: "has lost noticeably: expect worse answers than the source's",
        SEVERE: "is severely damaged: expect text that makes no sense",
        FAILED: "has failed: it no longer writes text, or its predictions diverge",
    }[verdict]
    found = "".join(f"\n> - {_text(line)}" for line in findings(report))
    return f"> [!WARNING]\n> **{name} {meaning}.**\n>{found}"


def _origin(base_model: str | None, reports: Sequence[Report]) -> str:
    source = f"`{_code(reports[0]['model'])}`"
    if base_model:
        source = f"[{_text(base_model)}](https://huggingface.co/{quote(base_model)})"
    revisions = sorted({str(report["revision"]) for report in reports if report["revision"]})
    at = f" at {', '.join(f'`{_code(revision)}`' for revision in revisions)}" if revisions else ""
    tools = ", ".join(sorted({f"`{_code(report['tool'])}`" for report in reports}))
    return f"GGUF files for llama.cpp, quantized from {source}{at} with Bitwright {tools}."


def _overview(reports: Sequence[Report]) -> str:
    rows = []
    for report in reports:
        quality, artifact = report["quality"], report["artifact"]
        measured = ["not measured"] * 3
        if quality:
            measured = [
                f"{figure(quality['perplexity'], '.3f')} (source {figure(quality['source_perplexity'], '.3f')})",
                figure(quality["mean_kld"], ".4f"),
                f"{quality['top1_agreement']:.1%}",
            ]
        rows.append(
            [
                _link(artifact["files"][0]["path"]),
                _text(report["profile"]),
                size_text(artifact["bytes"]),
                f"{sum(group['bytes'] for group in report['groups']) * 8 / _weights(report):.2f}",
                f"{report['compression_ratio']:.2f}x",
                *measured,
            ]
        )
    header = ["file", "profile", "size", "bits per weight", "smaller than the source", "perplexity", "mean KLD"]
    return _table([*header, "same top token"], rows)


def _running(repository: str, report: Report, chat_template: bool) -> str:
    first = report["artifact"]["files"][0]["path"]
    template = (
        "The files carry the source's chat template, and llama.cpp applies it (`--jinja`)."
        if chat_template
        else "The source has no chat template: it continues text and knows no turns; `--no-conversation` is for that."
    )
    what = f"-hf {shlex.quote(repository)} --hf-file {shlex.quote(first)}"
    return (
        f"## Running it\n\n{_fenced(f'llama-cli {what}', f'llama-server {what}')}\n\n"
        f"{template} Of a split file name the first part; the others are found beside it."
    )


def _artifact(repository: str, report: Report) -> str:
    artifact, stem = report["artifact"], report["artifact"]["files"][0]["path"].removesuffix(".gguf")
    groups = [
        [
            _text(group["group"]),
            ", ".join(f"{_text(name)} ({_text(n)})" for name, n in group["formats"].items()),
            f"{group['weights'] / 1e6:.1f} M",
            size_text(group["bytes"]),
            f"{group['bits_per_weight']:.2f}",
            f"{group['share']:.1%}",
        ]
        for group in report["groups"]
    ]
    files = [[_link(file["path"]), str(int(file["bytes"])), f"`{_code(file['sha256'])}`"] for file in artifact["files"]]
    parts = [
        f"## {_text(stem)}",
        _table(["tensors", "formats (how many)", "weights", "size", "bits per weight", "share"], groups),
        _quality(report),
        _table(["file", "bytes", "SHA-256"], files),
        _calibration(report),
        _reproduction(repository, report),
    ]
    return "\n\n".join(parts)


def _quality(report: Report) -> str:
    quality = report["quality"]
    if not quality:
        return "The quality of this file was not measured."
    rows = [
        ["perplexity of the source", figure(quality["source_perplexity"], ".4f")],
        ["perplexity of this file", figure(quality["perplexity"], ".4f")],
        ["mean KL divergence from the source, in nats a token", figure(quality["mean_kld"], ".5f")],
        ["99 % of tokens are below", figure(quality["kld_99"], ".4f")],
        ["99.9 % of tokens are below", figure(quality["kld_99_9"], ".4f")],
        ["largest", figure(quality["max_kld"], ".4f")],
        ["same most likely token", f"{quality['top1_agreement']:.2%}"],
        ["scored", f"{_text(quality['tokens'])} tokens of {_corpus(quality['corpus'])}"],
        *([["runtime", _text(agreement_text(agreement))]] if (agreement := report["agreement"]) else []),
    ]
    return _table(["quality", "measured"], rows)


def _calibration(report: Report) -> str:
    manifest = report["calibration"]
    if manifest is None:
        return "No importance matrix was used: no format in this file profits from one."
    rows = [
        ["importance matrix", _link(f"{report['recipe_directory']}/{manifest['file']}")],
        ["its SHA-256", f"`{_code(manifest['sha256'])}`"],
        ["text", _corpus(manifest["corpus"] or "not stated by the file")],
        ["SHA-256 of the text", f"`{_code(manifest['corpus_sha256'])}`" if manifest["corpus_sha256"] else "not stated"],
        [
            "samples",
            f"{_text(manifest['samples'] or 'not stated')}, of {_text(manifest['sequence_length'] or '?')} tokens each",
        ],
    ]
    if manifest["computed"]:
        rows += [
            ["seed", _text(manifest["seed"])],
            ["split", _text(manifest["split"] or "none: a text file, read whole")],
        ]
    else:
        rows.append(["origin", "a file that was given; its seed and split are not known"])
    if table := report["sensitivity"]:
        rows.append(["sensitivity table", _link(f"{report['recipe_directory']}/{table['file']}")])
        rows.append(["its SHA-256", f"`{_code(table['sha256'])}`"])
    return _table(["calibration", ""], rows)


def _reproduction(repository: str, report: Report) -> str:
    arguments, directory = list(map(str, report["arguments"])), report["recipe_directory"]
    from_here = arguments
    manifests = {"imatrix": report["calibration"], "sensitivity": report["sensitivity"]}
    if files := {option: manifest["file"] for option, manifest in manifests.items() if manifest}:
        from_here = from_files(arguments, directory, files, report["reads_text_later"])
    text = f"The same bytes again:\n\n{_fenced(command_text(arguments))}"
    if from_here != arguments:
        how = "measuring again only what no file holds" if report["reads_text_later"] else "without calibrating"
        fetch = f"hf download {shlex.quote(repository)} --include {shlex.quote(f'{directory}/*')} --local-dir ."
        text += f"\n\nor, {how}, from the files in this repository:\n\n{_fenced(fetch, command_text(from_here))}"
    if not report["revision"]:
        text += f"\n\n`{_code(report['model'])}` was a local checkpoint, known by its name alone."
    return f"{text}\n\nEvery tensor's format and the reason for it: {_link(f'{directory}/plan.json')}."


def _limits(reports: Sequence[Report]) -> str:
    """What the figures say against these files, and what they do not say."""
    measured = [report for report in reports if report["quality"]]
    lines = []
    for report in measured:
        quality, name = report["quality"], _text(report["artifact"]["files"][0]["path"])
        worst = max(report["errors"], key=lambda error: error["weighted_error"])
        coarsest = min(
            (group for group in report["groups"] if group["weights"] >= _weights(report) // 100),
            key=lambda group: group["bits_per_weight"],
        )
        lines.append(
            f"{name}: in {1 - quality['top1_agreement']:.1%} of places its most likely token is not the source's;"
            f" perplexity changes by {perplexity_change(quality)}; one token in a thousand diverges by more than"
            f" {figure(quality['kld_99_9'], '.2f')} nats. Coarsest are the tensors of"
            f" {_text(coarsest['group'])} ({coarsest['bits_per_weight']:.2f} bits); the largest error of a tensor,"
            f" weighted by importance, is {worst['weighted_error']:.2%} of its energy ({_text(worst['tensor'])},"
            f" {_text(worst['format'])})."
        )
    if measured:
        scored = sorted(
            {f"{_text(r['quality']['tokens'])} tokens of {_corpus(r['quality']['corpus'])}" for r in measured}
        )
        lines += [
            "The KL divergence compares the distributions over the next token, source beside quantized, given the same"
            " text: 0 means no difference. It says how far the file is from its source, not how good either is.",
            f"Measured on {', '.join(scored)} alone. Other languages, domains and tasks may lose more; perplexities"
            " compare within this card, not across tools or texts.",
        ]
    unmeasured = [_text(r["artifact"]["files"][0]["path"]) for r in reports if not r["quality"]]
    if unmeasured:
        lines.append(f"Nothing was measured of {', '.join(unmeasured)}; every tensor was decoded and compared.")
    lines.append(
        "Not tested: benchmarks and tasks, long contexts, conversations and tool calls, safety. What the source does"
        " wrong, these files do too."
    )
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _corpus(name: str) -> str:
    return _text(f"{name}, the text that comes with Bitwright" if name == EMBEDDED else name)


def _weights(report: Report) -> int:
    return sum(group["weights"] for group in report["groups"])


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _text(value: object) -> str:
    """A text that means nothing to Markdown or HTML."""
    escaped = str(value).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([|`\[\]*\\])", r"\\\1", " ".join(escaped.split()))


def _code(value: object) -> str:
    """A text for between backticks."""
    return " ".join(str(value).split()).replace("`", "'").replace("|", "\\|").replace("<", "(")


def _fenced(*commands: str) -> str:
    """Commands as a block that nothing in them ends: neither its fence nor the section's last line."""
    text = "\n".join(commands).replace("<!--", "<! --")
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}sh\n{text}\n{fence}"


def _link(path: str) -> str:
    return f"[{_text(path.rpartition('/')[2])}]({quote(path)})"
