"""A bundle behind the server, asked over a socket; runs in this project's own environment.

The server, on whose stdout its address is, is a process apart: it is this file with two words more.
"""

from serving import Crowd, serve_crowds  # isort: skip  (first: it notes when this process began)

import base64
import http.client
import io
import json
import os
import subprocess
import sys
import threading
import time

from PIL import Image
from visistage.graphs.bundle import Bundle
from visistage.runtime.backends.onnx_runtime import ort
from visistage.serve.options import ServeOptions
from visistage.serve.pool import EnginePool
from visistage.serve.run import DrainingServer, listen, server_config
from visistage.serve.service import Service


class ServerRunner:
    """A server whose answers have a fixed length; it keeps no image for later.

    HTTP tells no ids: the text of an answer stands for each of its tokens. What the protocol says
    of memory and loading is the callers' process.
    """

    def __init__(self, model, threads, callers):
        command = [sys.executable, __file__, "serve", json.dumps([model, threads, callers])]
        self.server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.port = int(self.server.stdout.readline())
        self.about = {"onnxruntime": ort.__version__}

    def crowd(self, questions, callers, new):
        """Answer them all, in streams; files of images are written before the clock starts."""
        bodies = [body(image, question, new) for image, question, _ in questions]
        crowd = Crowd(len(questions))

        def ask(number):
            asked = time.perf_counter()
            connection = http.client.HTTPConnection("127.0.0.1", self.port)
            headers = {"content-type": "application/json"}
            connection.request("POST", "/v1/chat/completions", bodies[number], headers)
            response, pieces, first_ms, usage = connection.getresponse(), [], None, None
            for line in response:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    usage = event.get("usage") or usage
                    piece = event["choices"] and event["choices"][0]["delta"].get("content")
                    if piece:
                        first_ms = first_ms or (time.perf_counter() - asked) * 1e3
                        pieces.append(piece)
            connection.close()
            crowd.note(number, ["".join(pieces)] * usage["completion_tokens"], first_ms)

        return crowd.call(callers, ask)


def body(image, question, new):
    """Return a request about an image."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    asked = {"messages": [{"role": "user", "content": content}], "max_tokens": new}
    return json.dumps({**asked, "stream": True, "stream_options": {"include_usage": True}})


def serve(model, threads, callers):
    """Serve until stdin ends."""
    options = ServeOptions(port=0, threads=threads, lanes=callers)
    service = Service(EnginePool({"bench": Bundle.open(model)}, options), options)
    service.load_first()
    (engine,) = service.pool.loaded().values()
    engine.eos = frozenset()
    engine.prefixes.limit = engine.visual_rows.limit = 0
    listener = listen(options)
    server = DrainingServer(server_config(service), service)
    print(listener.getsockname()[1], flush=True)
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    server.run([listener])


def _end_with_stdin():
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(*json.loads(sys.argv[2]))
    else:
        serve_crowds(ServerRunner)
