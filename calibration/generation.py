"""Greedy continuations by the model itself, and how it reads what another model has continued.

Reading costs one pass through the layers, whatever the model's size: shown a prompt and its continuation by another
model, the most probable token at each place tells where this model would first have gone another way. Generating keeps
the weights resident where they fit into half of the free memory. Where they do not, the layer stream guesses all tokens
at once and passes over them again until nothing changes: each pass settles one more token at least.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.control import Interrupted, Progress, ShouldStop, never, silent
from formats.files import remove_tree
from formats.seals import is_sound, write_sealed

if TYPE_CHECKING:
    import torch
    from transformers import DynamicCache

    from calibration.arithmetic import Arithmetic
    from calibration.stream import LayerStream
    from calibration.weights import WeightSource

# Prompts that one core takes through the resident model together.
_BATCH = 4


@dataclass(frozen=True)
class Generation:
    """What a model continued a prompt with, each token the most probable one.

    tokens: the continuation, with the token that ended it if it `ended`. entropies: of the distribution that each
    token was taken from, in nats. surprises: minus the log-probability of each token in it, in nats.
    finite: False where logits were not; the tokens before that are kept.
    """

    tokens: tuple[int, ...]
    entropies: tuple[float, ...]
    surprises: tuple[float, ...]
    ended: bool
    finite: bool = True

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Generation":
        return cls(
            tokens=tuple(data["tokens"]),
            entropies=tuple(data["entropies"]),
            surprises=tuple(data["surprises"]),
            ended=data["ended"],
            finite=data["finite"],
        )


class GreedyRecord:
    """Collects one Generation, step by step."""

    def __init__(self, n_tokens: int, end_tokens: frozenset[int]):
        self._n_tokens, self._end_tokens = n_tokens, end_tokens
        self._tokens: list[int] = []
        self._entropies: list[float] = []
        self._surprises: list[float] = []
        self._ended, self._finite = False, True

    def take(self, logits: np.ndarray) -> bool:
        """logits: float32 [vocabulary] of the next token. Returns whether there is more to come."""
        self._finite = bool(np.isfinite(logits).all())
        if not self._finite:
            return False
        token = int(logits.argmax())
        log_p = logits.astype(np.float64) - logits[token]
        log_p -= np.log(np.exp(log_p).sum())
        self._tokens.append(token)
        self._entropies.append(float(-(np.exp(log_p) * log_p).sum()))
        self._surprises.append(float(-log_p[token]))
        self._ended = token in self._end_tokens
        return not self._ended and len(self._tokens) < self._n_tokens

    def generation(self) -> Generation:
        tokens, entropies, surprises = tuple(self._tokens), tuple(self._entropies), tuple(self._surprises)
        return Generation(tokens, entropies, surprises, self._ended, self._finite)


@dataclass(frozen=True)
class Reading:
    """How a model reads another's continuation. agreed: the tokens before the first at which its own greedy choice is
    another; all of them when there is none. surprises: minus the log-probability of each token, in nats."""

    agreed: int
    surprises: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Model:
    """A model that is only described, and how it is to be run."""

    source: "WeightSource"
    config_dir: Path
    work_dir: Path
    identity: str
    device: str
    threads: int | None
    progress: Progress
    should_stop: ShouldStop
    arithmetic: "Arithmetic | None" = None

    def stream(self, tokens: np.ndarray) -> "LayerStream":
        from calibration.stream import LayerStream

        return LayerStream(
            self.source,
            self.config_dir,
            tokens,
            self.work_dir,
            identity=self.identity,
            device=self.device,
            threads=self.threads,
            arithmetic=self.arithmetic,
        )

    def pass_over(
        self, texts: Sequence[tuple[Sequence[int], Sequence[int]]], stage: str
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each (prompt, continuation) the logits that every token of the continuation was chosen by, reduced:
        (float64 [3, n]: greedy choice, entropy, surprise of the token that stands there; bool [n]: finite)."""
        import torch

        tokens = np.zeros((len(texts), max(len(p) + len(c) for p, c in texts)), np.int32)
        for row, (prompt, continuation) in zip(tokens, texts, strict=True):
            row[: len(prompt) + len(continuation)] = [*prompt, *continuation]
        stream = self.stream(tokens)
        stream.run(self.progress, self.should_stop, stage=stage)
        with stream.head() as head, torch.inference_mode():
            return [
                _reduced(head(stream.hidden_states(i, i + 1)[0, len(p) - 1 : len(p) + len(c) - 1]), c)
                for i, (p, c) in enumerate(texts)
            ]


def _reduced(logits: "torch.Tensor", following: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    import torch

    log_p = logits.float().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    surprise = -log_p.gather(-1, torch.tensor(list(following), device=log_p.device)[:, None])[:, 0]
    finite = logits.isfinite().all(-1)
    return torch.stack([log_p.argmax(-1).float(), entropy, surprise]).cpu().double().numpy(), finite.cpu().numpy()


def read_continuations(
    source: "WeightSource",
    config_dir: Path,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    work_dir: Path,
    identity: str = "",
    device: str = "auto",
    threads: int | None = None,
    progress: Progress = silent,
    should_stop: ShouldStop = never,
) -> list[Reading]:
    """How the model of these weights reads each (prompt, continuation), both of tokens, the prompt not empty.

    work_dir: checkpoints; a second call continues there. The caller deletes it. Raises Interrupted.
    """
    model = _Model(source, config_dir, work_dir, identity, device, threads, progress, should_stop)
    readings = [Reading(0, ())] * len(texts)
    read = [i for i, (_, continuation) in enumerate(texts) if len(continuation)]
    passed = model.pass_over([texts[i] for i in read], "read") if read else []
    for i, ((choices, _, surprises), _) in zip(read, passed, strict=True):
        continuation = texts[i][1]
        other = np.flatnonzero(choices != np.asarray(continuation))
        readings[i] = Reading(int(other[0]) if len(other) else len(continuation), tuple(surprises.tolist()))
    return readings


def generate_greedily(
    source: "WeightSource",
    config_dir: Path,
    prompts: Sequence[Sequence[int]],
    n_tokens: int,
    end_tokens: frozenset[int],
    *,
    work_dir: Path,
    identity: str = "",
    device: str = "auto",
    threads: int | None = None,
    resident: bool | None = None,
    arithmetic: "Arithmetic | None" = None,
    progress: Progress = silent,
    should_stop: ShouldStop = never,
) -> list[Generation]:
    """Continue each prompt (tokens, not empty) by up to n_tokens, ending with one of end_tokens where it comes.

    resident: whether to hold all weights in memory; None decides by the free memory. arithmetic: how products with the
    matrices are computed and caches kept. Results are the same for any
    number of threads. work_dir: the layer stream's checkpoints; a second call continues there. The caller deletes it.
    Raises Interrupted.
    """
    model = _Model(source, config_dir, work_dir, identity, device, threads, progress, should_stop, arithmetic)
    stream = replace(model, work_dir=work_dir / "resident").stream(np.zeros((1, 1), np.int32))
    if resident is None:
        needed = sum(p.numel() for p in stream.model.parameters()) * stream.dtype.itemsize
        resident = needed <= _free_memory(stream.device) // 2
    if resident:
        return _generate_resident(model, stream, prompts, n_tokens, end_tokens)
    return _generate_streamed(model, prompts, n_tokens, end_tokens)


def _free_memory(device: "torch.device") -> int:
    import psutil
    import torch

    return torch.cuda.mem_get_info()[0] if device.type == "cuda" else psutil.virtual_memory().available


def _generate_resident(
    model: _Model, stream: "LayerStream", prompts: Sequence[Sequence[int]], n_tokens: int, end_tokens: frozenset[int]
) -> list[Generation]:
    body = stream.model.base_model
    modules = [
        stream.model.get_input_embeddings(),
        *body.layers,
        stream.final_norm,
        stream.model.get_output_embeddings(),
    ]
    batches = [prompts[start : start + _BATCH] for start in range(0, len(prompts), _BATCH)]
    done = 0
    generations: list[Generation] = []
    with ExitStack() as stack:
        weights: dict[str, torch.Tensor] = {}
        for module in modules:
            weights |= stack.enter_context(stream.resident(module))
        pool = stack.enter_context(stream.workers())

        def continued(batch: Sequence[Sequence[int]]) -> list[Generation]:
            with stream.computing(weights):
                return _continue(stream, batch, n_tokens, end_tokens, model.should_stop)

        for found in pool.map(continued, batches):
            generations += found
            done += len(found)
            model.progress("generate", done, len(prompts), "prompts")
    return generations


def _continue(
    stream: "LayerStream",
    prompts: Sequence[Sequence[int]],
    n_tokens: int,
    end_tokens: frozenset[int],
    should_stop: Callable[[], bool],
) -> list[Generation]:
    """Prompts of any lengths side by side without padding: as long as one has tokens left, those are fed to it."""
    import torch

    from calibration.key_values import HandledCache

    records = [GreedyRecord(n_tokens, end_tokens) for _ in prompts]
    more = [True] * len(prompts)
    n_fed = min(map(len, prompts))
    pending = [list(prompt[:n_fed]) for prompt in prompts]
    cache: DynamicCache | None = None
    if stream.arithmetic is not None:
        cache = HandledCache(stream.arithmetic.cached, stream.config)
    with torch.inference_mode():
        while any(more):
            if should_stop():
                raise Interrupted("stopped while generating")
            tokens = torch.tensor(pending, device=stream.device)
            output = stream.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, logits = output.past_key_values, output.logits[:, -1].float().cpu().numpy()
            pending = []
            for i, prompt in enumerate(prompts):
                if n_fed >= len(prompt) and more[i]:
                    more[i] = records[i].take(logits[i])
                pending.append([prompt[n_fed] if n_fed < len(prompt) else int(logits[i].argmax())])
            n_fed += 1
    return [record.generation() for record in records]


def _generate_streamed(
    model: _Model, prompts: Sequence[Sequence[int]], n_tokens: int, end_tokens: frozenset[int]
) -> list[Generation]:
    state = model.work_dir / "guesses.json"  # replaced whole after every pass, each of which has a directory of its own
    guesses = [[[0] * n_tokens for _ in prompts]] if not is_sound(state) else json.loads(state.read_bytes())
    while True:
        passing = replace(model, work_dir=model.work_dir / f"pass-{len(guesses)}")
        passed = passing.pass_over(list(zip(prompts, guesses[-1], strict=True)), "generate")
        chosen = [_up_to_end(choices.astype(int).tolist(), end_tokens) for (choices, _, _), _ in passed]
        if chosen == guesses[-1]:
            return [_as_generation(*reduced, end_tokens) for reduced in passed]
        guesses.append(chosen)
        write_sealed(state, "guesses", json.dumps(guesses).encode())
        remove_tree(passing.work_dir)


def _up_to_end(tokens: list[int], end_tokens: frozenset[int]) -> list[int]:
    """The tokens with zeros after the first that ends the text: what would follow has not to be settled."""
    length = _length(tokens, end_tokens)
    return tokens[:length] + [0] * (len(tokens) - length)


def _length(tokens: list[int], end_tokens: frozenset[int]) -> int:
    return next((i + 1 for i, token in enumerate(tokens) if token in end_tokens), len(tokens))


def _as_generation(reduced: np.ndarray, finite: np.ndarray, end_tokens: frozenset[int]) -> Generation:
    tokens, entropies, surprises = reduced[0].astype(int).tolist(), reduced[1].tolist(), reduced[2].tolist()
    length = _length(tokens, end_tokens)
    broken = np.flatnonzero(~finite[:length])
    kept = int(broken[0]) if len(broken) else length
    ended = not len(broken) and tokens[length - 1] in end_tokens
    return Generation(tuple(tokens[:kept]), tuple(entropies[:kept]), tuple(surprises[:kept]), ended, not len(broken))
