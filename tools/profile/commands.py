"""The same measurement with stock tools: a Polygraphy command for every graph or engine.

    polygraphy run stage0.onnx --trt --strongly-typed --trt-min-shapes ... --input-shapes ...

Graphs are strongly typed: their precision is in them, and no flag changes it. Integer inputs get
ranges that stay inside the cache, for a random slot number would write beside it; orders let every
row see every slot, which costs as much as any other mask.

Checked against Polygraphy 0.53.6 (``--gen-script``, in the tests).
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ...compile.engines.engine_spec import EngineSpec, Shape, engine_specs_of
from ...graphs.bundle import Bundle, Manifest
from ...graphs.contract import GraphSpec, TensorSpec, stage_of
from ...graphs.engine_index import ENGINES_FOLDER, Engines
from ...graphs.plan.call_cost import GraphCall
from ...graphs.targets import TENSORRT_RTX, find_target

ITERATIONS, WARM_UP = 50, 10
TIMING = ("--iterations", str(ITERATIONS), "--warm-up", str(WARM_UP), "--sequential-runners")
RTX = "POLYGRAPHY_USE_TENSORRT_RTX=1"
"""Environment that makes Polygraphy use TensorRT-RTX."""


@dataclass(frozen=True)
class Command:
    """What it measures, its arguments, and the environment variable that it needs, if any.

    To be typed in the bundle's folder.
    """

    about: str
    arguments: tuple[str, ...]
    environment: str = ""

    @property
    def text(self) -> str:
        """The line to type."""
        return " ".join([*filter(None, [self.environment]), *map(shlex.quote, self.arguments)])


def commands_of(bundle: Bundle, calls: Iterable[GraphCall] = ()) -> list[Command]:
    """Commands for every engine of a bundle, or for the graphs that ONNX Runtime runs.

    ``calls``: for ONNX Runtime, those whose shapes are wanted; engines have shapes of their own,
    and are compiled from their graphs where they were not yet.
    """
    manifest = bundle.manifest
    target = find_target(manifest.target)
    if not target.engines:
        provider = "cuda" if manifest.target == "cuda" else "cpu"
        return _graph_commands(manifest, calls, provider)
    environment = RTX if target.backend == TENSORRT_RTX else ""
    engines = Engines.open(bundle)
    compiled = {one.name: one.file for one in engines.engines} if engines else {}
    return [
        command
        for engine_spec in engine_specs_of(manifest)
        for command in _engine_commands(engine_spec, compiled.get(engine_spec.name), environment)
    ]


def _graph_commands(manifest: Manifest, calls: Iterable[GraphCall], provider: str) -> list[Command]:
    out = []
    for call in dict.fromkeys(calls):
        for name, fact in manifest.graphs.items():
            if name.split(".")[0] != call.graph:
                continue
            visual = manifest.config.visual_tokens
            sizes = {"B": 1, "Q": call.rows, "S": call.slots, "N": visual}
            if name.startswith("select"):
                sizes["N"] = manifest.plan.stages[stage_of(name)].visual_tokens
            shapes = {i.name: _sized(i, sizes) for i in fact.spec.inputs}
            rows = f", {call.rows} rows, {call.slots} slots" if call.slots else ""
            out.append(
                Command(
                    f"{name}{rows}",
                    (
                        *("polygraphy", "run", fact.file, "--onnxrt", "--providers", provider),
                        *("--input-shapes", *_shapes(shapes)),
                        *("--val-range", *_ranges(fact.spec, shapes)),
                        *TIMING,
                    ),
                )
            )
    return out


def _engine_commands(
    engine_spec: EngineSpec, engine: str | None, environment: str
) -> list[Command]:
    """One for every profile of an engine: decoding and prefill."""
    out = []
    for number, profile in enumerate(engine_spec.profiles):
        likely = {name: shapes[1] for name, shapes in profile.items()}
        arguments = ["polygraphy", "run"]
        if engine is not None:
            arguments += [f"{ENGINES_FOLDER}/{engine}", "--trt", "--model-type", "engine"]
        else:
            arguments += [engine_spec.source, "--trt", "--strongly-typed"]
            for each in engine_spec.profiles:
                for which, index in (("min", 0), ("opt", 1), ("max", 2)):
                    shapes = {name: sizes[index] for name, sizes in each.items()}
                    arguments += [f"--trt-{which}-shapes", *_shapes(shapes)]
        arguments += ["--optimization-profile", str(number)]
        arguments += ["--input-shapes", *_shapes(likely)]
        arguments += ["--val-range", *_ranges(engine_spec.spec, likely), *TIMING]
        rows = f", {likely['rows'][1]} rows" if "rows" in likely else ""
        what = "its engine" if engine is not None else "compiled first"
        out.append(Command(f"{engine_spec.name}{rows}, {what}", tuple(arguments), environment))
    return out


def _sized(spec: TensorSpec, sizes: Mapping[str, int]) -> Shape:
    return tuple(sizes[d] if isinstance(d, str) else d for d in spec.shape)


def _shapes(shapes: Mapping[str, Shape]) -> list[str]:
    return [f"{name}:[{','.join(map(str, shape))}]" for name, shape in shapes.items()]


def _ranges(spec: GraphSpec, shapes: Mapping[str, Shape]) -> list[str]:
    """Values of every input: small numbers, and integers that point to where something is."""
    slots = next((shapes[n][-1] for n in ("slot_order",) if n in shapes), 1)
    rows = shapes["rows"][1] if "rows" in shapes else 1
    highest = {
        "positions": rows - 1,
        "write_index": 0,
        "slot_order": 0,
        "visual_slots": slots - 1,
    }
    out = []
    for tensor in spec.inputs:
        if tensor.dtype.startswith("float"):
            low, high = (0, 1) if tensor.name == "gates" else (-1, 1)
        elif tensor.dtype == "int8":
            low, high = -127, 127
        elif tensor.name in ("order", "query_order"):
            low = high = slots
        else:
            low, high = 0, highest[tensor.name]
        out.append(f"{tensor.name}:[{low},{high}]")
    return out


def as_facts(commands: Sequence[Command]) -> list[dict[str, str]]:
    """Plain JSON form."""
    return [{"about": one.about, "command": one.text} for one in commands]
