"""A process that serves a local model behind OpenAI's chat format: one request at a time, greedy, whole answers.

    python bench/_chat_endpoint.py smollm2

Prints the port that it listens on, then serves until its standard input ends, as it does when its parent is killed.
"""

import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import torch

from spider_sense.models import LoadedModel, load_model


def serve(loaded: LoadedModel) -> None:
    """Serve a model at a free port of this machine, until standard input ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body = json.dumps(_completion(loaded, request)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
            """Say nothing."""

    def end_with_parent() -> None:
        sys.stdin.read()
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
    server = HTTPServer(("127.0.0.1", 0), Handler)
    sys.stdout.write(f"{server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever()


@torch.inference_mode()
def _completion(loaded: LoadedModel, request: dict[str, Any]) -> dict[str, Any]:
    tokenizer, model = loaded.tokenizer, loaded.model
    inputs = tokenizer.apply_chat_template(
        request["messages"], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    prompt = inputs["input_ids"].shape[1]
    output: Any = model.generate(
        **inputs, max_new_tokens=request.get("max_tokens", 64), do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    answer = output[0, prompt:]
    message = {"role": "assistant", "content": tokenizer.decode(answer, skip_special_tokens=True)}
    return {
        "id": "local",
        "object": "chat.completion",
        "created": 0,
        "model": request.get("model", loaded.source),
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": prompt, "completion_tokens": len(answer), "total_tokens": prompt + len(answer)},
    }


if __name__ == "__main__":
    serve(load_model(sys.argv[1]))
