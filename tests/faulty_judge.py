"""A real OpenAI-compatible endpoint on loopback that is slow, wrong, down or rate-limited, as the answer to be judged says."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_YES = b'"choices": [{"message": {"content": "correct: yes'
WRONG = {  # replies by the answer to be judged: JSON that is no chat completion, or an unusual one
    "list": b"[1]", "text": b'"correct: yes"', "null": b"null", "empty": b"{}", "no choice": b'{"choices": []}',
    "deep": b"[" * 100_000, "no usage": b"{" + _YES + b'"}}]}',
    "null usage": b'{"usage": {"prompt_tokens": null}, ' + _YES + b'"}}]}', "odd usage": b'{"usage": [1], ' + _YES + b'"}}]}',
    "surrogate": b"{" + _YES + b' \\ud800"}}]}',
}  # fmt: skip


class FaultyJudge(ThreadingHTTPServer):
    """An OpenAI-compatible endpoint whose behaviour is given by the answer to be judged."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.temperatures, self.limited = [], [], set()
        self.lock, self.now, self.most = threading.Lock(), 0, 0  # requests in flight, and the most of them at once
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # clients hang up on purpose


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        with self.server.lock:
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        try:
            self.answer()
        finally:
            with self.server.lock:
                self.server.now -= 1

    def answer(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        answer = prompt.split("\nAnswer: ")[1].split("\n")[0]
        self.server.asked.append(answer)
        self.server.temperatures.append(body.get("temperature"))
        if answer == "no temperature" and "temperature" in body:  # as OpenAI's reasoning models
            self.reply(
                b'{"error": {\n  "message": "Unsupported parameter: \'temperature\'\x1b[2J"}}' + b" " * 300 + b"end",
                400,
            )
            return
        if answer == "long":
            self.reply("é".encode() * 300, 400)
            return
        if answer == "mute":  # an error whose body never comes
            self.send_response(400)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            time.sleep(2)
            return
        if answer == "slow":
            time.sleep(1.5)
        if answer == "drip":
            self.send_response(200)
            self.end_headers()
            self.drip()
            return
        if answer == "long drip":  # of a body whose length is known
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.drip()
            return
        if answer == "header drip":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
            self.drip()
            return
        if answer in WRONG:
            self.reply(WRONG[answer])
            return
        if answer in ("busy", "denied"):  # says how long to wait; no request will ever succeed
            self.send_response(429 if answer == "busy" else 401)
            self.send_header("Retry-After", "20")
            self.end_headers()
            return
        if answer == "down" or (answer == "limited" and answer not in self.server.limited):
            self.server.limited.add(answer)
            self.send_error(500 if answer == "down" else 429)
            return
        reply = (
            "I think it could be either." if answer == "prose" else "correct: yes" if answer != "bad" else "Correct: No"
        )
        if answer == "rounded" and "small margin of error" not in prompt:
            reply = "correct: no"
        content = {"choices": [{"message": {"content": reply}}], "usage": {"prompt_tokens": 10, "completion_tokens": 3}}
        self.reply(b"{" if answer == "garbage" else json.dumps(content).encode())

    def drip(self):
        for _ in range(40):
            self.wfile.write(b" ")
            self.wfile.flush()
            time.sleep(0.1)

    def reply(self, data, status=200):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
