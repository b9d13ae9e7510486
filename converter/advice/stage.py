"""The stage `advise`: every profile that the device and the runtime run, priced, ranked and explained."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import floor, log10
from typing import Any

from bitwright.converter.advice.plans import PricedPlan, Source
from bitwright.converter.advice.quality import Reports, quality_of, report_places
from bitwright.converter.advice.rank import best_of, ranked, reason_of
from bitwright.converter.advice.recommendation import Candidate, LeftOut, Machine, Recommendation, Speed
from bitwright.converter.advice.request import DEFAULT_CONTEXT, THIS, Request
from bitwright.converter.advice.shape import ModelShape, model_shape
from bitwright.converter.advice.this_machine import this_machine
from bitwright.converter.boundary.machine import usable_cores
from bitwright.formats.errors import ConvertError
from bitwright.profiles.advice.attention import choose_kernel
from bitwright.profiles.advice.cache import LLAMA_CPP_CELLS, VLLM_CELLS, Cache, CacheFormat, Cells, cache_format
from bitwright.profiles.advice.efficiency import (
    COVERAGE,
    decode_constants,
    measured_spread,
    prefill_constants,
    prefill_speed_up,
)
from bitwright.profiles.advice.hardware import GIB, Attention, Device, Runtime, find_device
from bitwright.profiles.advice.operators import Row, operator_formats, prompt_operations, step_operators
from bitwright.profiles.advice.roofline import PromptTime, StepTime, bottlenecks, prompt_time, step_time
from bitwright.profiles.advice.several_gpus import (
    LayerSplit,
    all_together,
    class_of_prompt,
    class_of_step,
    heads_refusal,
    repeated,
)
from bitwright.profiles.advice.support import scheme_family, supported
from bitwright.profiles.reading.schema import PRESETS

# Beside the model and its cache: the runtime's own buffers and the driver's context. An assumption, and not measured.
_LLAMA_CPP_RESERVE = GIB
# vLLM takes this share of a device by default (gpu_memory_utilization), and the rest is for its own buffers.
_VLLM_SHARE = 0.9
_CACHES: dict[Runtime, tuple[str, ...]] = {"llama.cpp": ("F16", "Q8_0", "Q4_0"), "vLLM": ("BF16", "FP8")}
"""What a runtime keeps keys and values in; the first one unless it is told otherwise."""


def advise(request: Request, source: Source | None = None) -> Recommendation:
    """What to make of a model for a machine. Reads headers and configuration only. source: the model, where it is open
    already.

    Raises ConvertError for a model, a device or an option that is none, and where no profile can be planned."""
    source = source or Source.open(request.model, request.from_quantized, request.base)
    device = (
        this_machine(request.threads or usable_cores()) if request.hardware == THIS else find_device(request.hardware)
    )
    if request.gpus > 1 and device.backend not in ("cuda", "rocm"):
        raise ConvertError(
            f"{device.name} is no GPU that a runtime spreads a model over", f"--gpus {request.gpus}", "leave it out"
        )
    shape = model_shape(source.model_map)
    if not shape.generates:
        raise ConvertError(
            "the model embeds texts and writes none, so that there are no tokens a second to advise on",
            request.model,
            "bitwright plan tells the size of every profile",
        )
    context = request.context or min(DEFAULT_CONTEXT, shape.context or DEFAULT_CONTEXT)
    request, kernel = replace(request, context=context), choose_kernel(request.attention, device.architecture)
    advisor = _Advisor(request, source, device, shape, kernel, context)
    return advisor.recommendation()


@dataclass(frozen=True)
class _Advisor:
    request: Request
    source: Source
    device: Device
    shape: ModelShape
    kernel: Attention
    context: int

    def recommendation(self) -> Recommendation:
        request, shape = self.request, self.shape
        candidates, left_out = self._candidates()
        if not candidates and request.profile is not None:
            raise ConvertError(left_out[0].why, f"--profile {request.profile}", "choose another profile or device")
        order = ranked(candidates, request)
        best = best_of(order, request)
        plain = cache_format("F16")
        return Recommendation(
            model=self.source.checkpoint.model_id,
            revision=self.source.checkpoint.revision,
            machine=self._machine(),
            phase=request.phase,
            context=self.context,
            model_context=shape.context,
            batch=request.batch,
            kv_token_bytes=shape.cache.token_bytes(plain),
            attention=self.kernel,
            candidates=tuple(order),
            left_out=tuple(left_out),
            best=best,
            reason=reason_of(order, best, request),
            notes=tuple(self._notes(order)),
            fa_config=self.kernel,
            **_answer(best),
        )

    def _candidates(self) -> tuple[list[Candidate], list[LeftOut]]:
        request = self.request
        reports = Reports(self.source, report_places(request.model, request.work_dir), request.reports)
        names = (
            [request.profile] if request.profile is not None else sorted(path.stem for path in PRESETS.glob("*.toml"))
        )
        found, left_out = [], []
        for name in names:
            try:
                priced = self.source.price(name, request.overrides, request.sensitivity)
            except ConvertError as error:
                if request.profile is not None:
                    raise
                left_out.append(LeftOut(name, error.what))
                continue
            if (why := self._refused(priced)) is not None:
                left_out.append(LeftOut(name, why))
                continue
            try:
                found.append(self._candidate(priced, reports))
            except ConvertError as error:
                left_out.append(LeftOut(name, error.what))
        return self._narrowed(found), left_out

    def _refused(self, priced: PricedPlan) -> str | None:
        """Why the device or the user does without it; None where it runs."""
        wanted = self.request.runtime
        if wanted != "any" and wanted != priced.runtime.lower():
            return f"it is for {priced.runtime}"
        if priced.runtime == "vLLM" and (why := heads_refusal(self.shape.cache, self.request.gpus)) is not None:
            return why
        verdict = supported(self.device, priced.runtime, priced.formats)
        return verdict.why if verdict.support == "none" else None

    def _candidate(self, priced: PricedPlan, reports: Reports) -> Candidate:
        request, shape, device = self.request, self.shape, self.device
        verdict = supported(device, priced.runtime, priced.formats)
        room, cells, cache = self._room(priced), _cells(priced.runtime), self._cache(priced.runtime)
        kv = self._kv(priced, room)
        kv_bytes = cache.allocated(self.context, request.batch, kv, cells)
        operators = step_operators(priced.rows, cache, shape.experts, kv, self.context, request.batch)
        step = self._step(priced.rows, priced.runtime, _scheme(priced), kv)
        baseline = self._step(self.source.plain_rows, priced.runtime, "bf16", cache_format("F16"))
        plain_bytes = sum(row.n_bytes for row in self.source.plain_rows) + cache.allocated(
            self.context, request.batch, cache_format("F16"), cells
        )
        prompt = self._prompt(priced)
        limit = shape.context or 1 << 24
        total = priced.file_bytes + kv_bytes
        decode = _decode_speed(step, request.gpus) if request.phase != "prefill" else None
        prefill = _prefill_speed(prompt) if request.phase != "decode" and prompt is not None else None
        name = shlex.join(
            [
                "bitwright",
                "--profile",
                priced.profile,
                *(f for text in request.overrides for f in ("--set", text)),
                request.model,
            ]
        )
        rows = bottlenecks(operators, device)
        return Candidate(
            profile=priced.profile,
            runtime=priced.runtime,
            formats=operator_formats((row.tensor.role, row.format) for row in priced.plan.tensors),
            bits_per_weight=priced.bits_per_weight,
            tensor_bytes=priced.tensor_bytes,
            file_bytes=priced.file_bytes,
            kv=kv.name,
            kv_bytes=kv_bytes,
            total_bytes=total,
            fits=kv_bytes <= room,
            longest_context=cache.longest(room, request.batch, kv, cells, limit),
            decode=decode,
            prefill=prefill,
            step_seconds=step.seconds,
            floor_seconds=step.floor,
            shares=step.shares,
            speed_up=baseline.seconds / step.seconds,
            memory_savings=1 - total / plain_bytes,
            quality=quality_of(priced, self.source, reports),
            cache_quality=reports.with_cache(priced, kv.name),
            support=verdict.support,
            remark="; ".join(
                filter(
                    None, (verdict.why, "measured sensitivity chooses within these bytes" if priced.by_rules else "")
                )
            ),
            bottlenecks=rows,
            limit="compute" if any(row.limit == "compute" and row.share > 0.5 for row in rows) else "memory",
            command=name,
            run=_run_options(priced.runtime, kv.name, request.gpus),
        )

    def _kv(self, priced: PricedPlan, room: int) -> CacheFormat:
        """The format of keys and values: the one asked for, the profile's own, or the first of the runtime's that fits
        beside the weights. Raises ConvertError for one that the runtime does not have."""
        request, known = self.request, _CACHES[priced.runtime]
        if request.kv != "auto":
            self._check_kv(request.kv, priced.runtime)
            return cache_format(request.kv)
        if priced.kv is not None and self._has_kernel(priced.kv):
            return cache_format(priced.kv)
        fitting = [name for name in known if self._usable(name, priced.runtime)]
        for name in fitting:
            kv = cache_format(name)
            if self._cache(priced.runtime).allocated(self.context, request.batch, kv, _cells(priced.runtime)) <= room:
                return kv
        return cache_format(fitting[0])

    def _check_kv(self, name: str, runtime: Runtime) -> None:
        known = {*_CACHES[runtime], *(("BF16", "F32") if runtime == "llama.cpp" else ("F16",))}
        if name not in known:
            others = "; TensorRT-LLM and SGLang have it" if name == "NVFP4" else ""
            raise ConvertError(
                f"{runtime} keeps no keys and values in {name}{others}", "--kv", f"it has {', '.join(sorted(known))}"
            )
        if not self._usable(name, runtime):
            raise ConvertError(f"{name} does not run with this model on this device", "--kv", "leave it out")

    def _usable(self, name: str, runtime: Runtime) -> bool:
        """Whether heads divide into the format's blocks, as llama.cpp wants it, and the device has a kernel."""
        block = cache_format(name).block
        whole = all(layer.key % block == 0 and layer.value % block == 0 for layer in self.shape.cache.layers)
        return whole and (runtime == "llama.cpp" or self._has_kernel(name))

    def _has_kernel(self, name: str) -> bool:
        return name != "FP8" or self.device.architecture.vllm.get("FP8_KV") == "native"

    def _step(self, rows: Sequence[Row], runtime: Runtime, scheme: str, kv: CacheFormat) -> StepTime:
        shape, request = self.shape, self.request
        constants = decode_constants(self.device, runtime, scheme)

        def on(device: Device, cache: Cache) -> StepTime:
            operators = step_operators(rows, cache, shape.experts, kv, self.context, request.batch)
            return step_time(operators, shape.layers, request.batch, device, constants, shape.experts.count > 0)

        alone = on(self.device, shape.cache)
        if request.gpus == 1:
            return alone
        if runtime == "llama.cpp":  # one after the other
            return class_of_step(alone, alone)
        return class_of_step(alone, on(all_together(self.device, request.gpus), self._cache(runtime)))

    def _prompt(self, priced: PricedPlan) -> PromptTime | None:
        """Several GPUs share the tokens of a prompt in both runtimes: llama.cpp passes on one part of it after the
        other."""
        alone = self._prompt_on(self.device, priced)
        if alone is None or self.request.gpus == 1:
            return alone
        together = self._prompt_on(all_together(self.device, self.request.gpus), priced)
        return alone if together is None else class_of_prompt(alone, together)

    def _prompt_on(self, device: Device, priced: PricedPlan) -> PromptTime | None:
        shape = self.shape
        operations = prompt_operations(priced.rows, shape.cache, shape.experts, self.context)
        gain = self._gain(scheme_family(_scheme(priced).upper())) if priced.runtime == "vLLM" else 1.0
        return prompt_time(
            operations,
            self.context,
            sum(row.n_bytes for row in priced.rows),
            shape.cache,
            device,
            device.rates.get("fp16") if priced.runtime == "vLLM" else device.prompt_rate,
            prefill_constants(device, priced.runtime),
            self.kernel,
            speed_up=gain,
            has_experts=shape.experts.count > 0,
        )

    def _gain(self, family: str) -> float:
        """Of a prompt's products in a number format over those in 16 bits: none where the device decodes the format,
        and no more than its rates allow."""
        rates = self.device.rates
        rate = rates.get({"W8A8": "int8", "FP8": "fp8", "NVFP4": "fp4", "MXFP4": "fp4"}.get(family, ""))
        if self.device.architecture.vllm.get(family) != "native":
            return 1.0
        bound = rate / rates["fp16"] if rate and "fp16" in rates else float("inf")
        return min(prefill_speed_up(family), bound)

    def _narrowed(self, found: list[Candidate]) -> list[Candidate]:
        """The same, their speeds corrected by those that the user has measured, in the same runtime."""
        known = {candidate.profile: candidate for candidate in found}
        factors: dict[Runtime, float] = {}
        for profile, speed in self.request.measured:
            candidate = known.get(profile)
            if candidate is None or candidate.decode is None:
                raise ConvertError(
                    f"{profile!r} is not among what is advised here, so that its speed corrects nothing",
                    "--measured",
                    f"name one of {', '.join(known)}",
                )
            ceiling = self.request.batch / candidate.floor_seconds
            if speed > ceiling:
                raise ConvertError(
                    f"{speed:g} tokens/s is more than the {ceiling:.1f} that the bandwidth allows",
                    f"--measured {profile}={speed:g}",
                    "check context, batch and device",
                )
            factors[candidate.runtime] = speed * candidate.step_seconds / self.request.batch
        return [_corrected(c, factors[c.runtime], self.request) if c.runtime in factors else c for c in found]

    def _room(self, priced: PricedPlan) -> int:
        """Bytes for the cache, beside the file, of all devices together; negative where the file does not fit."""
        gpus = self.request.gpus
        if priced.runtime == "vLLM":
            return gpus * round(self._memory() * _VLLM_SHARE) - priced.file_bytes
        budget = self._memory() - _LLAMA_CPP_RESERVE
        if gpus == 1:
            return budget - priced.file_bytes
        in_layers = sum(row.n_bytes for row in priced.plan.tensors if row.tensor.layer is not None)
        return LayerSplit(self.shape.layers, in_layers, priced.file_bytes - in_layers).room(budget, gpus)

    def _cache(self, runtime: Runtime) -> Cache:
        """Of all devices together."""
        cache, gpus = self.shape.cache, self.request.gpus
        return repeated(cache, gpus) if runtime == "vLLM" and gpus > 1 else cache

    def _memory(self) -> int:
        return self.request.memory or self.device.available

    def _machine(self) -> Machine:
        device = self.device
        return Machine(
            device.name,
            device.family,
            device.architecture.name,
            self.request.gpus,
            self.request.gpus * self._memory(),
            device.several_sizes and self.request.memory is None and self.request.hardware != THIS,
            device.bandwidth,
            dict(device.rates),
            device.ridge(),
            self.request.hardware == THIS,
            dict(device.sources),
            device.instructions,
        )

    def _notes(self, order: Sequence[Candidate]) -> Iterator[str]:
        context = self.shape.context
        if context is not None and self.context > context:
            yield f"the model was made for {context} tokens, and {self.context} are asked for"
        measured = {candidate.kv: candidate.cache_quality for candidate in order if candidate.cache_quality is not None}
        for kv in sorted({candidate.kv for candidate in order} - {"F16", "BF16", "F32", *measured}):
            yield (
                f"what keys and values in {kv} cost is measured by bitwright evaluate FILE --against"
                f" {self.request.model} --kv {kv}"
            )
        for kv, found in sorted(measured.items()):
            yield (
                f"keys and values in {kv}: mean KL divergence {found.kld:.3g} nats a token with the weights of"
                f" {found.profile}, measured ({found.source})"
            )
        if any(candidate.runtime == "vLLM" and candidate.decode for candidate in order):
            yield (
                "vLLM's speeds rest on sums of kernels that were measured one by one, and on few whole runs: read them"
                " as upper ends"
            )
        if (why := self.source.without_vocabulary) is not None:
            yield f"the file of a GGUF is counted without its vocabulary: {why}"
        yield from self.source.model_map.notes


def _cells(runtime: Runtime) -> Cells:
    return LLAMA_CPP_CELLS if runtime == "llama.cpp" else VLLM_CELLS


def _scheme(priced: PricedPlan) -> str:
    """The family of the scheme that most weights are in, as the constants of vLLM are named."""
    return scheme_family(priced.formats[0]).lower() if priced.formats else "bf16"


def _decode_speed(step: StepTime, gpus: int) -> Speed:
    kind = "sums of kernels" if step.of_kernels else "measured runs"
    basis = f"{step.points} {kind} on {step.devices} devices"
    if gpus > 1:
        basis = f"{gpus} GPUs, which were not measured: from the speed of one of them to that of an ideal split"
    coverage = None if step.of_kernels or step.is_class else COVERAGE
    if step.is_class:
        return Speed(round_down(step.low), round_up(step.high), True, None, basis)
    return Speed(step.low, step.high, False, coverage, basis)


def _prefill_speed(prompt: PromptTime) -> Speed:
    return Speed(round_down(prompt.low), round_up(prompt.high), True, None, "the class of such devices")


_STEPS = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0, 10.0)


def round_down(value: float) -> float:
    """To the ends that classes have."""
    power = 10.0 ** floor(log10(value))
    return max(step for step in _STEPS if step * power <= value) * power


def round_up(value: float) -> float:
    power = 10.0 ** floor(log10(value))
    return min(step for step in _STEPS if step * power >= value) * power


def _corrected(candidate: Candidate, factor: float, request: Request) -> Candidate:
    """Its speed by the ratio of measured over predicted, in the narrower range that one measurement leaves; how many
    lie in it is known of one GPU."""
    if candidate.decode is None:
        return candidate
    low, high = measured_spread()
    seconds = candidate.step_seconds / factor
    predicted, ceiling = request.batch / seconds, request.batch / candidate.floor_seconds
    coverage = COVERAGE if request.gpus == 1 else None
    decode = Speed(predicted * low, min(predicted * high, ceiling), False, coverage, "a speed measured on this device")
    return replace(candidate, decode=decode, step_seconds=seconds)


def _run_options(runtime: Runtime, kv: str, gpus: int) -> str:
    """What the runtime has to be told for keys and values, and of several GPUs: llama.cpp takes all there are."""
    if runtime == "llama.cpp":
        return "" if kv == "F16" else f"-ctk {kv.lower()} -ctv {kv.lower()}"
    options = ["--kv-cache-dtype fp8"] if kv == "FP8" else []
    return " ".join([*options, *([f"--tensor-parallel-size {gpus}"] if gpus > 1 else [])])


def _answer(best: Candidate | None) -> dict[str, Any]:
    """The fields of a recommendation that are the best one's own."""
    if best is None:
        numbers = ("predicted_speedup", "predicted_time_us", "baseline_time_us", "memory_savings_pct", "kv_cache_bytes")
        return {
            "config": None,
            "mixed_precision": {},
            **dict.fromkeys(numbers),
            "expected_quality_loss": "nothing is recommended",
            "confidence": None,
            "bottleneck_analysis": (),
        }
    quality = best.quality
    loss = f"not measured; {quality.source}"
    if quality.kld is not None:
        loss = f"mean KL divergence {quality.kld:.3g} nats ({quality.kind}: {quality.source})"
    return {
        "config": best.profile,
        "mixed_precision": best.formats,
        "predicted_speedup": best.speed_up,
        "predicted_time_us": best.step_seconds * 1e6,
        "baseline_time_us": best.step_seconds * best.speed_up * 1e6,
        "memory_savings_pct": 100 * best.memory_savings,
        "kv_cache_bytes": best.kv_bytes,
        "expected_quality_loss": loss,
        "confidence": quality.confidence,
        "bottleneck_analysis": best.bottlenecks,
    }
