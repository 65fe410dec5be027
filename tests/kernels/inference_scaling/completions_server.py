"""A server on loopback that speaks the protocol of completions, writes a Markov chain, and fails as it is told."""

import contextlib
import itertools
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from chain_texts import END, LENGTH, next_letter

PROMPT = "go: "


class Server(ThreadingHTTPServer):
    """`faults` are used up one a request; `style` is the dialect: "vllm", "llama", "keeps" or "plain".

    Fields that it `refuses` are named in a reply of status 400.
    """

    daemon_threads = True
    # how many may wait to be accepted: the default of 5 makes clients wait a second
    request_queue_size = 256

    def __init__(self, style="vllm", faults=(), max_samples=None, delay=0.0, refuses=()):
        super().__init__(("127.0.0.1", 0), Handler)
        self.style, self.max_samples, self.delay, self.refuses = style, max_samples, delay, refuses
        self.faults = iter(faults)
        self.lock, self.requests, self.times = threading.Lock(), [], []
        self.open = self.most_open = 0
        self.seeds = itertools.count()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        pass  # clients that were cancelled hang up


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server = self.server
        with server.lock:
            fault = next(server.faults, None)
            server.requests.append(body | {"path": self.path, "authorization": self.headers.get("authorization")})
            server.times.append(time.monotonic())
            server.open += 1
            server.most_open = max(server.most_open, server.open)
            seed = next(server.seeds)
        try:
            time.sleep(server.delay)
            self.answer(body, fault, np.random.default_rng([seed, 5]))
        finally:
            with server.lock:
                server.open -= 1

    def answer(self, body, fault, rng):
        server = self.server
        if fault == "timeout":
            time.sleep(1.0)
            return
        if fault == "drop":
            self.connection.close()
            return
        if isinstance(fault, int):
            self.send({"error": {"message": "by order"}}, fault, {"Retry-After": "0.4"} if fault == 429 else {})
            return
        for field in set(server.refuses) & set(body):
            self.send({"error": {"message": f"Unrecognized request argument supplied: {field}"}}, 400)
            return
        num = body.get("n", 1)
        if server.max_samples is not None and num > server.max_samples:
            self.send({"error": {"message": f"n must be at most {server.max_samples}"}}, 400)
            return
        if server.style == "one":
            num = 1
        is_chat = self.path.endswith("chat/completions")
        last = body["messages"][-1] if is_chat else None
        if is_chat:
            written = last["content"] if last["role"] == "assistant" else ""
        else:
            assert body["prompt"].startswith(PROMPT)
            written = body["prompt"][len(PROMPT) :]
        letters = [next_letter(written.replace("|", ""), rng) for _ in range(num)]
        reply = {"choices": [self.choice(i, letter, is_chat, written, body) for i, letter in enumerate(letters)]}
        if server.style != "plain":
            reply["usage"] = {
                "prompt_tokens": 10 + len(written),
                "completion_tokens": 2 if server.style == "llama" else 2 * num,
            }
        if fault == "no completion":
            reply = {"choices": [{"index": 0}]}
        if fault == "no choices":
            reply = {"object": "list"}
        self.send(reply, cut=12 if fault == "truncate" else None, garbage=fault == "garbage")

    def choice(self, index, letter, is_chat, written, body):
        style = self.server.style
        choice = {"index": index, "finish_reason": "stop"}
        text = letter
        is_end = letter == END
        if style == "vllm":
            choice["stop_reason"] = None if is_end else "|"
        if style in ("keeps", "one") and not is_end and "include_stop_str_in_output" in body:
            text += "|"
        if style == "llama":
            tokens = [(letter, -0.5), ("", -0.1)] if is_end else [(letter, -0.5)]
            choice["logprobs"] = {"content": [{"token": token, "logprob": value} for token, value in tokens]}
            text = written + text if is_chat else text
        if style == "vllm":
            choice["logprobs"] = {"tokens": [letter, "|"], "token_logprobs": [-0.5, -0.25]}
        return choice | ({"message": {"role": "assistant", "content": text}} if is_chat else {"text": text})

    def send(self, reply, status=200, headers=None, cut=None, garbage=False):
        content = b"<html>busy</html>" if garbage else json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[:cut])
        if cut is not None:
            self.close_connection = True
            self.connection.close()


@contextlib.contextmanager
def serve(**options):
    server = Server(**options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


assert LENGTH == 4
