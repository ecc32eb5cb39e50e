"""An endpoint in OpenAI's chat format, run as a process of its own by the tests: it plays back a script of answers.

Prints its port. Requests are appended to the file that is named first, answers are read from the second.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

LOG, SCRIPT = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        request = self.rfile.read(int(self.headers["Content-Length"])).decode()
        with LOG.open("a") as stream:
            stream.write(request + "\n")
        choice = {"index": 0, "message": SCRIPT.pop(0), "finish_reason": "stop"}
        record = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        body = json.dumps(record).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        return


server = HTTPServer(("127.0.0.1", 0), Handler)
sys.stdout.write(f"{server.server_port}\n")
sys.stdout.flush()
server.serve_forever()
