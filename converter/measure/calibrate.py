"""The stage `calibrate`: the importance matrix, read from a file or computed by streaming the model over a corpus."""

from pathlib import Path

import numpy as np

from bitwright.calibration.places import Place
from bitwright.calibration.statistics.activation_file import load_activations
from bitwright.calibration.statistics.imatrix_file import load_imatrix, save_imatrix
from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.calibration.text.corpus import corpus_title, resolve_corpus
from bitwright.converter.artifact.run import Run
from bitwright.converter.job.cache import text_identity
from bitwright.converter.job.kept import kept
from bitwright.converter.job.recipe import IMPORTANCE_FILE
from bitwright.converter.measure.running import calibration_text, load_tokenizer, runnable, streamable, uses_chat
from bitwright.converter.measure.statistics_directory import given_activations
from bitwright.converter.model.module_map import places_of
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import remove, remove_tree
from bitwright.profiles.planning.plan import Plan
from bitwright.profiles.vocabulary import ModelMap, Role

MOMENTS = "moments"
"""The directory of the second moments in the work directory."""
# The checkpoints of the pass over the model.
_PASS = "calibration"


def observed_names(model_map: ModelMap) -> dict[str, tuple[Place, ...]]:
    """Checkpoint tensor -> its places in the GGUF, for every matrix that may be quantized and whose inputs the pass
    sees: those of the layers, the projection to the inputs of all layers, and the output head; a tied head is the
    embedding tensor."""
    head = Role.OUTPUT if any(t.role is Role.OUTPUT for t in model_map.tensors) else Role.EMBEDDING
    outside = (head, Role.PER_LAYER_PROJECTION)
    return places_of(t for t in model_map.tensors if t.quantizable and (t.layer is not None or t.role in outside))


def planned_importance(run: Run) -> ImportanceMatrix:
    """What `streamed_importance` will give, without running the model: the file that is named, or the identity of what
    will be computed, with statistics of zero."""
    job, model_map = run.job, run.model_map
    if job.imatrix is not None:
        shapes = {tensor.name: (tensor.n_matrices, tensor.n_columns) for tensor in model_map.tensors}
        return load_imatrix(job.imatrix).shaped_as(shapes)
    if (given := given_activations(job)) is not None and job.profile.target != "gguf":
        return load_activations(given.activations).importance()
    names = {place.tensor for places in observed_names(model_map).values() for place in places}
    observed = [tensor for tensor in model_map.tensors if tensor.name in names]
    corpus, _ = resolve_corpus(job.calibration)
    corpus = corpus_title(corpus, uses_chat(job, model_map))
    return ImportanceMatrix(
        sums={tensor.name: np.zeros((tensor.n_matrices, tensor.n_columns)) for tensor in observed},
        counts={tensor.name: np.zeros(tensor.n_matrices, np.int64) for tensor in observed},
        model=run.checkpoint.model_id,
        revision=run.checkpoint.revision,
        corpus=corpus,
        corpus_sha256="0" * 64,
        samples=job.samples,
        sequence_length=job.sequence_length,
    )


def check_importance(importance: ImportanceMatrix, model_map: ModelMap, plan: Plan, where: str) -> None:
    """Refuse an imatrix of another model, or one that leaves out a tensor whose format cannot do without.

    Raises ConvertError naming the first tensor that contradicts.
    """
    shapes = {tensor.name: (tensor.n_matrices, tensor.n_columns) for tensor in model_map.tensors}
    for name, sums in importance.sums.items():
        if name in shapes and sums.shape[1] == shapes[name][1] and len(sums) < shapes[name][0]:
            raise ConvertError(
                f"the importance matrix is partial: it has {len(sums)} of the {shapes[name][0]} experts of this tensor",
                f"{where}, tensor {name}",
                "compute a complete one with `bitwright imatrix MODEL`, or leave out --imatrix",
            )
        if name not in shapes or sums.shape != shapes[name]:
            has = f"[{', '.join(map(str, shapes[name]))}]" if name in shapes else "no such tensor"
            raise ConvertError(
                f"the importance matrix is of another model: it has {name} {list(sums.shape)}, the model has {has}",
                where,
                "compute one of this model with `bitwright imatrix MODEL`, or leave out --imatrix",
            )
    for planned in plan.tensors:
        missing = planned.tensor.name not in importance.names
        if missing and planned.tensor.layer is not None and planned.needs_importance:
            raise ConvertError(
                f"{planned.format} cannot be encoded without importance, and the matrix has none for this tensor",
                f"{where}, tensor {planned.tensor.name}",
                f"compute a complete matrix, or choose another format: --set '{planned.tensor.name}=Q4_K'",
            )


def streamed_importance(run: Run, moments_dir: Path | None = None) -> ImportanceMatrix:
    """The importance matrix of the run's model, computed by running it over the calibration text. It stays in the work
    directory and is not computed again. moments_dir: where the second moments of the inputs go; None for none."""
    job, checkpoint, progress = run.job, run.checkpoint, run.progress

    def compute() -> ImportanceMatrix:
        from bitwright.calibration.passes.importance_pass import stream_importance

        running, running_map = runnable(checkpoint, run.model_map, run.work_dir)
        corpus = calibration_text(job, load_tokenizer(running.location), run.model_map, job.samples)
        if corpus.note:
            progress.say(corpus.note)
        model = streamable(run, running, job.calibration_dtype)

        def stream() -> ImportanceMatrix:
            return stream_importance(model, observed_names(running_map), corpus, run.control(_PASS), moments_dir)

        settings = {"text": text_identity(corpus), "dtype": job.calibration_dtype}
        cached = run.cache.entry("importance", **settings)
        cached_moments = run.cache.entry("second moments", **settings)
        if moments_dir is None or (not moments_dir.exists() and cached_moments.fetch(moments_dir)):
            return cached.result(stream, save_imatrix, load_imatrix, ".gguf")
        importance = stream()
        cached_moments.store(moments_dir)
        return cached.result(lambda: importance, save_imatrix, load_imatrix, ".gguf")

    return kept(run.work_dir / IMPORTANCE_FILE, "importance matrix", progress, compute, save_imatrix, load_imatrix)


def forget_calibration(work_dir: Path) -> None:
    """Remove what `streamed_importance` has left, so that it runs again."""
    remove(work_dir / IMPORTANCE_FILE)
    remove_tree(work_dir / _PASS)
    remove_tree(work_dir / MOMENTS)
