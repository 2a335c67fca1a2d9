"""Bundles verified, and forged so that their hashes fit."""

from dataclasses import replace

from visistage.graphs.bundle import MANIFEST, Bundle, FileFact, sha256
from visistage.tools.verify.verify import verify
from visistage.tools.verify.verify_prompts import chosen

PLAN = "visipruner:shallow=1,t=1,e=2,keep=4"
STEPS = 6


def run(bundle, count=2, **options):
    return verify(bundle, chosen(bundle.manifest.model, None, count), max_tokens=STEPS, **options)


def statuses(report):
    return {record.name: record.status for record in report.rungs}


def failing(report):
    """Name and reason of the first rung that failed."""
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
    text = replace(bundle.manifest, **changes).to_json()
    (bundle.path / MANIFEST).write_text(text, encoding="utf-8")
    return Bundle.open(bundle.path)
