"""What is wrong with a recipe for this model, and what is legal but probably not meant; known before work starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.architecture import Architecture, Dimensions
from compress.calibration.overlap import LIMIT
from compress.calibration.window_specs import WindowSpec
from compress.checkpoints.formats import FORMATS, able
from compress.checkpoints.formats.fusing import fused_that_differ
from compress.checkpoints.formats.gguf import BLOCK, type_of
from compress.checkpoints.formats.gguf_tokenizer import vocabulary_of
from compress.checkpoints.formats.support import BNB_ON_AVX512, limits_of, unserved
from compress.evaluation.specs import OnText
from compress.gates import NonInferiorityGate
from compress.quantization.scheme import Scheme
from compress.quantization.super_blocks import K_QUANTS
from compress.recipe import Recipe
from compress.stages import Awq, Gptq, Recover, SmoothQuant, Sparsify
from compress.stages.mixed_precision import MixedPrecision
from compress.stages.quantize import QuantizeStage
from compress.stages.smooth import ScalingStage
from compress.steps.power import Power
from compress.steps.precision import out_of_order
from compress.steps.shapes import Shape, Shapes
from compress.steps.training import nothing_to_train


def mistakes_of(recipe: Recipe, shapes: Shapes) -> list[str]:
    architecture, dimensions = shapes.source.architecture, shapes.source.dimensions
    found = [
        f"{recipe.place(index)}: {sentence}"
        for index, (stage, shape) in enumerate(zip(recipe.stages, shapes.before, strict=True))
        for sentence in stage.check(shape.of(stage), architecture)
    ]
    found += _fused_that_differ(recipe, shapes)
    found += _rounded_twice(recipe, shapes)
    found += out_of_order(recipe)
    found += nothing_to_train(recipe, shapes)
    if not any(stage.plans_precision for stage in recipe.stages):
        schemes: dict[str, Scheme] = {}
        for stage, shape in zip(recipe.stages, shapes.before, strict=True):
            schemes |= stage.schemes(shape.of(stage))
        found += format_mistakes(recipe, shapes.last, schemes)
    if dimensions.max_context:
        texts: list[tuple[str, WindowSpec]] = [("calibration", recipe.calibration)] if recipe.calibration else []
        texts += [
            (f"evaluation[{index}]", spec) for index, spec in enumerate(recipe.evaluation) if isinstance(spec, OnText)
        ]
        found += [
            f"{where}.window_tokens: {spec.window_tokens} is more than the model's context of {dimensions.max_context}"
            for where, spec in texts
            if spec is not None and spec.window_tokens > dimensions.max_context
        ]
    # A stage that another implies repeats what is said of that one.
    return list(dict.fromkeys(found))


def _fused_that_differ(recipe: Recipe, shapes: Shapes) -> list[str]:
    """Parts of a fused matrix to which a stage gives schemes of their own, where the format's runtimes fuse them."""
    if not FORMATS[recipe.export.format].fuses:
        return []
    return [
        f"{recipe.place(index)}: {parts}: serving runtimes fuse these into one matrix, so they must share one scheme. "
        "Extend the pattern to all of them, or choose gguf or plain, whose readers fuse nothing."
        for index, (stage, shape) in enumerate(zip(recipe.stages, shapes.before, strict=True))
        if isinstance(stage, QuantizeStage)
        for parts in fused_that_differ(stage.schemes(shape.of(stage)), shape.of(stage), shapes.source.architecture)
    ]


def _rounded_twice(recipe: Recipe, shapes: Shapes) -> list[str]:
    """Stages that round an embedding or a head which one before them has rounded."""
    found, seen = [], dict[str, int]()
    for index, (stage, shape) in enumerate(zip(recipe.stages, shapes.before, strict=True)):
        if not stage.on_vocabulary:
            continue
        for module in stage.schemes(shape.vocabulary):
            if module in seen:
                before = recipe.place(seen[module])
                found.append(f"{recipe.place(index)}: {module} was rounded by {before} already; leave one out")
            seen.setdefault(module, index)
    return found


def format_mistakes(recipe: Recipe, last: Shape, schemes: dict[str, Scheme]) -> list[str]:
    """What the export's format cannot hold of the result, with the formats that can."""
    shapes = last.everything
    schemes = {module: scheme for module, scheme in schemes.items() if module in shapes}
    format_ = FORMATS[recipe.export.format]
    # Groups that divide no row are said by the stage, and no format can size them.
    if any(not scheme.divides(shapes[module][1]) for module, scheme in schemes.items()):
        return []
    found = format_.mistakes(schemes, shapes, last.architecture) + format_.refuses_config(last.config)
    if not format_.keeps_kv_scales and any(stage.kv_bytes for stage in recipe.stages):
        able_ = [name for name, each in FORMATS.items() if each.keeps_kv_scales]
        return [f"export.format: {format_.name} has no place for scales of a KV cache; {', '.join(able_)} has"]
    if not found:
        return []
    others = [
        name for name in able(schemes, shapes, last.architecture) if not FORMATS[name].refuses_config(last.config)
    ]
    can = f"Formats that can: {', '.join(others)}" if others else "No format can"
    return [f"export.format: {sentence}. {can}" for sentence in found]


def blocks_that_may_not_fit(recipe: Recipe, shapes: Shapes, stored_bytes: int) -> list[str]:
    """Stages that choose blocks by measuring, where the format cannot hold every choice."""
    format_ = FORMATS[recipe.export.format]
    found = []
    for index, (stage, shape) in enumerate(zip(recipe.stages, shapes.before, strict=True)):
        others = stage.other_configs(shape.config, stored_bytes)
        refused = [sentence for config in others for sentence in format_.refuses_config(config)]
        if refused:
            found.append(
                f"{recipe.place(index)}: which blocks go is measured, and not every choice fits the format: "
                f"{refused[0]}. The export then refuses the model"
            )
    return found


def quantised_before(config: Mapping[str, Any]) -> bool:
    """Whether a folder's config says that linears are quantised, not only caches."""
    section = config.get("quantization_config") or {}
    return bool(section.get("quant_method")) and bool(section.get("config_groups", True))


def warnings_of(
    recipe: Recipe,
    config: Mapping[str, Any],
    schemes: dict[str, Scheme],
    shapes: dict[str, tuple[int, int]],
    architecture: Architecture,
    dimensions: Dimensions,
) -> list[str]:
    """Legal, but probably not what is wanted."""
    found = [
        f"task {spec.label}: its items are known once lm-eval has loaded them; time and memory are predicted without it"
        for spec in recipe.tasks
        if spec.file is None
    ]
    found += _same_text(recipe)
    found += _wide_margins(recipe)
    found += _zeros(recipe)
    found += _scaled_for_nobody(recipe)
    found += _codes_that_stay(recipe)
    if recipe.export.format == "gguf" and any(
        scheme.grid == "int" and not scheme.symmetric and not scheme.of_super_blocks for scheme in schemes.values()
    ):
        found.append("gguf keeps a minimum of any value: zero_points: free is less error in the same bytes")
    if recipe.export.format == "gguf":
        found += _bits_that_gguf_widens(schemes) + _groups_that_gguf_splits(schemes, shapes)
        found += _tokenizer_that_gguf_leaves_out(recipe, config)
    if recipe.stages and quantised_before(config):
        found.append(
            "the source's weights were quantised before: their values are taken, and what is measured against them "
            "flatters methods on their old grid; `rescale` under model moves them off it"
        )
    has_scales = bool((config.get("quantization_config") or {}).get("kv_cache_scheme"))
    if has_scales and recipe.stages and not any(stage.kv_bytes for stage in recipe.stages):
        found.append("the source's scales of an fp8 KV cache are left behind; a kv_cache stage makes new ones")
    if recipe.stages and recipe.stages[0].training:
        found.append(
            "stages[0]: it trains a model against the source that it still is; put it behind a stage that changes it"
        )
    lacks = FORMATS[recipe.export.format].loader_lacks()
    if lacks:
        found.append(
            f"export.format {recipe.export.format}: its public loader needs {' and '.join(lacks)}, not installed here: "
            "no round trip is made, and what is judged is our own reading of the files"
        )
    found += unserved("vLLM", recipe.export.format, schemes, shapes)
    found += _mixed_inside_what_vllm_fuses(recipe, architecture)
    if any(scheme.grid != "int" for scheme in schemes.values()):
        found += unserved(BNB_ON_AVX512, recipe.export.format, schemes, shapes)
    found += limits_of("vLLM", recipe.export.format, schemes)
    if dimensions.max_context and recipe.export.context > dimensions.max_context:
        found.append(f"export.context {recipe.export.context} is more than the model's {dimensions.max_context} tokens")
    if not architecture.float16_safe and recipe.export.dtype == "float16":
        found.append(f"{architecture.model_type} activations are known to leave float16's range; bfloat16 is safer")
    return found


def _mixed_inside_what_vllm_fuses(recipe: Recipe, architecture: Architecture) -> list[str]:
    """That a mixture for a runtime that fuses nothing is not for vLLM, which reads the same format."""
    if not (FORMATS[recipe.export.format].fuses and architecture.fused):
        return []
    return [
        f"{recipe.place(index)}: runtime {stage.runtime}: q, k, v and gate, up may get schemes of their own, and vLLM, "
        "which fuses them, will not serve that; for vLLM, choose runtime: vllm"
        for index, stage in enumerate(recipe.stages)
        if isinstance(stage, MixedPrecision) and not stage.fuses
    ]


def _same_text(recipe: Recipe) -> list[str]:
    """Sets that are judged on the text that is calibrated on. Whether they overlap is known once windows are drawn."""
    if recipe.calibration is None or not any(stage.needs_calibration for stage in recipe.stages):
        return []
    same = [spec.set_name for spec in recipe.on_text if spec.data == recipe.calibration.data]
    return [
        f"set {name}: it is the calibration text too; a run ends where more than {LIMIT:.0%} of what is judged on was "
        "calibrated on"
        for name in dict.fromkeys(same)
    ]


def _scaled_for_nobody(recipe: Recipe) -> list[str]:
    """Channels scaled for a quantiser that does not follow, or that rounds otherwise than they were scaled for."""
    found = []
    for index, stage in enumerate(recipe.stages):
        if not isinstance(stage, ScalingStage):
            continue
        where, kind = f"{recipe.place(index)}: ", recipe.stages[index].model_dump()["kind"]
        after = next((each for each in recipe.stages[index + 1 :] if isinstance(each, QuantizeStage)), None)
        if isinstance(stage, Awq) and isinstance(after, Gptq):
            found.append(where + "awq before gptq was measured to be worse than gptq alone; docs/benchmarks/w8a8.md")
        if after is None:
            found.append(where + f"{kind} changes what quantising costs, and nothing quantises after it")
        elif isinstance(stage, SmoothQuant) and after.inputs != "int8":
            found.append(where + "smoothquant is for inputs: int8, and the stage that quantises after it has none")
        elif isinstance(stage, Awq) and (
            after.k_quant or (after.bits, after.group_size) != (stage.bits, stage.group_size)
        ):
            given = "K-quants" if after.k_quant else f"bits {after.bits}, group_size {after.group_size}"
            found.append(
                where + f"awq scales for bits {stage.bits}, group_size {stage.group_size}; after it come {given}"
            )
    return found


WAY_FOR_CODES = 0.55
"""Codes that a code has to be able to come for training to gain by it: docs/adr/0018-structured-pruning.md."""


def _codes_that_stay(recipe: Recipe) -> list[str]:
    """Codes trained in fewer steps, or with smaller ones, than it takes to move them."""
    found = []
    for index, stage in enumerate(recipe.stages):
        text = recipe.calibration
        if isinstance(stage, Recover) and stage.train == "codes" and text is not None:
            way = stage.way_of_codes(text.all_windows, text.window_tokens)
            if way < WAY_FOR_CODES:
                steps = stage.steps(text.all_windows, text.window_tokens)
                found.append(
                    f"{recipe.place(index)}: in {steps} steps at a learning rate of {stage.learning_rate:g} recover "
                    f"moves a code by {way:.2g} at most, and it takes {WAY_FOR_CODES} (some 55 steps at 0.001); take "
                    "more calibration windows or epochs, or train: scales+norms, behind quality: max in a recover "
                    "stage of its own"
                )
    return found


def _bits_that_gguf_widens(schemes: Mapping[str, Scheme]) -> list[str]:
    """Codes that are stored in a type with more bits than they have."""
    found = []
    for scheme in dict.fromkeys(schemes.values()):
        kind = type_of(scheme)
        if kind and not scheme.k_quant and int(kind[1]) > scheme.bits:
            said = f"gguf keeps {scheme.label} as {kind}, in as many bytes as {kind[1]} bits"
            found.append(said + "; k_quant: true does not" * (scheme.bits in K_QUANTS))
    return found


def _groups_that_gguf_splits(schemes: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """Scales of more columns than a block has, which is stored with one each."""
    wide = [
        module
        for module, scheme in schemes.items()
        if type_of(scheme) and not scheme.k_quant and scheme.width(shapes[module][1]) > BLOCK
    ]
    if not wide:
        return []
    more = f" and {len(wide) - 1} more" if len(wide) > 1 else ""
    return [
        f"gguf stores a scale for each {BLOCK} columns whatever the group size: group_size {BLOCK} is less error in "
        f"the same bytes ({wide[0]}{more})"
    ]


def _tokenizer_that_gguf_leaves_out(recipe: Recipe, config: Mapping[str, Any]) -> list[str]:
    """Why the file of a model in a folder will take token ids only. A model from elsewhere is not there yet."""
    folder = recipe.model.path
    if folder is None or not folder.is_dir():
        return []
    try:
        reason = vocabulary_of(folder, int(config["vocab_size"])).left_out
    except (ValueError, LookupError, TypeError, AttributeError):
        return []  # of a damaged tokenizer the run tells, which reads it
    return [f"{reason}: llama.cpp ends when it is given text (event tokenizer_left_out)"] if reason else []


def _zeros(recipe: Recipe) -> list[str]:
    """What zeros among weights are worth, and what undoes them."""
    found = []
    for index, stage in enumerate(recipe.stages):
        if isinstance(stage, Sparsify):
            where = recipe.place(index)
            said = f"{where}: sparsify makes nothing smaller or faster: zeros are stored as other weights are"
            changing = [each.kind for each in recipe.stages[index + 1 :] if not isinstance(each, Sparsify)]
            if changing:
                said += f"; and {', '.join(dict.fromkeys(changing))} after it will not keep them zero"
            found.append(said)
    return found


WIDEST = {"perplexity": 0.5, "divergence": 1.0, "task": 0.25}
"""Margins beyond which a gate is most likely not meant: half as much perplexity again, a nat, 25 points."""


def _wide_margins(recipe: Recipe) -> list[str]:
    """Margins that look like percent or points written as whole numbers."""
    return [
        f"{gate.measure}: a margin of {gate.margin:g} lets {_as_words(gate)} pass; is {gate.margin / 100:g} meant?"
        for gate in recipe.gates
        if isinstance(gate, NonInferiorityGate) and gate.margin > WIDEST[gate.measure.partition(".")[0]]
    ]


def _as_words(gate: NonInferiorityGate) -> str:
    kind = gate.measure.partition(".")[0]
    if kind == "divergence":
        return f"a mean KL of {gate.margin:g} nats"
    lost = f"{100 * gate.margin:g}"
    return f"{lost} % more perplexity" if kind == "perplexity" else f"{lost} points of accuracy lost"


def weak_gates(gate_powers: list[Power]) -> list[str]:
    """Gates that will most likely not be decided."""
    return [
        f"{power.measure}: {_can_decide(power)}: expect inconclusive. Take more of them, or a wider margin"
        for power in gate_powers
        if not power.suffices
    ]


def _can_decide(power: Power) -> str:
    if power.smallest_margin is None:
        return f"{power.units} pass only a model far below the margin {power.margin:g}"
    return f"{power.units} resolve margins from {power.smallest_margin:.3g} up, the gate's is {power.margin:g}"
