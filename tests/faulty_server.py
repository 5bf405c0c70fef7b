"""A real HTTP retriever on loopback that hangs, fails, lies, floods or stops half-way: a query's first word is the fault."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """A retriever that behaves as its queries say: the first word of a query is the fault."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = []
        self.headers = []
        self.bodies = []
        self.fails = 0  # requests that fail before one succeeds
        self.release = threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/retrieve"

    def handle_error(self, request, client_address):
        pass  # clients hang up on purpose


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def reply(self, status, data, headers=()):
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def endless(self, head, more=None, pause=0.0):
        """Send `head`, and then `more` (or `head` again) for ever."""
        self.wfile.write(head)
        block = (more or head) * (1 if pause else 2000)
        while not self.server.release.wait(pause):
            self.wfile.write(block)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        query = body["queries"][0] if "queries" in body else body["q"]
        self.server.asked.append(query)
        self.server.headers.append(dict(self.headers))
        self.server.bodies.append(body)
        fault = query.split()[0]
        if self.server.fails > 0:
            self.server.fails -= 1
            fault = "500"
        if fault == "hang":
            self.server.release.wait(20)
        elif fault in ("429", "500", "404"):
            self.reply(int(fault), b"no", [("Retry-After", "0")])
        elif fault == "garbage":
            self.reply(200, b"<html>\xff\xfe</html>")
        elif fault == "shape":
            self.reply(200, b'{"result": [{"pages": 3}]}')
        elif fault == "nohttp":
            self.wfile.write(b"\x00\x01\x02\r\n\r\n")
        elif fault == "flood":
            self.reply(200, b"x" * 50_000_000)
        elif fault == "half":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"result": [')
        elif fault == "chunks":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b'5\r\n{"res\r\n')
        elif fault == "drip":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            while not self.server.release.wait(0.1):
                self.wfile.write(b" ")
        elif fault == "continue":
            self.endless(b"HTTP/1.1 100 Continue\r\n\r\n")
        elif fault == "headers":
            self.endless(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n")
        elif fault == "headerdrip":
            self.endless(b"HTTP/1.1 200 OK\r\n", b"X", pause=0.05)
        elif fault == "statusdrip":
            self.endless(b"HTTP/1.1", b" ", pause=0.05)
        elif fault == "trailers":
            self.endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n", b"X: y\r\n")
        elif fault == "trailerdrip":
            self.endless(
                b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n", b"X: y\r\n", pause=0.05
            )
        elif fault == "extension":
            self.endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;", b"x")
        elif fault == "chunkdrip":
            self.endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1;x=y\r\n \r\n", pause=0.05)
        elif fault == "squared":
            self.reply(503, b"no", [("Retry-After", "\u00b2")])
        elif fault == "title":
            hit = {"document": {"title": "T" * 3_900_000, "text": "w" * 90_000}}
            self.reply(200, json.dumps({"result": [[hit]]}).encode())
        elif fault == "surrogate":
            self.reply(200, b'{"result": [[{"document": {"title": "\\ud800", "text": "\\udfff x"}}]]}')
        elif fault == "redirect":
            self.reply(302, b"", [("Location", "http://169.254.169.254/")])
        elif fault == "slow":
            self.server.release.wait(0.3)
            self.reply(200, json.dumps({"result": [[{"document": {"title": "T", "text": query}}]]}).encode())
        elif fault == "mixed":
            hits = [
                3,
                {"title": "no text"},
                {},
                {"title": None, "snippet": "a"},
                {"title": 4, "snippet": "x", "text": "x"},
            ]
            passages = [{"document": hit} for hit in [*hits, {"title": "T", "text": "b"}, {"contents": "c"}]]
            self.reply(200, json.dumps({"organic": hits, "result": [passages]}).encode())
        elif fault == "unread":
            self.reply(200, b'{"organic": [{"link": "x"}], "result": [[{"document": {"pages": 3}}]]}')
        elif fault == "none":
            self.reply(200, b'{"organic": [], "result": [[]]}')
        elif "q" in body:
            self.reply(200, json.dumps({"organic": [{"title": "T", "snippet": "S"}]}).encode())
        else:
            hits = [{"document": {"contents": f'"Title {i}"\nabout {query}'}, "score": 1.0} for i in range(5)]
            hits[1]["document"]["contents"] = f'"Title {1}"\nmore about {query}'
            self.reply(200, json.dumps({"result": [hits]}).encode())
