"""A bundle in an engine under several callers; runs in this project's own environment."""

from serving import Crowd, serve_crowds  # isort: skip  (first: it notes when this process began)

from visistage.graphs.bundle import Bundle
from visistage.runtime import Engine
from visistage.runtime.backends.onnx_runtime import ort


class EngineRunner:
    """An engine whose answers have a fixed length; images are new, so none is kept for later."""

    def __init__(self, model, threads, callers):
        self.engine = Engine(Bundle.open(model), lanes=callers, threads=threads, cache_bytes=0)
        self.engine.eos = frozenset()
        self.about = {"onnxruntime": ort.__version__}

    def crowd(self, questions, callers, new):
        """Answer them all."""
        crowd = Crowd(len(questions))

        def ask(number):
            image, question, _ = questions[number]
            answer = self.engine.submit(image, question, max_tokens=new).wait()
            crowd.note(number, answer.tokens, answer.timings.first_token_ms)

        return crowd.call(callers, ask)


if __name__ == "__main__":
    serve_crowds(EngineRunner)
