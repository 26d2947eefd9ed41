"""A server with the part of vLLM's interface that the trainer and teachers use, for tests of their side of it.

A model of transformers answers, in a thread of the test's own process; `faults` makes single answers wrong. What vLLM
itself does is tested with vLLM (tests/trainer/test_vllm.py, tests/teachers/test_vllm_teacher.py).
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cmdp_fast.heads import last_hidden_state

Fault = Callable[[str, dict[str, Any], Any], Any]  # (path, request, honest answer) -> what is answered


_loading = threading.Lock()


def _load(folder: str, adapter: str = "") -> Any:
    """One at a time in this process: transformers changes a class of its own while it loads a model, and two threads
    would leave it as it is in between, so that nothing is tied any more."""
    with _loading:
        model = AutoModelForCausalLM.from_pretrained(folder)
        if adapter:
            model.load_adapter(adapter)
        return model


class StandIn:
    """A server at ``url``. ``asked`` are the requests (path, body) in their order, ``loaded`` the weights it took."""

    def __init__(self, folder: str, room: int = 64) -> None:
        self.folder, self.room, self.url = folder, room, ""
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder)
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.loaded: list[str] = []
        self.keys: set[str | None] = set()  # that came with the requests
        self.fault: Fault | None = None
        self._alone = threading.Lock()

    @torch.no_grad()
    def answer(self, path: str, body: dict[str, Any]) -> Any:
        """An honest answer."""
        if path == "/health":
            return {}
        if path == "/version":
            return {"version": "stand-in"}
        if path == "/v1/models":
            return {"data": [{"id": "served", "root": self.folder, "max_model_len": self.room}]}
        if path == "/collective_rpc":
            self.loaded.append(body["kwargs"]["weights_path"])
            self.model = _load(self.loaded[-1])
            return {"results": [None]}
        if path == "/v1/load_lora_adapter":
            self.loaded.append(body["lora_path"])
            self.model = _load(self.folder, body["lora_path"])
            return None
        if path == "/reset_prefix_cache":
            return {"success": True}
        if path == "/tokenize":
            return {"tokens": self.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"]).input_ids}
        if path == "/pooling":
            return self._pooled(body)
        if isinstance(body["prompt"][0], list):
            return {"choices": [self._prompt_logprobs(i, each, body) for i, each in enumerate(body["prompt"])]}
        return self._completions(body)

    def _pooled(self, body: dict[str, Any]) -> bytes:
        """The last hidden states of the rows' tokens, each row read alone."""
        assert body["task"] == "token_embed" and body["encoding_format"] == "bytes_only"
        assert body["endianness"] == sys.byteorder
        hidden = torch.cat([last_hidden_state(self.model, torch.tensor([row]))[0] for row in body["input"]])
        if body["use_activation"]:
            hidden = torch.nn.functional.normalize(hidden, dim=-1)
        sent = hidden.to(getattr(torch, body["embed_dtype"]))
        return sent.contiguous().view(torch.uint8).numpy().tobytes()

    def _prompt_logprobs(self, index: int, prompt: list[int], body: dict[str, Any]) -> dict[str, Any]:
        """The log-probabilities of the likeliest tokens and of the prompt's own, which comes first."""
        rows = self.model(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
        at_tokens: list[Any] = [None]
        for row, token in zip(rows, prompt[1:], strict=False):
            named = dict.fromkeys([token, *row.topk(body["prompt_logprobs"]).indices.tolist()])
            at_tokens.append({str(each): {"logprob": float(row[each]), "decoded_token": "x"} for each in named})
        return {"index": index, "prompt_token_ids": prompt, "prompt_logprobs": at_tokens}

    def _completions(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = body["prompt"]
        if "prompt_logprobs" in body:
            rows = self.model(torch.tensor([prompt])).logits[0].log_softmax(-1)
            given = [{str(t): {"logprob": float(rows[i, t])}} for i, t in enumerate(prompt[1:])]
            return {"choices": [{"prompt_logprobs": [None, *given]}]}
        choices = []
        for index in range(body["n"]):
            generator = torch.Generator().manual_seed(body["seed"] + index)
            tokens, logprobs = list[int](), list[float]()
            while len(tokens) < body["max_tokens"] and not (tokens and tokens[-1] in body["stop_token_ids"]):
                logits = self.model(torch.tensor([[*prompt, *tokens]])).logits[0, -1].double()
                for token, bias in (body["logit_bias"] or {}).items():
                    logits[int(token)] += bias
                p = _kept(logits / body["temperature"], body).softmax(-1) if body["temperature"] else None
                token = int(logits.argmax() if p is None else torch.multinomial(p, 1, generator=generator))
                tokens.append(token)
                logprobs.append(0.0 if p is None else float(p[token].log()))
            ended = tokens[-1] in body["stop_token_ids"]
            choices.append(
                {
                    "index": index,
                    "text": self.tokenizer.decode(tokens[:-1] if ended else tokens),
                    "finish_reason": "stop" if ended else "length",
                    "prompt_token_ids": prompt,
                    "token_ids": tokens,
                    "logprobs": {"token_logprobs": logprobs},
                }
            )
        return {"choices": choices}

    @contextmanager
    def served(self) -> Iterator[StandIn]:
        """Answers on a port of this machine."""
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._reply({})

            def do_POST(self) -> None:
                self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}") or {})

            def _reply(self, body: dict[str, Any]) -> None:
                with stand_in._alone:
                    stand_in.keys.add(self.headers["Authorization"])
                    stand_in.asked.append((self.path, body))
                    given = stand_in.answer(self.path, body)
                if stand_in.fault is not None:
                    given = stand_in.fault(self.path, body, given)
                status, given = given if isinstance(given, tuple) else (200, given)
                content = given if isinstance(given, bytes) else b"" if given is None else json.dumps(given).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()


def _kept(logits: torch.Tensor, body: dict[str, Any]) -> torch.Tensor:
    """Logits [V] without those that top-k, and top-p of what it leaves, leave out."""
    values, order = logits.sort(descending=True)
    values[body["top_k"] or len(values) :] = -torch.inf
    p = values.softmax(-1)
    values[p.cumsum(-1) - p >= body["top_p"]] = -torch.inf
    return torch.empty_like(logits).index_copy_(0, order, values)
