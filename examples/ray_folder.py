"""An example: python examples/ray_folder.py engines/demo/dense-fp32-cpu pictures "What is this?".

Asks about every image of a folder, by two processes of Ray Data (`pip install 'ray[data]'`), and
prints a line of JSON for each: answers, or why an image cannot be read.
"""

import json
import os
import sys

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # on import: its ports are at 127.0.0.1

import ray
from visistage import runtime


class Answerer:
    """A session in a process of its own."""

    def __init__(self, bundle, question):
        self.session, self.question = runtime.load(bundle, threads=1), question

    def __call__(self, row):
        """Return the answer about one file."""
        try:
            answer = self.session.infer(row["bytes"], self.question).text
        except runtime.VisistageError as error:
            return {"image": row["path"], "answer": "", "error": str(error)}
        return {"image": row["path"], "answer": answer, "error": ""}


bundle, folder, question = sys.argv[1:]
ray.init(include_dashboard=False)
files = ray.data.read_binary_files(folder, include_paths=True)
answers = files.map(Answerer, fn_constructor_args=(bundle, question), concurrency=2, num_cpus=1)
for row in answers.iter_rows():
    print(json.dumps(row))
