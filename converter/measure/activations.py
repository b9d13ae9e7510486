"""The statistics of the inputs of a model's matrices, computed by running it over the calibration text."""

from dataclasses import replace

from bitwright.calibration.places import Place
from bitwright.calibration.statistics.activation_file import load_activations, save_activations
from bitwright.calibration.statistics.activations import ActivationStatistics, InputRows
from bitwright.calibration.text.corpus import Corpus
from bitwright.converter.artifact.run import Run
from bitwright.converter.job.kept import kept
from bitwright.converter.measure.calibrate import observed_names
from bitwright.converter.measure.running import calibration_text, load_tokenizer, runnable, streamable
from bitwright.converter.measure.statistics_directory import given_activations
from bitwright.converter.model.module_map import places_of
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.formats.files.disk import remove, remove_tree
from bitwright.profiles.vocabulary import ModelMap, Role

ACTIVATIONS_FILE = "activations.safetensors"
# The checkpoints of the pass over the model.
_PASS = "activations"


def streamed_activations(run: Run) -> ActivationStatistics:
    """The activation statistics of the run's model as it is, importance among them: those that the job names, or those
    of a pass over the model. These stay in the work directory and are not computed again; `input_rows` are left beside
    them."""
    job = run.job
    if (given := given_activations(job)) is not None:
        return load_activations(given.activations)

    def compute() -> ActivationStatistics:
        from bitwright.calibration.passes.activation_pass import stream_activations

        running, running_map = runnable(run.checkpoint, run.model_map, run.work_dir)
        corpus = activation_text(run, running, running_map, job.samples)
        if corpus.note:
            run.progress.say(corpus.note)
        model = streamable(run, running, job.calibration_dtype)
        rows = input_rows(run)
        return stream_activations(model, activation_names(running_map), corpus, run.control(_PASS), rows=rows)

    path = run.work_dir / ACTIVATIONS_FILE
    return kept(path, "file of activation statistics", run.progress, compute, save_activations, load_activations)


def forget_activations(run: Run) -> None:
    """Remove what `streamed_activations` has left, so that it runs again."""
    remove(run.work_dir / ACTIVATIONS_FILE)
    remove_tree(run.work_dir / _PASS)
    remove_tree(input_rows(run).directory)


def activation_names(model_map: ModelMap) -> dict[str, tuple[Place, ...]]:
    """Checkpoint tensor -> its places in the GGUF, for what is observed: the matrices that may be quantized, and the
    routers, whose inputs are those of all experts together."""
    return observed_names(model_map) | places_of(t for t in model_map.tensors if t.role is Role.ROUTER)


def input_rows(run: Run) -> InputRows:
    """The rows of the inputs that are kept to measure the error of outputs on."""
    given = given_activations(run.job)
    return InputRows(run.work_dir / "activation-rows") if given is None else given.rows


def activation_text(run: Run, running: Checkpoint, running_map: ModelMap, samples: int) -> Corpus:
    """The first samples of the job's calibration text, in the tokens of the checkpoint that runs."""
    corpus = calibration_text(run.job, load_tokenizer(running.location), running_map, run.job.samples)
    return replace(corpus, tokens=corpus.tokens[:samples])
