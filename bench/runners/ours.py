"""A bundle through the public runtime; runs in this project's own environment."""

from serving import Heard, serve  # isort: skip  (first: it notes when this process began)

import onnxruntime
from visistage import runtime


class BundleRunner:
    """A session whose answers end with their length, whatever they say."""

    def __init__(self, model, threads):
        self.session = runtime.load(model, threads=threads)
        self.session.eos = frozenset()
        self.about = {"onnxruntime": onnxruntime.__version__}

    def ask(self, picture, question, text, new):
        """Pictures are known again by their pixels, as anyone's would be."""
        del text  # the session writes it itself
        answer = self.session.infer(picture, question, max_tokens=new)
        times = answer.timings
        assert len(answer.tokens) == new, f"{answer.finish} after {len(answer.tokens)} tokens"
        return Heard(
            answer.plan.prompt_rows, list(answer.tokens), times.first_token_ms, times.per_token_ms
        )


if __name__ == "__main__":
    serve(BundleRunner)
