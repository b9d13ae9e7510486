"""The stage `calibrate`: the importance matrix, read from a file or computed by streaming the model over a corpus."""

from pathlib import Path
from typing import Any

import numpy as np

from calibration.control import ShouldStop
from calibration.corpus import Corpus, corpus_title, load_corpus, resolve_corpus
from calibration.imatrix_file import load_imatrix, save_imatrix
from calibration.importance import ImportanceMatrix, compute_importance
from converter.architecture import find_architecture
from converter.checkpoint import Checkpoint
from converter.configuration import dimensions_of
from converter.hub import first_line
from converter.job import Job
from converter.kept import kept
from converter.model_map import describe
from converter.progress import Progress
from converter.recipe import IMPORTANCE_FILE
from converter.source import open_checkpoint
from formats.errors import ConvertError
from formats.files import remove, remove_tree, rename
from profiles.plan import Plan
from profiles.vocabulary import ModelMap, Role

MOMENTS = "moments"
"""Of the second moments' place in the work directory."""
# The checkpoints of the pass over the model.
# Keys of a scaling that llama.cpp does not read.
_WITHOUT_EFFECT = (".finetuned", ".yarn_beta_fast", ".yarn_beta_slow", ".yarn_ext_factor", ".yarn_attn_factor")
_PASS = "calibration"


def observed_names(model_map: ModelMap) -> dict[str, tuple[str, int]]:
    """Checkpoint tensor -> (GGUF tensor, matrix index), for every matrix of the layers that may be quantized, and for
    the output head; a tied head is the embedding tensor."""
    head = Role.OUTPUT if any(t.role is Role.OUTPUT for t in model_map.tensors) else Role.EMBEDDING
    return {
        source: (tensor.name, matrix)
        for tensor in model_map.tensors
        if tensor.quantizable
        if tensor.layer is not None or tensor.role is head
        for matrix, source in enumerate(tensor.sources)
    }


def uses_chat(job: Job, model_map: ModelMap) -> bool:
    """Whether the calibration renders conversations: as asked, or where the tokenizer has a chat template.

    Raises ConvertError when that is asked of a tokenizer that has none.
    """
    has_template = "tokenizer.chat_template" in model_map.metadata
    if job.chat and not has_template:
        raise ConvertError(
            "the tokenizer has no chat template", job.model, "leave out --chat, or add chat_template.jinja to the model"
        )
    return has_template if job.chat is None else job.chat


def planned_importance(job: Job, checkpoint: Checkpoint, model_map: ModelMap) -> ImportanceMatrix:
    """What `calibrate` will give, without running the model: the file that is named, or the identity of what will be
    computed, with statistics of zero."""
    if job.imatrix is not None:
        shapes = {tensor.name: (tensor.n_matrices, tensor.n_columns) for tensor in model_map.tensors}
        return load_imatrix(job.imatrix).shaped_as(shapes)
    names = {name for name, _ in observed_names(model_map).values()}
    observed = [tensor for tensor in model_map.tensors if tensor.name in names]
    corpus, _ = resolve_corpus(job.calibration)
    corpus = corpus_title(corpus, uses_chat(job, model_map))
    return ImportanceMatrix(
        sums={tensor.name: np.zeros((tensor.n_matrices, tensor.n_columns)) for tensor in observed},
        counts={tensor.name: np.zeros(tensor.n_matrices, np.int64) for tensor in observed},
        model=checkpoint.model_id,
        revision=checkpoint.revision,
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
                "compute a complete one with `convert imatrix MODEL`, or leave out --imatrix",
            )
        if name not in shapes or sums.shape != shapes[name]:
            has = f"[{', '.join(map(str, shapes[name]))}]" if name in shapes else "no such tensor"
            raise ConvertError(
                f"the importance matrix is of another model: it has {name} {list(sums.shape)}, the model has {has}",
                where,
                "compute one of this model with `convert imatrix MODEL`, or leave out --imatrix",
            )
    for planned in plan.tensors:
        missing = planned.tensor.name not in importance.names
        if missing and planned.tensor.layer is not None and planned.needs_importance:
            raise ConvertError(
                f"{planned.format} cannot be encoded without importance, and the matrix has none for this tensor",
                f"{where}, tensor {planned.tensor.name}",
                f"compute a complete matrix, or choose another format: --set '{planned.tensor.name}=Q4_K'",
            )


def calibrate(
    job: Job,
    checkpoint: Checkpoint,
    model_map: ModelMap,
    work_dir: Path,
    progress: Progress,
    should_stop: ShouldStop,
    moments_dir: Path | None = None,
) -> ImportanceMatrix:
    """Compute the importance matrix of the job, and the second moments of its inputs where a place for them is named.
    What was computed stays in the work directory and is not computed again."""

    def compute() -> ImportanceMatrix:
        running, running_map = runnable(checkpoint, model_map, work_dir)
        corpus = calibration_text(job, load_tokenizer(running.location), model_map, job.samples)
        if corpus.note:
            progress.say(corpus.note)
        return compute_importance(
            running,
            running.location,
            observed_names(running_map),
            corpus,
            model=checkpoint.model_id,
            revision=checkpoint.revision,
            work_dir=work_dir / _PASS,
            device=job.device,
            dtype=job.calibration_dtype,
            threads=job.n_threads,
            moments_dir=moments_dir,
            progress=progress,
            should_stop=should_stop,
        )

    return kept(work_dir / IMPORTANCE_FILE, "importance matrix", progress, compute, save_imatrix, load_imatrix)


def forget_calibration(work_dir: Path) -> None:
    """What `calibrate` has left, so that it runs again."""
    remove(work_dir / IMPORTANCE_FILE)
    remove_tree(work_dir / _PASS)
    remove_tree(work_dir / MOMENTS)


def calibration_text(job: Job, tokenizer: Any, model_map: ModelMap, samples: int, longest: int | None = None) -> Corpus:
    """So many samples of the job's calibration text, of its length or of `longest` tokens where that is less."""
    length = job.sequence_length if longest is None else min(longest, job.sequence_length)
    return load_corpus(job.calibration, tokenizer, samples, length, job.seed, chat=uses_chat(job, model_map))


def load_tokenizer(directory: Path) -> Any:
    """The checkpoint's tokenizer as transformers runs it; code that comes with a checkpoint is never run.

    Raises ConvertError when transformers cannot read it.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers let through whatever a damaged file leads to
        raise ConvertError(
            f"transformers cannot read the tokenizer: {first_line(error)}",
            str(directory),
            "fetch the tokenizer's files again, or convert with --imatrix FILE --no-quality, which needs no tokens",
        ) from None


def runnable(checkpoint: Checkpoint, model_map: ModelMap, work_dir: Path) -> tuple[Checkpoint, ModelMap]:
    """The checkpoint as a directory that transformers can run: itself, or what transformers makes of a GGUF.

    Raises ConvertError when transformers cannot read this architecture from a GGUF.
    """
    if checkpoint.location.is_dir():
        return checkpoint, model_map
    directory = work_dir / "source"
    if not directory.exists():
        _save_as_directory(checkpoint, directory)
    opened = open_checkpoint(str(directory))
    running = describe(opened)
    _check_same_model(checkpoint, model_map, opened, running)
    return opened, running


def _check_same_model(gguf: Checkpoint, stated: ModelMap, opened: Checkpoint, running: ModelMap) -> None:
    """Refuse what transformers computes otherwise than the GGUF says: its reader leaves some keys out, without a word.

    Raises ConvertError that names the first of them.
    """
    own = f"{stated.architecture}."
    for key, value in stated.metadata.items():
        if not key.startswith(own):
            continue
        found = running.metadata[key].value if key in running.metadata else None
        scaling = key.startswith(f"{own}rope.scaling.") and not key.endswith(_WITHOUT_EFFECT)
        if (found is None and scaling) or (found is not None and not _equal(value.value, found)):
            raise _not_readable(gguf.location, f"it takes {key} for {found}, where the file has {value.value}")
    for tensor in stated.tensors:
        if tensor.role is Role.ROPE:
            same = next((t for t in running.tensors if t.name == tensor.name), None)
            if same is None or not np.allclose(same.constant, gguf.read(tensor.name), rtol=1e-4):
                raise _not_readable(gguf.location, f"it leaves out {tensor.name}, by which the file scales positions")
    for tensor in running.tensors:
        if tensor.role is Role.ROPE and tensor.name not in gguf.tensors:
            raise _not_readable(gguf.location, f"it scales positions by {tensor.name}, which the file does not have")


def _equal(stated: Any, found: Any) -> bool:
    return bool(np.allclose(stated, found, rtol=1e-5)) if isinstance(stated, int | float) else stated == found


def _save_as_directory(checkpoint: Checkpoint, directory: Path) -> None:
    """What transformers reads from a GGUF, as a checkpoint of its own. The whole model is in memory, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = checkpoint.location
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        read: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # as above
        raise _not_readable(gguf, first_line(error)) from None
    model, loaded = read
    # transformers fills what it could not match with random numbers and goes on.
    if unmatched := sorted({str(name) for kind in ("missing_keys", "mismatched_keys") for name in loaded[kind]}):
        raise _not_readable(gguf, f"it does not find the weights of {unmatched[0]} and {len(unmatched) - 1} others")
    # It also marks what it has read from a GGUF as quantized, and refuses to save that; F32 weights are not.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    _restate_rope(checkpoint, model.config)
    _restate_what_is_equal(checkpoint, model.config)
    unfinished = directory.with_name("source.unfinished")
    remove_tree(unfinished)
    tokenizer.save_pretrained(unfinished)
    model.save_pretrained(unfinished)
    rename(unfinished, directory)


def _restate_rope(checkpoint: Checkpoint, config: Any) -> None:
    """Give the configuration the scaling of positions that the GGUF states, and transformers leaves out."""
    from converter.gguf_rope import rope_table

    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotary = (checkpoint.metadata or {}).get(f"{checkpoint.config['model_type']}.rope.dimension_count")
    table = rope_table(checkpoint, head if rotary is None else int(rotary.value))
    parameters = getattr(config, "rope_parameters", None)
    if table and isinstance(parameters, dict) and "full_attention" in parameters:
        config.rope_parameters = parameters | {"full_attention": parameters["full_attention"] | table}
    elif table:
        config.rope_parameters = (parameters or {}) | table
    original = (checkpoint.metadata or {}).get(
        f"{checkpoint.config['model_type']}.rope.scaling.original_context_length"
    )
    if table.get("rope_type") == "longrope" and original is not None:
        config.original_max_position_embeddings = int(original.value)


def _restate_what_is_equal(checkpoint: Checkpoint, config: Any) -> None:
    """Give the configuration what llama.cpp takes for granted and a GGUF does not state: its reader has defaults."""
    architecture = find_architecture(config.to_dict(), str(checkpoint.location))
    values = architecture.completed(config.to_dict())
    values.setdefault("partial_rotary_factor", 1.0)
    dimensions = dimensions_of(architecture, values, str(checkpoint.location), checkpoint.tensors)
    for key, equal in architecture.equal.items():
        setattr(config, key, dimensions[equal.of_layers.get(dimensions["layers"], equal.dimension)])


def _not_readable(gguf: Path, why: str) -> ConvertError:
    return ConvertError(
        f"transformers cannot run this GGUF: {why}",
        str(gguf),
        "give an importance matrix with --imatrix FILE and --no-quality, or convert from the Hugging Face checkpoint",
    )
