"""An example: python examples/ask.py engines photo.jpg "What is this?"."""

import sys

from visistage import runtime

with runtime.load(sys.argv[1]) as session:
    image = session.open(sys.argv[2])  # the image passes vision encoder and stage 0 once
    for question in sys.argv[3:]:
        answer = session.infer(image, question)
        print(f"{question} {answer} ({answer.timings.first_token_ms:.0f} ms to the first token)")
