"""Tasks of the lm-evaluation-harness on an artifact, run by llama.cpp: `--lm-eval`, where both are installed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.converter.artifact.run import Run
from bitwright.converter.job.kept import kept_json
from bitwright.converter.judge.llama_cpp import LlamaCpp, installed, workers
from bitwright.formats.errors import ConvertError, nearest

# Tokens of context and answer together: what the tasks in use need, and no model is too small for.
_N_CTX = 2048
_MOST_GENERATED = 256  # where a task does not say


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuse, before anything runs, tasks that cannot be run here or do not exist. Raises ConvertError."""
    where = f"--lm-eval {','.join(tasks)}"
    for package, there in (("lm-eval", find_spec("lm_eval") is not None), ("llama-cpp", installed())):
        if not there:
            raise ConvertError(
                "the tasks need the lm-evaluation-harness and llama.cpp, and they are not both installed",
                where,
                f"pip install 'bitwright[{package}]', or leave out --lm-eval",
            )
    from lm_eval.tasks import TaskManager

    known = TaskManager().all_tasks
    for task in tasks:
        if task not in known and not Path(task).is_file():
            raise ConvertError(f"the harness has no task {task!r}", where, nearest(task, known))


def measured_tasks(run: Run, artifact: Path) -> dict[str, Any]:
    """{"tasks", "limit", "results"}: the tasks that the job names, and what run_tasks measures. It stays in the work
    directory until other tasks are asked for."""
    job = run.job
    tasks, limit = list(job.lm_eval), job.lm_eval_limit

    def compute() -> dict[str, Any]:
        return {"tasks": tasks, "limit": limit, "results": run_tasks(artifact, tasks, limit, job.n_threads)}

    def are_asked_for(measured: dict[str, Any]) -> bool:
        return (measured["tasks"], measured["limit"]) == (tasks, limit)

    return kept_json(run.work_dir / "tasks.json", "record of tasks", run.progress, compute, answers=are_asked_for)


def run_tasks(artifact: Path, tasks: Sequence[str], limit: int | None, threads: int) -> dict[str, dict[str, float]]:
    """task -> metric -> value, as the harness names them; limit: examples of each task, None for all.

    Raises ConvertError for what the harness refuses, such as a data set that cannot be fetched.
    """
    from lm_eval import simple_evaluate

    with served(artifact, threads) as model:
        try:
            results: Any = simple_evaluate(
                model=model, tasks=list(tasks), limit=limit, bootstrap_iters=0, log_samples=False
            )
        except Exception as error:  # the harness and its tasks let errors of a dozen libraries through
            raise ConvertError(
                f"the harness cannot run these tasks ({type(error).__name__}: {str(error).partition(chr(10))[0]})",
                f"--lm-eval {','.join(tasks)}",
                "check their names and the network, or leave out --lm-eval; the same command continues",
            ) from error
    return {
        task: {name.removesuffix(",none"): float(value) for name, value in metrics.items() if isinstance(value, float)}
        for task, metrics in results["results"].items()
    }


@contextmanager
def served(artifact: Path, threads: int) -> Iterator[Any]:
    """The artifact as one of the harness's models; each thread takes whole requests."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    with LlamaCpp(artifact, n_ctx=_N_CTX, n_threads=1) as model, workers(model, threads) as run_each:

        class Served(TemplateLM):  # type: ignore[misc]
            @property
            def eot_token_id(self) -> int:
                return min(model.end_tokens)

            def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
                return model.tokenize(string, add_special=add_special_tokens is not False)

            def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
                return list(
                    run_each(lambda context, request: log_likelihood(context, request[1], request[2]), requests)
                )

            def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
                return list(run_each(lambda context, request: self._rolling(context, request.args[0]), requests))

            def _rolling(self, context: LlamaCpp, text: str) -> float:
                windows = get_rolling_token_windows(
                    model.tokenize(text, add_special=False), self.prefix_token_id, _N_CTX - 1, context_len=1
                )
                return sum(log_likelihood(context, *map(list, make_disjoint_window(w)))[0] for w in windows)

            def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
                return list(run_each(lambda context, request: answer(context, *request.args), requests))

        yield Served()


def log_likelihood(model: LlamaCpp, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """(log-probability of the continuation in nats, whether greedy decoding would write it).

    Of more tokens than fit, the last are taken.
    """
    tokens = [*context, *continuation][-model.n_ctx :][:-1]
    n = min(len(continuation), len(tokens))
    logits = model.logits(tokens, n_last=n).astype(np.float64)
    following = np.array(continuation[-n:])
    highest = logits.max(axis=1)
    chosen = logits[np.arange(n), following] - highest
    total = chosen - np.log(np.exp(logits - highest[:, None]).sum(axis=1))
    return float(total.sum()), bool((chosen == 0).all())


def answer(model: LlamaCpp, prompt: str, settings: dict[str, Any]) -> str:
    """The greedy answer up to the first of the stop texts."""
    stops = settings.get("until") or []
    stops = [stops] if isinstance(stops, str) else stops
    most = int(settings.get("max_gen_toks", _MOST_GENERATED))
    tokens = model.tokenize(prompt)[-(model.n_ctx - most) :]
    so_far: list[int] = []

    def seen(logits: np.ndarray) -> bool:
        so_far.append(int(logits.argmax()))
        text = model.detokenize(so_far)
        return not any(stop and stop in text for stop in stops)

    text = model.detokenize(model.generate(tokens, most, seen))
    ends = [text.find(stop) for stop in stops if stop and stop in text]
    return text[: min(ends)] if ends else text
