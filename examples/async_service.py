"""An example: python examples/async_service.py engines "What is this?" photo.jpg ....

Answers in an asyncio program: one engine, as many questions at once as there are images, and each
answer as it comes. The engine calls `notify` in its own thread, which hands over to the loop's;
`submit` decodes the image, so it runs in a thread of the loop's pool. A task that is cancelled
cancels its answer.
"""

import asyncio
import sys
from pathlib import Path

from visistage import runtime
from visistage.graphs.bundle import Bundle, find_bundle


async def ask(engine, image, question, **settings):
    """Return the answer about an image, without keeping the loop from other work."""
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    def notify(ticket):
        loop.call_soon_threadsafe(changed.set)

    ticket = await asyncio.to_thread(engine.submit, image, question, notify=notify, **settings)
    try:
        while not ticket.over.is_set():
            await changed.wait()
            changed.clear()
    finally:
        ticket.cancel()  # an answer that is over stays as it is
    return ticket.wait()


async def main(bundle, question, *images):
    """Ask about all images at once, and print answers in the order in which they come."""

    async def about(image):
        answer = await ask(engine, image, question, max_tokens=20)
        print(f"{image}: {answer.text.strip()}", flush=True)

    with runtime.Engine(Bundle.open(find_bundle(Path(bundle))), lanes=4) as engine:
        await asyncio.gather(*map(about, images))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
