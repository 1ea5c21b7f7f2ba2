"""A chat page in plain HTML, from the same address as the model it talks to.

Run:  python examples/chat_page.py --stay      and open the address it prints; Ctrl-C ends it
      python examples/chat_page.py             asks one question as the page would, and ends
"""

import argparse
import json
import signal
import threading
import urllib.request
from pathlib import Path

from fastapi.responses import FileResponse

from blockrag import BlockModel
from blockrag.server import ServerSettings, create_app, listen, serve

PAGE = Path(__file__).with_suffix(".html")
QUESTION = {
    "messages": [{"role": "user", "content": "What is the capital of Bhutan?"}],
    "documents": [{"title": "Bhutan", "text": "The capital of Bhutan is Thimphu."}],
}


def ask(url: str) -> None:
    """Fetch the page, ask a question, and stop the server."""
    try:
        with urllib.request.urlopen(url) as page:
            print(f"the page has {len(page.read()):,} bytes")
        request = urllib.request.Request(
            f"{url}v1/chat/completions", json.dumps(QUESTION).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as reply:
            print("answer:", json.load(reply)["choices"][0]["message"]["content"])
    finally:
        signal.raise_signal(signal.SIGINT)


def main() -> None:
    """Serve the model and, beside it, the page."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--stay", action="store_true", help="serve until Ctrl-C")
    arguments.add_argument("--model", default="demo")
    arguments.add_argument("--port", type=int, default=0)
    given = arguments.parse_args()

    app = create_app(BlockModel.from_pretrained(given.model), ServerSettings(model_name=given.model))
    app.get("/")(lambda: FileResponse(PAGE))
    bound = listen("127.0.0.1", given.port)
    url = f"http://127.0.0.1:{bound.getsockname()[1]}/"
    print(f"serving {given.model} at {url}", flush=True)
    asking = threading.Thread(target=ask, args=[url], daemon=True)
    serve(app, bound, on_ready=None if given.stay else asking.start)


if __name__ == "__main__":
    main()
