"""A real model server that is not ours: llama.cpp's own HTTP server (xllamacpp) with SmolLM2, on loopback, with a key.

python -m tests.support.llama_server KEY        prints {"url": ...} once it listens
"""

from __future__ import annotations

import json
import sys
import threading

import xllamacpp  # type: ignore[import-not-found,import-untyped,unused-ignore]

from gateway_client.gateways.embedded.models.local import shipped_model


def main() -> None:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(shipped_model())
    parameters.n_ctx = 1024
    parameters.n_parallel = 1
    parameters.n_predict = 32  # callers set no limit, and the model would go on
    parameters.warmup = False
    parameters.verbosity = -1
    parameters.cpuparams.n_threads = 2
    parameters.api_keys = [sys.argv[1]]
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = 0
    server = xllamacpp.Server(parameters)
    sys.stdout.write(json.dumps({"url": server.listening_address}) + "\n")
    sys.stdout.flush()
    threading.Event().wait()


if __name__ == "__main__":
    main()
