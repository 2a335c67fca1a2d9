"""A bundle through the public runtime; runs in this project's own environment."""

from serving import Heard, serve  # isort: skip  (first: it notes when this process began)

from visistage import runtime
from visistage.runtime.backends.onnx_runtime import ort


class BundleRunner:
    """A session whose answers have a fixed length."""

    def __init__(self, model, threads):
        self.session = runtime.load(model, threads=threads)
        self.session.eos = frozenset()
        self.about = {"onnxruntime": ort.__version__}

    def ask(self, image, question, text, new):
        """Answer; a session recognises an image by its pixels."""
        del text  # the session writes it itself
        answer = self.session.infer(image, question, max_tokens=new)
        times = answer.timings
        assert len(answer.tokens) == new, f"{answer.finish} after {len(answer.tokens)} tokens"
        return Heard(
            answer.plan.prompt_rows, list(answer.tokens), times.first_token_ms, times.per_token_ms
        )


if __name__ == "__main__":
    serve(BundleRunner)
