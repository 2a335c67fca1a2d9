"""``make_bundle``: a checkpoint becomes a bundle, step by step.

checkpoint ─▶ plan ─▶ ranges (FP16) ─▶ weights ─▶ graphs ─▶ prefix ─▶ text files ─▶ manifest
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ..graphs.bundle import MANIFEST, Bundle, FileFact, GraphFact, Manifest, sha256
from ..graphs.precision import NO_FALLBACK, Fp32Fallback
from ..graphs.targets import resolve_target
from ..runtime.image.preprocessing import Preprocessing
from .build_spec import BuildSpec, check_geometry, resolve_build, versions
from .checkpoint.checkpoint import Checkpoint, open_checkpoint
from .export.export import Graph, export
from .export.prefix import describe_prefix, prefix_cache, write_prefix
from .export.static_shapes import variants_of, write_variant
from .export.texts import prompt_encoder, write_texts
from .export.weights import Placement, check_disk, convert, link_files, place
from .quantize.cache_scales import (
    calibrated_cache_scales,
    describe_scales,
    quantised_rows,
    scale_spans,
    write_scales,
)
from .quantize.fp16_ranges import decide, dense_pieces, measure_ranges, read_ranges, write_ranges
from .steps import BuildProgress, NoBuildProgress, Staging


def make_bundle(
    model: str,
    *,
    plan: str | None = None,
    target: str = "cpu",
    precision: str | None = None,
    out: str | Path = "engines",
    revision: str | None = None,
    offline: bool = False,
    dummy_weights: bool = False,
    contexts: Sequence[int] = (),
    build_memory: int | None = None,
    calibration: str | Path | None = None,
    progress: BuildProgress | None = None,
) -> Bundle:
    """Build the bundle of ``model`` in ``OUT/<model>/<plan>-<precision>-<target>/``.

    A build that is already there is left as it is; one that was interrupted goes on.

    Args:
        model: an alias, a hub id or a directory.
        plan: a preset, ``preset:key=value,...`` or a YAML file; None: the calibration's, or
            ``visipruner``.
        target: a name of ``targets.TARGETS``.
        precision: one the target runs, or a recipe (``graphs.quantization``); its default
            otherwise.
        out: folder of all bundles.
        revision: of a hub model.
        offline: use only what was downloaded before.
        dummy_weights: random weights of a published geometry.
        contexts: rows of an unpruned prompt and answer that engines shall have room for; several
            give several sets of engines. For targets with engines only.
        build_memory: bytes that compiling one engine may take; stages are cut into parts that
            do. For targets with engines only.
        calibration: folder that ``calibrate`` wrote; None: for quantised precisions
            ``calibrations/<model>``, where that is.
        progress: told of every step.

    Raises:
        VisistageError: whatever the user can mend, before anything is written under the final name.
    """
    progress = progress or NoBuildProgress()
    wanted, precision = resolve_target(target, precision)
    check_geometry(model, wanted, precision)
    progress.start("open checkpoint", None)
    checkpoint = open_checkpoint(
        model,
        revision=revision,
        offline=offline,
        dummy_weights=dummy_weights,
        progress=progress.advance,
    )
    build_spec = resolve_build(
        checkpoint,
        plan=plan,
        target=wanted,
        precision=precision,
        contexts=contexts,
        build_memory=build_memory,
        calibration=calibration,
    )
    folder = Path(out) / checkpoint.name / build_spec.name
    staging = Staging(folder, _key(build_spec), progress)
    if staging.up_to_date() and not Bundle.open(folder).changed():
        return Bundle.open(folder)
    with staging as work:
        _write(build_spec, work)
        work.finish()
    return Bundle.open(folder)


def _write(build_spec: BuildSpec, work: Staging) -> None:
    """Every step of a build, in the folder that becomes the bundle."""
    checkpoint, config, dtype = build_spec.checkpoint, build_spec.config, build_spec.dtype
    advance = work.progress.advance
    build_spec.check_calibration()

    def ranges() -> list[str]:
        preprocessing = Preprocessing.from_dict(build_spec.texts.preprocessing)
        encoder = prompt_encoder(checkpoint)
        return write_ranges(
            measure_ranges(checkpoint, encoder, preprocessing, advance), work.folder
        )

    fallback = NO_FALLBACK
    if build_spec.half:
        work.step("ranges", ranges, total=dense_pieces(config))
        fallback = decide(read_ranges(work.folder))
    graphs, quantised_tensors = build_spec.graphs(fallback), build_spec.quantised_tensors(fallback)
    placement = place(
        checkpoint, [n for graph in graphs for n in graph.weights], dtype, quantised_tensors
    )
    build_spec.check_memory(placement.nbytes)
    check_disk(placement, work.folder)
    spans, scales = dict(placement.spans), None
    if build_spec.calibration is not None and build_spec.quantization.quantises_cache:
        scales = calibrated_cache_scales(build_spec.calibration, half=build_spec.half)
        spans |= scale_spans(config.text, dtype)

    def weights() -> list[str]:
        converted = convert(checkpoint, placement, dtype, work.folder, advance, quantised_tensors)
        return [*link_files(placement, work.folder), *converted]

    def one_graph(graph: Graph) -> list[str]:
        file = f"{graph.name}.onnx"
        export(graph, config.text, work.folder / file, spans, build_spec.target)
        copies = _variants(graph, build_spec)
        for copy, slots in copies.values():
            write_variant(work.folder / file, work.folder / copy, slots)
        return [file, *(copy for copy, _ in copies.values())]

    def prefix() -> list[str]:
        cache = prefix_cache(checkpoint, build_spec.texts.prefix_ids, advance)
        if scales is not None:
            cache = quantised_rows(cache, scales)
        return write_prefix(cache, build_spec.cache_dtype, work.folder)

    work.step("weights", weights, total=placement.new_bytes or None)
    if scales is not None:
        work.step("cache scales", partial(write_scales, scales, dtype, work.folder))
    for graph in graphs:
        work.step(f"export {graph.name}", partial(one_graph, graph))
    if build_spec.texts.prefix_ids:
        work.step("prefix", prefix, total=config.text.layers)
    work.step("text files", lambda: write_texts(checkpoint, work.folder))
    work.step("manifest", lambda: _write_manifest(work, build_spec, graphs, placement, fallback))


def _write_manifest(
    work: Staging,
    build_spec: BuildSpec,
    graphs: list[Graph],
    placement: Placement,
    fallback: Fp32Fallback,
) -> list[str]:
    """Hash every file and write the manifest that names them."""
    texts, text = build_spec.texts, build_spec.config.text
    facts = {}
    for name in (name for fact in work.facts for name in fact.files):
        file = work.folder / name
        facts[name] = FileFact(file.stat().st_size, sha256(file))
    manifest = Manifest(
        model=build_spec.checkpoint.name,
        config=build_spec.config,
        plan=build_spec.plan,
        target=build_spec.target.name,
        precision=build_spec.precision,
        dtype=build_spec.dtype,
        lowering=build_spec.target.lowering,
        graphs={graph.name: _fact(graph, build_spec) for graph in graphs},
        embedding=placement.embedding,
        prefix=describe_prefix(text, texts.prefix_ids, build_spec.cache_dtype)
        if texts.prefix_ids
        else None,
        preprocessing=texts.preprocessing,
        generation=texts.generation,
        text_files=texts.files,
        files=facts,
        versions=versions(),
        weight_bytes=placement.nbytes,
        source=build_spec.source,
        contexts=build_spec.contexts,
        fallback=fallback,
        quantization=build_spec.quantization,
        cache_scales=describe_scales(text, build_spec.dtype)
        if build_spec.quantization.quantises_cache
        else None,
    )
    (work.folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return [MANIFEST]


def _fact(graph: Graph, build_spec: BuildSpec) -> GraphFact:
    variants = {context: file for context, (file, _) in _variants(graph, build_spec).items()}
    return GraphFact(f"{graph.name}.onnx", graph.spec.inputs, graph.spec.outputs, variants=variants)


def _variants(graph: Graph, build_spec: BuildSpec) -> dict[int, tuple[str, int | None]]:
    tokens = build_spec.config.visual_tokens
    return variants_of(graph, build_spec.target, build_spec.plan, tokens, build_spec.contexts)


def _key(build_spec: BuildSpec) -> str:
    """What tells one build from another here: the source, and whether any input file changed."""
    checkpoint: Checkpoint = build_spec.checkpoint
    stamps = []
    for file in sorted(path for path in checkpoint.path.iterdir() if path.is_file()):
        status = file.stat()
        stamps.append([file.name, status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps([build_spec.source, stamps]).encode()).hexdigest()
