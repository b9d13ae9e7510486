"""What a change of the weights does to a model's predictions: perplexity, KL divergence, agreement of the top token."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitwright.calibration.control import Interrupted, PassControl, PassStore
from bitwright.calibration.text.words import NO_WORD, word_accuracy
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import remove_tree
from bitwright.formats.files.seals import sealed
from bitwright.formats.files.whole import whole_file

if TYPE_CHECKING:
    import torch

    from bitwright.calibration.stream.arithmetic import Arithmetic
    from bitwright.calibration.stream.forward import LayerStream
    from bitwright.calibration.stream.micro_batches import Excerpt
    from bitwright.calibration.stream.streamable import StreamableModel
    from bitwright.calibration.stream.weights import WeightSource
    from bitwright.calibration.text.corpus import Corpus


@dataclass(frozen=True)
class QualityReport:
    """The candidate's predictions beside the source's, over `tokens` positions of a text.

    KL divergences are of the candidate from the source, in nats: mean, percentiles and maximum over positions.
    top1_agreement: the share of positions at which both find the same token most probable.
    next_word_accuracy: the share of the text's `words` whose every token is the most probable one after the true text
    before it, as a greedy reader would complete the sentence; None where there are no words, or none were told apart.
    not_finite: the positions at which the candidate predicts nothing finite, or no divergence is. Where there are any,
    the divergences are None; a perplexity is None where it is beyond all numbers.
    device, dtype: what both were computed on ("cpu", "cuda" or "mps"), and in; None in reports that do not say.
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
    device: str | None = None
    dtype: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Span:
    """Positions of a text, first and last among them, and the mean KL divergence of what is predicted after them; None
    where it is not finite."""

    first: int
    last: int
    mean_kld: float | None


class Baseline:
    """The predictions of a text by a model, streamed once, beside which other weights of the model are measured.

    As llama-perplexity does, the second half of each sample is scored, so that every prediction has half a sample of
    context at least: of L tokens the L - L // 2 - 1 that follow position L // 2.
    control: its work directory takes twice `control.work_bytes`. keep: the hidden states of every layer, so that
    weights that differ late are measured sooner. excerpt: what the corpus is of a text of which other machines measure
    the rest. known: where the source's states after the last layer may be from
    another time; the head makes its predictions of them, to the bit, and they are a fraction of its logits.
    Raises ConvertError for samples of less than 4 tokens, and for a model that predicts none.
    """

    def __init__(
        self,
        source: "StreamableModel",
        corpus: "Corpus",
        control: PassControl,
        *,
        keep: bool = False,
        known: PassStore | None = None,
        excerpt: "Excerpt | None" = None,
    ):
        from bitwright.calibration.stream.forward import LayerStream

        check_scorable(corpus)
        self._source, self.corpus, self._control, self._keep = source, corpus, control, keep
        self._excerpt = excerpt
        directory = control.within("source").work_dir
        fetched = known is not None and not directory.exists() and known.fetch(directory)
        self._new = None if fetched else known  # where the states of this run are to be kept
        self._stream = LayerStream(source, corpus.tokens, control.within("source"), keep=keep, excerpt=excerpt)
        self._stream.require_head()

    def stream_scores(
        self,
        candidate: "WeightSource",
        name: str = "candidate",
        *,
        arithmetic: "Arithmetic | None" = None,
        first_layer: int = 0,
        must_be_finite: bool = True,
        logits: Path | None = None,
        stage: str = "",
    ) -> np.ndarray:
        """For every scored position, in order, float64 [6, n_positions]: the negative log-likelihood of the true next
        token by the source and by the candidate, the KL divergence of the candidate from the source, whether the top
        tokens agree, and whether the true next token is the source's and the candidate's top one.

        name: of these weights among all that are measured in the work directory; stage: for people, where it is no word
        of theirs. arithmetic: how products with them
        are computed. first_layer: the first one whose weights differ from the source's. must_be_finite: the candidate's
        predictions, too. logits: a file for the candidate's logits at the scored positions of the first sample, float32
        [n_positions, vocabulary], as numpy keeps arrays; it is sealed.
        Raises Interrupted when the control says so, and ConvertError for predictions that are not finite.
        """
        from bitwright.calibration.stream.forward import LayerStream

        self._stream.run("run source")
        if self._new is not None:
            self._new.store(self._control.within("source").work_dir)
            self._new = None
        model = replace(self._source, weights=candidate, arithmetic=arithmetic)
        control = self._control.within(name)
        after = (self._stream, first_layer) if self._keep and first_layer else None
        stream = LayerStream(model, self.corpus.tokens, control, after=after, excerpt=self._excerpt)
        stream.run(stage or f"run {name}")
        parts, n_samples = [], len(self.corpus.tokens)
        for n_done, sample in enumerate(_scores([self._stream, stream], self.corpus.tokens, logits), start=1):
            parts.append(sample)
            control.progress("compare", n_done, n_samples, "samples")
            if control.should_stop() and n_done < n_samples:
                raise Interrupted(f"stopped after comparing {n_done} of {n_samples} samples")
        remove_tree(control.work_dir)
        scores = np.concatenate(parts, axis=1)
        if not np.isfinite(scores[: 3 if must_be_finite else 1]).all():
            raise ConvertError(
                "the model's predictions are not finite",
                self.corpus.name,
                "check the weights; on a GPU try --device cpu",
            )
        return scores

    @property
    def computed(self) -> dict[str, str]:
        """What the predictions are computed on, and in: as of QualityReport."""
        return {"device": self._stream.device.type, "dtype": str(self._stream.dtype).removeprefix("torch.")}

    def discard(self) -> None:
        """Delete the source's hidden states; nothing can be measured any more."""
        remove_tree(self._control.within("source").work_dir)


def check_scorable(corpus: "Corpus") -> None:
    """Raises ConvertError for samples of less than 4 tokens."""
    if corpus.tokens.shape[1] < 4:
        raise ConvertError(
            f"samples of {corpus.tokens.shape[1]} tokens leave nothing to score",
            corpus.name,
            "give a longer --sequence-length",
        )


def stream_quality(
    source: "StreamableModel",
    candidate: "WeightSource",
    corpus: "Corpus",
    control: PassControl,
    *,
    words: np.ndarray | None = None,
    arithmetic: "Arithmetic | None" = None,
    known: PassStore | None = None,
    logits: Path | None = None,
) -> QualityReport:
    """Run the model with its own weights and with the candidate's, and compare what they predict of the corpus.

    words: the word that each token of the corpus is part of, see words.word_numbers; None to tell none apart.
    arithmetic: how products with the candidate's matrices are computed. known: as of Baseline. logits: as
    of its stream_scores.
    A candidate that predicts nothing finite is a finding. What is in the work directory is deleted at the end. Raises
    as Baseline does.
    """
    baseline = Baseline(source, corpus, control, known=known)
    scores = baseline.stream_scores(candidate, arithmetic=arithmetic, must_be_finite=False, logits=logits)
    baseline.discard()
    return quality_of(scores, corpus, words, baseline.computed)


def stream_excerpt_scores(
    source: "StreamableModel",
    candidate: "WeightSource",
    corpus: "Corpus",
    control: PassControl,
    excerpt: "Excerpt",
    arithmetic: "Arithmetic | None" = None,
) -> tuple[np.ndarray, dict[str, str]]:
    """What Baseline.stream_scores tells of an excerpt of the corpus, and Baseline.computed. `quality_of` makes the
    report of those of all excerpts, one after the other; they are the same, to the bit, however the corpus is cut into
    excerpts of whole groups."""
    few = replace(corpus, tokens=corpus.tokens[excerpt.first : excerpt.first + excerpt.n_samples])
    baseline = Baseline(source, few, control, excerpt=excerpt)
    scores = baseline.stream_scores(candidate, arithmetic=arithmetic, must_be_finite=False)
    baseline.discard()
    return scores, baseline.computed


def stream_quality_by_position(
    source: "StreamableModel",
    candidate: "WeightSource",
    corpus: "Corpus",
    control: PassControl,
    *,
    words: np.ndarray | None = None,
    arithmetic: "Arithmetic | None" = None,
    n_spans: int = 8,
) -> "tuple[QualityReport, tuple[Span, ...]]":
    """As stream_quality, and how the divergence grows with the length of the text."""
    baseline = Baseline(source, corpus, control)
    scores = baseline.stream_scores(candidate, arithmetic=arithmetic, must_be_finite=False)
    baseline.discard()
    return quality_of(scores, corpus, words, baseline.computed), _spans(scores[2], corpus.tokens.shape, n_spans)


def _spans(divergence: np.ndarray, shape: tuple[int, ...], n_spans: int) -> tuple[Span, ...]:
    """divergence: of the scored positions, sample by sample; shape: [n_samples, n_tokens]."""
    n_samples, n_tokens = shape
    by_position = divergence.reshape(n_samples, -1).mean(axis=0)
    first, spans = n_tokens // 2, []
    for places in np.array_split(np.arange(len(by_position)), min(n_spans, len(by_position))):
        mean = float(by_position[places].mean())
        spans.append(Span(first + int(places[0]), first + int(places[-1]), mean if np.isfinite(mean) else None))
    return tuple(spans)


def _scores(streams: list["LayerStream"], tokens: np.ndarray, kept: Path | None) -> Iterator[np.ndarray]:
    """Sample by sample what Baseline.stream_scores tells. kept: the file for the candidate's logits."""
    import torch

    source, _ = streams
    first = tokens.shape[1] // 2
    with ExitStack() as stack, torch.inference_mode():
        logits = [stack.enter_context(stream.head()) for stream in streams]
        pool = stack.enter_context(source.workers())

        def score(i: int) -> np.ndarray:
            states = [stream.hidden_states(i, i + 1)[0, first:-1] for stream in streams]
            following = torch.from_numpy(tokens[i, first + 1 :].astype(np.int64)).to(source.device)
            parts, of_first = [], []
            with torch.inference_mode():
                for span in source.logit_spans(len(following)):
                    of_source, of_candidate = (head(rows[span]) for head, rows in zip(logits, states, strict=True))
                    parts.append(score_positions(of_source, of_candidate, following[span]))
                    if kept is not None and i == 0:
                        of_first.append(of_candidate.float().cpu().numpy())
            if kept is not None and i == 0:
                with sealed(kept) as draft, whole_file(draft, "file of logits") as file:
                    np.save(file, np.concatenate(of_first))
            return np.concatenate(parts, axis=1)

        yield from pool.map(score, range(len(tokens)))


def score_positions(source: "torch.Tensor", candidate: "torch.Tensor", following: "torch.Tensor") -> np.ndarray:
    """source, candidate: logits [n_positions, vocabulary]; following: the true next tokens [n_positions]. Returns what
    Baseline.stream_scores tells of these positions."""
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
    """The perplexity of negative log-likelihoods; None where it is beyond all numbers."""
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(likelihoods.mean()))
    return perplexity if np.isfinite(perplexity) else None


def quality_of(
    scores: np.ndarray, corpus: "Corpus", words: np.ndarray | None, computed: Mapping[str, str] | None = None
) -> QualityReport:
    """The report of what Baseline.stream_scores tells of a whole corpus; words: as of stream_quality. computed: by
    what, as Baseline has it."""
    words = np.full(corpus.tokens.shape, NO_WORD) if words is None else words
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
        **corpus.identity,
        **(computed or {}),
    )
