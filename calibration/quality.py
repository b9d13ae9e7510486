"""What a change of the weights does to a model's predictions: perplexity, KL divergence, agreement of the top token."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.control import Interrupted, Progress, ShouldStop, never, silent
from calibration.words import NO_WORD, word_accuracy
from formats.errors import ConvertError
from formats.files import remove_tree

if TYPE_CHECKING:
    import torch

    from calibration.arithmetic import Arithmetic
    from calibration.corpus import Corpus
    from calibration.stream import LayerStream
    from calibration.weights import WeightSource


@dataclass(frozen=True)
class QualityReport:
    """The candidate's predictions beside the source's, over `tokens` positions of a text.

    KL divergences are of the candidate from the source, in nats: mean, percentiles and maximum over positions.
    top1_agreement: the share of positions at which both find the same token most probable.
    next_word_accuracy: the share of the text's `words` whose every token is the most probable one after the true text
    before it, as a greedy reader would complete the sentence; None where there are no words, or none were told apart.
    not_finite: the positions at which the candidate predicts nothing finite, or no divergence is. Where there are any,
    the divergences are None; a perplexity is None where it is beyond all numbers.
    """

    source_perplexity: float | None
    perplexity: float | None
    mean_kld: float | None
    kld_99: float | None
    kld_99_9: float | None
    max_kld: float | None
    not_finite: int
    top1_agreement: float
    source_next_word_accuracy: float | None
    next_word_accuracy: float | None
    words: int
    tokens: int
    corpus: str
    corpus_sha256: str
    samples: int
    sequence_length: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Baseline:
    """The predictions of a text by the source's weights, streamed once, beside which other weights are measured.

    As llama-perplexity does, the second half of each sample is scored, so that every prediction has half a sample of
    context at least: of L tokens the L - L // 2 - 1 that follow position L // 2.
    work_dir: checkpoints, twice `importance.work_bytes`; a second call continues there. identity: what tells these
    weights from others, so that no checkpoint of others is continued. keep: the hidden states of every layer, so that
    weights that differ late are measured sooner.
    Raises ConvertError for samples of less than 4 tokens.
    """

    def __init__(
        self,
        source: "WeightSource",
        config_dir: Path,
        corpus: "Corpus",
        *,
        work_dir: Path,
        identity: str = "",
        device: str = "auto",
        threads: int | None = None,
        keep: bool = False,
    ):
        if corpus.tokens.shape[1] < 4:
            raise ConvertError(
                f"samples of {corpus.tokens.shape[1]} tokens leave nothing to score",
                corpus.name,
                "give a longer --sequence-length",
            )
        self.corpus, self.work_dir = corpus, work_dir
        self._identity, self._device, self._threads, self._config_dir = identity, device, threads, config_dir
        self._keep = keep
        self._source = self._stream(source, "source", keep=keep)

    def scores(
        self,
        candidate: "WeightSource",
        name: str = "candidate",
        *,
        arithmetic: "Arithmetic | None" = None,
        first_layer: int = 0,
        must_be_finite: bool = True,
        progress: Progress = silent,
        should_stop: ShouldStop = never,
    ) -> np.ndarray:
        """For every scored position, in order, float64 [6, n_positions]: the negative log-likelihood of the true next
        token by the source and by the candidate, the KL divergence of the candidate from the source, whether the top
        tokens agree, and whether the true next token is the source's and the candidate's top one.

        name: of these weights among all that are measured in the work directory. arithmetic: how products with them
        are computed. first_layer: the first one whose weights differ from the source's. must_be_finite: the candidate's
        predictions, too.
        Raises Interrupted when should_stop says so, and ConvertError for predictions that are not finite.
        """
        self._source.run(progress, should_stop, stage="run source")
        after = (self._source, first_layer) if self._keep and first_layer else None
        stream = self._stream(candidate, name, arithmetic=arithmetic, after=after)
        stream.run(progress, should_stop, stage=f"run {name}")
        parts, n_samples = [], len(self.corpus.tokens)
        for n_done, sample in enumerate(_scores([self._source, stream], self.corpus.tokens), start=1):
            parts.append(sample)
            progress("compare", n_done, n_samples, "samples")
            if should_stop() and n_done < n_samples:
                raise Interrupted(f"stopped after comparing {n_done} of {n_samples} samples")
        remove_tree(self.work_dir / name)
        scores = np.concatenate(parts, axis=1)
        if not np.isfinite(scores[: 3 if must_be_finite else 1]).all():
            raise ConvertError(
                "the model's predictions are not finite",
                self.corpus.name,
                "check the weights; on a GPU try --device cpu",
            )
        return scores

    def discard(self) -> None:
        """Delete the source's hidden states; nothing can be measured any more."""
        remove_tree(self.work_dir / "source")

    def _stream(
        self,
        weights: "WeightSource",
        name: str,
        *,
        arithmetic: "Arithmetic | None" = None,
        keep: bool = False,
        after: "tuple[LayerStream, int] | None" = None,
    ) -> "LayerStream":
        from calibration.stream import LayerStream

        return LayerStream(
            weights,
            self._config_dir,
            self.corpus.tokens,
            self.work_dir / name,
            identity=self._identity,
            device=self._device,
            threads=self._threads,
            arithmetic=arithmetic,
            keep=keep,
            after=after,
        )


def compare(
    source: "WeightSource",
    candidate: "WeightSource",
    config_dir: Path,
    corpus: "Corpus",
    *,
    work_dir: Path,
    words: np.ndarray | None = None,
    arithmetic: "Arithmetic | None" = None,
    progress: Progress = silent,
    should_stop: ShouldStop = never,
    **options: Any,
) -> QualityReport:
    """Measure the candidate's weights against the source's in the same model; options: as of Baseline.

    arithmetic: how products with the candidate's matrices are computed.

    words: the word that each token of the corpus is part of, see words.word_numbers; None to tell none apart.

    A candidate that predicts nothing finite is a finding. A second call continues in the work directory, and what is
    there is deleted at the end. Raises as Baseline does.
    """
    baseline = Baseline(source, config_dir, corpus, work_dir=work_dir, **options)
    scores = baseline.scores(
        candidate, arithmetic=arithmetic, must_be_finite=False, progress=progress, should_stop=should_stop
    )
    baseline.discard()
    return _report(scores, corpus, np.full(corpus.tokens.shape, NO_WORD) if words is None else words)


def _scores(streams: list["LayerStream"], tokens: np.ndarray) -> Iterator[np.ndarray]:
    """Sample by sample what Baseline.scores tells."""
    import torch

    source, _ = streams
    first = tokens.shape[1] // 2
    with ExitStack() as stack, torch.inference_mode():
        logits = [stack.enter_context(stream.head()) for stream in streams]
        pool = stack.enter_context(source.workers())

        def score(i: int) -> np.ndarray:
            states = [stream.hidden_states(i, i + 1)[0, first:-1] for stream in streams]
            following = torch.from_numpy(tokens[i, first + 1 :].astype(np.int64)).to(source.device)
            parts = []
            with torch.inference_mode():
                for span in source.logit_spans(len(following)):
                    of_source, of_candidate = (head(rows[span]) for head, rows in zip(logits, states, strict=True))
                    parts.append(_score(of_source, of_candidate, following[span]))
            return np.concatenate(parts, axis=1)

        yield from pool.map(score, range(len(tokens)))


def _score(source: "torch.Tensor", candidate: "torch.Tensor", following: "torch.Tensor") -> np.ndarray:
    """source, candidate: logits [n_positions, vocabulary]; following: the true next tokens [n_positions]."""
    import torch

    log_p, log_q = source.float().log_softmax(-1), candidate.float().log_softmax(-1)
    tops = [logits.argmax(-1) for logits in (source, candidate)]
    tops[1][log_q[:, 0].isnan()] = -1  # no distribution, no top token
    agree = (tops[0] == tops[1]).float()
    hits = [(top == following).float() for top in tops]
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    likelihoods = [-log.gather(-1, following[:, None])[:, 0] for log in (log_p, log_q)]
    return torch.stack([*likelihoods, divergence, agree, *hits]).cpu().numpy().astype(np.float64)


def _perplexity(likelihoods: np.ndarray) -> float | None:
    """Of negative log-likelihoods; None where it is beyond all numbers."""
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(likelihoods.mean()))
    return perplexity if np.isfinite(perplexity) else None


def _report(scores: np.ndarray, corpus: "Corpus", words: np.ndarray) -> QualityReport:
    source, candidate, divergence, agree, *hits = scores
    n_not_finite = int(np.count_nonzero(~np.isfinite(scores[1:3]).all(axis=0)))
    measured = None if n_not_finite else divergence
    first = corpus.tokens.shape[1] // 2 + 1
    scored = np.where(np.isin(words[:, first:], words[:, :first]), NO_WORD, words[:, first:])
    (n_words, source_words), (_, candidate_words) = (word_accuracy(scored, hit.reshape(scored.shape)) for hit in hits)
    return QualityReport(
        source_perplexity=_perplexity(source),
        perplexity=_perplexity(candidate),
        mean_kld=None if measured is None else float(measured.mean()),
        kld_99=None if measured is None else float(np.quantile(measured, 0.99)),
        kld_99_9=None if measured is None else float(np.quantile(measured, 0.999)),
        max_kld=None if measured is None else float(measured.max()),
        not_finite=n_not_finite,
        top1_agreement=float(agree.mean()),
        source_next_word_accuracy=source_words,
        next_word_accuracy=candidate_words,
        words=n_words,
        tokens=scores.shape[1],
        corpus=corpus.name,
        corpus_sha256=corpus.sha256,
        samples=len(corpus.tokens),
        sequence_length=corpus.tokens.shape[1],
    )
