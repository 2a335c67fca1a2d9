"""The contents of a bundle: model, plan, graphs with their tensors, sizes, and its caches."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from ...graphs.bundle import Bundle, GraphFact, Manifest
from ...graphs.caches import is_cache, stage_caches
from ...graphs.contract import TensorSpec
from ...graphs.fields import to_json
from ...graphs.precision import ALWAYS
from ...pages.units import show_bytes
from ...runtime.text.generation import GenerationRules
from ...runtime.text.sampling import Sampling
from .plan_view import left_out
from .precision_view import quantisation_facts, quantisation_rows

INSPECT_QUESTION_ROWS = 40
"""Text rows of the prompt that cache sizes are stated for, besides the prefix and one image."""


def bundle_facts(bundle: Bundle) -> dict[str, Any]:
    """Everything that ``visistage inspect`` shows, as JSON."""
    manifest = bundle.manifest
    text, plan = manifest.config.text, manifest.plan
    prefix = len(manifest.prefix.ids) if manifest.prefix else 0
    cached = text.kv_heads * text.head_dim * manifest.cache_element_bytes
    stages = []
    for stage, caches in zip(plan.stages, stage_caches(plan), strict=True):
        rows = prefix + stage.visual_tokens + INSPECT_QUESTION_ROWS
        stages.append(
            {
                "layers": list(stage.layers),
                "visual_tokens": stage.visual_tokens,
                "frozen": to_json(stage.frozen),
                "drop_attention": list(stage.drop_attention),
                "drop_mlp": list(stage.drop_mlp),
                "kv_bytes_per_row": cached * len(caches),
                "kv_bytes_per_prompt": cached * len(caches) * rows,
            }
        )
    return {
        "path": str(bundle.path),
        "model": manifest.model,
        "plan": {
            "name": plan.name,
            "hash": plan.hash,
            "note": plan.note,
            "entry": to_json(plan.entry) if plan.entry else None,
            "routing": to_json(plan.routing) if plan.routing else None,
        },
        "target": manifest.target,
        "precision": manifest.precision,
        "dtype": manifest.dtype,
        "quantization": quantisation_facts(manifest),
        "lowering": manifest.lowering,
        "widening": to_json(manifest.fallback),
        "layers": text.layers,
        "visual_tokens": manifest.config.visual_tokens,
        "canvas": manifest.config.canvas,
        "context": text.max_positions,
        "prefix_rows": prefix,
        "question_rows": INSPECT_QUESTION_ROWS,
        "generation": _generation(manifest),
        "stages": stages,
        "graphs": {
            name: {
                "file": fact.file,
                "nbytes": manifest.files[fact.file].nbytes if fact.file in manifest.files else None,
                **to_json(fact.spec),
            }
            for name, fact in manifest.graphs.items()
        },
        "weight_bytes": manifest.weight_bytes,
        "bundle_bytes": sum(fact.nbytes for fact in manifest.files.values()),
        "versions": dict(manifest.versions),
        "source": manifest.source,
    }


def bundle_table(bundle: Bundle) -> RenderableType:
    """Tabulate the same facts."""
    facts = bundle_facts(bundle)
    head = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    head.add_column(style="dim")
    head.add_column()
    plan, prefix, staged = facts["plan"], facts["prefix_rows"], bundle.manifest.plan
    for name, value in (
        ("bundle", facts["path"]),
        ("model", f"{facts['model']}, {facts['layers']} layers, context {facts['context']}"),
        ("images", _images(facts)),
        ("plan", f"{plan['name']} {plan['hash'][:12]}"),
        ("", plan["note"]),
        ("", staged.entry.summary(facts["visual_tokens"]) if staged.entry else ""),
        ("", staged.routing.summary if staged.routing else ""),
        *(("", line) for line in left_out(staged)),
        ("target", f"{facts['target']}, {facts['precision']}, lowering {facts['lowering']}"),
        *quantisation_rows(facts["quantization"]),
        ("in FP32", _always(bundle)),
        *(("", str(reason)) for reason in bundle.manifest.fallback.reasons),
        ("answers", _answers(facts["generation"])),
        ("prefix", f"{prefix} rows, computed when the bundle was built" if prefix else "none"),
        ("weights", show_bytes(facts["weight_bytes"])),
        ("files", show_bytes(facts["bundle_bytes"])),
        ("built with", ", ".join(f"{n} {v}" for n, v in facts["versions"].items())),
    ):
        if value:
            head.add_row(name, value)
    return Group(head, _stage_table(facts), _graph_table(bundle))


def _images(facts: dict[str, Any]) -> str:
    """Say what size every image is brought to, if to any."""
    if facts["canvas"] is None:
        return ""
    size = "{}x{}".format(*facts["canvas"])
    return f"all on a canvas of {size} (height x width): {facts['visual_tokens']} visual tokens"


def _generation(manifest: Manifest) -> dict[str, Any]:
    """Return what a question that says nothing of it is answered with, as the checkpoint has it."""
    rules = GenerationRules.read(manifest.generation, manifest.config.text.vocab)
    sampling = {name: value for name, value in to_json(rules.sampling).items() if name != "seed"}
    return {"sampling": sampling, "eos": sorted(rules.eos), "stop": list(rules.stops)}


def _answers(generation: dict[str, Any]) -> str:
    """Name the settings that do something, and the ends of an answer."""
    given, plain = generation["sampling"], to_json(Sampling())
    words = ["drawn" if given["temperature"] else "greedy"]
    words += [f"{name} {value:g}" for name, value in given.items() if value != plain[name]]
    ends = ", ".join([*map(str, generation["eos"]), *map(repr, generation["stop"])])
    return f"{', '.join(words)}; end at {ends}: what a question does not set"


def _always(bundle: Bundle) -> str:
    """Name what an FP16 bundle computes in FP32 whatever the checkpoint."""
    return "" if bundle.manifest.dtype == "float32" else ", ".join(ALWAYS)


def _stage_table(facts: dict[str, Any]) -> Table:
    rows = f"{facts['prefix_rows']} + visual + {facts['question_rows']} rows"
    table = Table("stage", "layers", "visual tokens", "cache per row", f"cache of {rows}")
    for column in table.columns:
        column.justify = "right"
    for index, stage in enumerate(facts["stages"]):
        start, stop = stage["layers"]
        table.add_row(
            str(index),
            f"{start}-{stop - 1}" if stop - start > 1 else str(start),
            str(stage["visual_tokens"]),
            show_bytes(stage["kv_bytes_per_row"]),
            show_bytes(stage["kv_bytes_per_prompt"]),
        )
    return table


def _graph_table(bundle: Bundle) -> Table:
    table = Table("graph", "size", "inputs", "outputs")
    table.columns[1].justify = "right"
    for name, fact in bundle.manifest.graphs.items():
        size = bundle.manifest.files.get(fact.file)
        inputs, outputs = _tensors(fact)
        table.add_row(name, show_bytes(size.nbytes) if size else "?", inputs, outputs)
    return table


def _tensors(fact: GraphFact) -> tuple[str, str]:
    return _listed(fact.spec.inputs), _listed(fact.spec.outputs)


def _listed(specs: tuple[TensorSpec, ...]) -> str:
    """One line each; the caches, two for every layer, as one line."""
    cached = [spec for spec in specs if is_cache(spec.name)]
    lines = [_line(spec) for spec in specs if spec not in cached]
    if cached:
        first, last = cached[0], cached[-1]
        lines.append(_line(first))
        if last != first:
            lines.append(f"  ... {last.name} ({len(cached)} in all)")
    return "\n".join(lines)


def _line(spec: TensorSpec) -> str:
    return f"{spec.name} {spec.dtype} [{', '.join(map(str, spec.shape))}]"
