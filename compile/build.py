"""``build``: a checkpoint becomes a bundle, step by step.

checkpoint ─▶ plan ─▶ ranges (FP16) ─▶ weights ─▶ graphs ─▶ prefix ─▶ text files ─▶ manifest
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ..graphs.bundle import MANIFEST, Bundle, FileFact, GraphFact, Manifest, sha256
from ..graphs.precision import NARROW, Widening
from ..graphs.targets import resolve_target
from ..runtime.image.preprocessing import Preprocessing
from .build_spec import Blueprint, check_geometry, draw, versions
from .checkpoint.checkpoint import Checkpoint, open_checkpoint
from .export.export import Graph, export
from .export.prefix import describe_prefix, prefix_cache, write_prefix
from .export.static_shapes import variants_of, write_variant
from .export.texts import prompt_encoder, write_texts
from .export.weights import Placement, check_disk, convert, link_files, place
from .quantize.cache_scales import (
    cache_scales,
    describe_scales,
    rounded_rows,
    scale_spans,
    write_scales,
)
from .quantize.fp16_ranges import decide, measure, pieces, read_ranges, write_ranges
from .steps import Reporter, Silent, Workshop


def build(
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
    reporter: Reporter | None = None,
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
        reporter: told of every step.

    Raises:
        VisistageError: whatever the user can mend, before anything is written under the final name.
    """
    reporter = reporter or Silent()
    wanted, precision = resolve_target(target, precision)
    check_geometry(model, wanted, precision)
    reporter.start("open checkpoint", None)
    checkpoint = open_checkpoint(
        model,
        revision=revision,
        offline=offline,
        dummy_weights=dummy_weights,
        progress=reporter.advance,
    )
    blueprint = draw(
        checkpoint,
        plan=plan,
        target=wanted,
        precision=precision,
        contexts=contexts,
        build_memory=build_memory,
        calibration=calibration,
    )
    folder = Path(out) / checkpoint.name / blueprint.name
    workshop = Workshop(folder, _key(blueprint), reporter)
    if workshop.up_to_date() and not Bundle.open(folder).changed():
        return Bundle.open(folder)
    with workshop as work:
        _write(blueprint, work)
        work.finish()
    return Bundle.open(folder)


def _write(blueprint: Blueprint, work: Workshop) -> None:
    """Every step of a build, in the folder that becomes the bundle."""
    checkpoint, config, dtype = blueprint.checkpoint, blueprint.config, blueprint.dtype
    tell = work.reporter.advance
    blueprint.check_calibration()

    def ranges() -> list[str]:
        preprocessing = Preprocessing.from_dict(blueprint.texts.preprocessing)
        encoder = prompt_encoder(checkpoint)
        return write_ranges(measure(checkpoint, encoder, preprocessing, tell), work.folder)

    widening = NARROW
    if blueprint.half:
        work.step("ranges", ranges, total=pieces(config))
        widening = decide(read_ranges(work.folder))
    graphs, rounding = blueprint.graphs(widening), blueprint.rounding(widening)
    placement = place(checkpoint, [n for graph in graphs for n in graph.weights], dtype, rounding)
    blueprint.check_memory(placement.nbytes)
    check_disk(placement, work.folder)
    spans, scales = dict(placement.spans), None
    if blueprint.calibration is not None and blueprint.quantization.rounds_cache:
        scales = cache_scales(blueprint.calibration, half=blueprint.half)
        spans |= scale_spans(config.text, dtype)

    def weights() -> list[str]:
        converted = convert(checkpoint, placement, dtype, work.folder, tell, rounding)
        return [*link_files(placement, work.folder), *converted]

    def one_graph(graph: Graph) -> list[str]:
        file = f"{graph.name}.onnx"
        export(graph, config.text, work.folder / file, spans, blueprint.target)
        copies = _variants(graph, blueprint)
        for copy, slots in copies.values():
            write_variant(work.folder / file, work.folder / copy, slots)
        return [file, *(copy for copy, _ in copies.values())]

    def prefix() -> list[str]:
        cache = prefix_cache(checkpoint, blueprint.texts.prefix_ids, tell)
        if scales is not None:
            cache = rounded_rows(cache, scales)
        return write_prefix(cache, blueprint.cache_dtype, work.folder)

    work.step("weights", weights, total=placement.new_bytes or None)
    if scales is not None:
        work.step("cache scales", partial(write_scales, scales, dtype, work.folder))
    for graph in graphs:
        work.step(f"export {graph.name}", partial(one_graph, graph))
    if blueprint.texts.prefix_ids:
        work.step("prefix", prefix, total=config.text.layers)
    work.step("text files", lambda: write_texts(checkpoint, work.folder))
    work.step("manifest", lambda: _write_manifest(work, blueprint, graphs, placement, widening))


def _write_manifest(
    work: Workshop,
    blueprint: Blueprint,
    graphs: list[Graph],
    placement: Placement,
    widening: Widening,
) -> list[str]:
    """Hash every file and write the manifest that names them."""
    texts, text = blueprint.texts, blueprint.config.text
    facts = {}
    for name in (name for fact in work.facts for name in fact.files):
        file = work.folder / name
        facts[name] = FileFact(file.stat().st_size, sha256(file))
    manifest = Manifest(
        model=blueprint.checkpoint.name,
        config=blueprint.config,
        plan=blueprint.plan,
        target=blueprint.target.name,
        precision=blueprint.precision,
        dtype=blueprint.dtype,
        lowering=blueprint.target.lowering,
        graphs={graph.name: _fact(graph, blueprint) for graph in graphs},
        embedding=placement.embedding,
        prefix=describe_prefix(text, texts.prefix_ids, blueprint.cache_dtype)
        if texts.prefix_ids
        else None,
        preprocessing=texts.preprocessing,
        generation=texts.generation,
        text_files=texts.files,
        files=facts,
        versions=versions(),
        weight_bytes=placement.nbytes,
        source=blueprint.source,
        contexts=blueprint.contexts,
        widening=widening,
        quantization=blueprint.quantization,
        cache_scales=describe_scales(text, blueprint.dtype)
        if blueprint.quantization.rounds_cache
        else None,
    )
    (work.folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return [MANIFEST]


def _fact(graph: Graph, blueprint: Blueprint) -> GraphFact:
    variants = {context: file for context, (file, _) in _variants(graph, blueprint).items()}
    return GraphFact(f"{graph.name}.onnx", graph.spec, variants)


def _variants(graph: Graph, blueprint: Blueprint) -> dict[int, tuple[str, int | None]]:
    tokens = blueprint.config.visual_tokens
    return variants_of(graph, blueprint.target, blueprint.plan, tokens, blueprint.contexts)


def _key(blueprint: Blueprint) -> str:
    """What tells one build from another here: the source, and whether any input file changed."""
    checkpoint: Checkpoint = blueprint.checkpoint
    stamps = []
    for file in sorted(path for path in checkpoint.path.iterdir() if path.is_file()):
        status = file.stat()
        stamps.append([file.name, status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps([blueprint.source, stamps]).encode()).hexdigest()
