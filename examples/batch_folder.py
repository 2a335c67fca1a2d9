"""An example: python examples/batch_folder.py engines photos "What is this?" > answers.csv.

A line of CSV for every image of a folder and what is below it: its path, the answer, or why there
is none. Several questions are answered at once. For runs of hours there is `visistage infer
--jsonl`, which goes on where it was interrupted.
"""

import csv
import sys
from pathlib import Path

from visistage import runtime
from visistage.graphs.bundle import Bundle, find_bundle

AHEAD = 16  # images decoded before their turn: memory stays the same however many there are
KINDS = {".png", ".jpg", ".jpeg", ".webp"}

bundle, folder, question = sys.argv[1:]
table = csv.writer(sys.stdout)
table.writerow(["image", "answer", "error"])


def write(image, ticket):
    """Wait for an answer, and write its line."""
    try:
        table.writerow([image, ticket.wait().text.strip(), ""])
    except runtime.VisistageError as error:
        table.writerow([image, "", error])


with runtime.Engine(Bundle.open(find_bundle(Path(bundle))), lanes=4) as engine:
    waiting = []
    for image in sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in KINDS):
        try:
            waiting.append((image, engine.submit(image, question, max_tokens=20)))
        except runtime.VisistageError as error:
            table.writerow([image, "", error])
        if len(waiting) == AHEAD:
            write(*waiting.pop(0))
    for image, ticket in waiting:
        write(image, ticket)
