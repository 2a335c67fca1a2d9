"""Verify toy bundles, and spoil them."""

from dataclasses import replace

import onnx
from visistage.graphs.bundle import MANIFEST, Bundle, FileFact, sha256
from visistage.tools.verify.verify import chosen, verify

PLAN = "visipruner:shallow=1,t=1,e=2,keep=4"
STEPS = 6


def run(bundle, count=2, **options):
    return verify(bundle, chosen(bundle.manifest.model, None, count), max_tokens=STEPS, **options)


def statuses(report):
    return {record.name: record.status for record in report.checks}


def failing(report):
    """Name and reason of the first check that failed."""
    assert report.failed is not None, statuses(report)
    return report.failed.name, report.failed.reason


def fix_hashes(bundle):
    """Note the files as they are now: what a careful forger would do."""
    files = {
        name: FileFact(bundle.file(name).stat().st_size, sha256(bundle.file(name)))
        for name in bundle.manifest.files
    }
    return rewrite(bundle, files=files)


def rewrite(bundle, **changes):
    """Change fields of the manifest."""
    text = replace(bundle.manifest, **changes).to_json()
    (bundle.path / MANIFEST).write_text(text, encoding="utf-8")
    return Bundle.open(bundle.path)


def change_graph(bundle, file, change):
    """Change a graph's file, and its hash."""
    path = bundle.file(file)
    model = onnx.load(path, load_external_data=False)
    change(model.graph)
    onnx.save(model, path)
    return fix_hashes(bundle)


def swap(*names):
    """Return a change of a graph that lets two initializers read each other's bytes."""

    def change(graph):
        pair = [tensor for tensor in graph.initializer if tensor.name in names]
        data = [list(tensor.external_data) for tensor in pair]
        for tensor, entries in zip(pair, reversed(data), strict=True):
            del tensor.external_data[:]
            tensor.external_data.extend(entries)

    return change
