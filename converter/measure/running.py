"""What running a source takes: a directory that transformers can load, its tokenizer, and the calibration text."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.calibration.choices import Dtype
from bitwright.calibration.stream.streamable import StreamableModel
from bitwright.calibration.text.corpus import Corpus, load_corpus
from bitwright.converter.architectures.architecture import find_architecture
from bitwright.converter.artifact.run import Run
from bitwright.converter.job.job import Job
from bitwright.converter.measure.obstacles import Need, check_runs
from bitwright.converter.model.configuration import dimensions_of
from bitwright.converter.model.gguf_rope import rope_table
from bitwright.converter.model.model_map import describe
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.converter.source.hub import first_line
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import file_state, remove_tree, rename
from bitwright.profiles.vocabulary import ModelMap, Role

# Keys of a scaling that llama.cpp does not read.
_WITHOUT_EFFECT = (".finetuned", ".yarn_beta_fast", ".yarn_beta_slow", ".yarn_ext_factor", ".yarn_attn_factor")


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


def calibration_text(job: Job, tokenizer: Any, model_map: ModelMap, samples: int, longest: int | None = None) -> Corpus:
    """A number of samples of the job's calibration text, of its sequence length or, where that is more, of `longest`
    tokens."""
    length = job.sequence_length if longest is None else min(longest, job.sequence_length)
    return load_corpus(job.calibration, tokenizer, samples, length, job.seed, chat=uses_chat(job, model_map))


def load_tokenizer(directory: Path) -> Any:
    """The checkpoint's tokenizer as transformers runs it; code that comes with a checkpoint is never run. All who ask
    share one, as long as the directory's files stay as they are.

    Raises ConvertError when transformers cannot read it.
    """
    files = sorted(directory.iterdir()) if directory.is_dir() else []
    return _tokenizer(directory.absolute(), tuple((path.name, file_state(path)) for path in files))


@lru_cache(maxsize=2)
def _tokenizer(directory: Path, _state: object) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers let through whatever a damaged file leads to
        raise ConvertError(
            f"transformers cannot read the tokenizer: {first_line(error)}",
            str(directory),
            "fetch the tokenizer's files again, or convert with --imatrix FILE --judge off, which needs no tokens",
        ) from None


def runnable(checkpoint: Checkpoint, model_map: ModelMap, work_dir: Path) -> tuple[Checkpoint, ModelMap]:
    """The checkpoint as a directory that transformers can run: itself, or what transformers makes of a GGUF.

    Raises ConvertError when transformers cannot read this architecture from a GGUF.
    """
    if checkpoint.location.is_dir():
        return checkpoint, model_map
    check_runs(checkpoint, [Need.IMPORTANCE])
    directory = work_dir / "source"
    if not directory.exists():
        _save_as_directory(checkpoint, directory)
    opened = open_checkpoint(str(directory))
    running = describe(opened)
    _check_same_model(checkpoint, model_map, opened, running)
    return opened, running


def streamable(run: Run, weights: Checkpoint, dtype: Dtype = "float32", variant: str = "") -> StreamableModel:
    """The run's model to be streamed. weights: it as a directory that transformers can load, or what stands for that.
    dtype: measuring is done in float32 on every device, whose rounding is far below what any format does; the passes
    that calibrate give the job's. variant: what tells the weights from the model's own."""
    source, job = run.checkpoint, run.job
    return StreamableModel(
        weights, weights.location, source.model_id, source.revision, variant, job.device, dtype, job.n_threads
    )


def _check_same_model(gguf: Checkpoint, stated: ModelMap, opened: Checkpoint, running: ModelMap) -> None:
    """Raises ConvertError for the first key or tensor of the GGUF that transformers' reader left out, without a word,
    or read as another value: it would compute another model.
    """
    own = f"{stated.architecture}."
    for key, entry in stated.metadata.items():
        if not key.startswith(own):
            continue
        value = running.metadata[key].value if key in running.metadata else None
        scaling = key.startswith(f"{own}rope.scaling.") and not key.endswith(_WITHOUT_EFFECT)
        if (value is None and scaling) or (value is not None and not _equal(entry.value, value)):
            raise _not_readable(gguf.location, f"it takes {key} for {value}, where the file has {entry.value}")
    for tensor in stated.tensors:
        if tensor.role is Role.ROPE:
            same = next((t for t in running.tensors if t.name == tensor.name), None)
            if same is None or not np.allclose(same.constant, gguf.read(tensor.name), rtol=1e-4):
                raise _not_readable(gguf.location, f"it leaves out {tensor.name}, by which the file scales positions")
    for tensor in running.tensors:
        if tensor.role is Role.ROPE and tensor.name not in gguf.tensors:
            raise _not_readable(gguf.location, f"it scales positions by {tensor.name}, which the file does not have")


def _equal(stated: Any, read: Any) -> bool:
    return bool(np.allclose(stated, read, rtol=1e-5) if isinstance(stated, int | float) else stated == read)


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
    except Exception as error:  # as of the tokenizer
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
        f"{Need.IMPORTANCE.value[1]}; {Need.QUALITY.value[1]}; or convert from the Hugging Face checkpoint",
    )
