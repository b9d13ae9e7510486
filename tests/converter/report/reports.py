"""Reports with everything in them, for tests of what reads one."""

from dataclasses import replace
from typing import Any

from bitwright.calibration.evaluation.coherence import Kind, Problem
from bitwright.calibration.evaluation.quality import QualityReport
from bitwright.converter.artifact.target import TensorError
from bitwright.converter.report.data import (
    Agreement,
    Answer,
    Artifact,
    ArtifactFile,
    Calibration,
    Coherence,
    Layer,
    PublishedReport,
    Source,
    TensorGroup,
)
from bitwright.converter.report.verdict import overall

QUALITY = QualityReport(
    source_perplexity=10.0,
    perplexity=12.5,
    mean_kld=0.05,
    kld_99=0.4,
    kld_99_9=1.25,
    max_kld=3.0,
    not_finite=0,
    top1_agreement=0.875,
    source_next_word_accuracy=0.5,
    next_word_accuracy=0.25,
    words=8,
    tokens=4096,
    corpus="wikitext-2",
    corpus_sha256="4" * 64,
    samples=16,
    sequence_length=512,
    device="cpu",
    dtype="float32",
)
DIVERGENT = replace(QUALITY, **dict.fromkeys(("perplexity", "mean_kld", "kld_99", "kld_99_9", "max_kld")), not_finite=7)
AGREEMENT = Agreement("agrees", "llama.cpp", (), 14, (), None, None, (), None)


def answer(*kinds: Kind, prompt: str = "Why?", text: str = "SSSS") -> Answer:
    """An answer with these problems."""
    problems = tuple(Problem(kind, "") for kind in kinds)
    return Answer(prompt, text, "", "Because.", 4, 0, 0.5, 1.5, 2.0, 1.0, problems)


COHERENCE = Coherence("coherent", "llama.cpp", {}, (answer(),), 0.5, 12.0, 32, 32, 0, "wikitext-2")


def report(name: str = "Tiny-1B", n_bytes: int = 1000, **changes: Any) -> PublishedReport:
    """A report of a small artifact, with the verdict of what it says."""
    made = PublishedReport(
        model="Org/Tiny",
        revision="01",
        profile="balanced-4bit",
        plan_sha256="0" * 64,
        tool="0.1.0+abc",
        recipe={"profile": "balanced-4bit", "profile_toml": ""},
        arguments=("--profile=balanced-4bit", "--calibration=wikitext-2", "--samples=512", "Org/Tiny@01"),
        calibration=Calibration(
            file="Tiny.imatrix.gguf",
            bytes=7,
            sha256="1" * 64,
            computed=True,
            model="Org/Tiny",
            corpus="wikitext-2",
            corpus_sha256="2" * 64,
            samples=512,
            sequence_length=512,
            seed=0,
            split="train",
            dtype="float32",
        ),
        sensitivity=None,
        reads_text_later=False,
        source=Source(4 * n_bytes, {}),
        artifact=Artifact("gguf", n_bytes, (ArtifactFile(f"{name}.gguf", n_bytes, "3" * 64),)),
        compression_ratio=4.0,
        groups=(TensorGroup("mlp", 2, {"Q4_K": 2}, 1600, 900, 4.5, 1.0),),
        errors=(TensorError("blk.0.ffn_up.weight", "Q4_K", 0.01, 0.01),),
        super_weight_coverage=None,
        protection=(),
        feedback=None,
        layers=(Layer(0, 1600, 900, 4.5, 1.0, {"Q4_K": 1.0}, 0.01, 0.01),),
        uniform=(),
        predicted_kld=None,
        target_kld=None,
        quality=QUALITY,
        coherence=COHERENCE,
        agreement=None,
        tasks=None,
        verdict=None,
        better=None,
        seconds={"plan": 0.5},
        page="report.html",
        base_model="Org/Tiny",
        recipe_directory=f"recipe/{name}",
    )
    made = replace(made, **changes)
    return replace(made, verdict=overall(made.quality, made.coherence, made.agreement))
