"""llama.cpp's server as anyone would start it: its own defaults, the adapters loaded, nothing else. Prints its URL.

Run: python stock_llama.py BASE SLOTS CONTEXT THREADS ADAPTER...   (ends with its standard input)
"""

import sys

import xllamacpp as xl


def main() -> None:
    base, slots, context, threads, *adapters = sys.argv[1:]
    p = xl.CommonParams()
    p.model.path = base
    p.lora_adapters = [xl.CommonAdapterLoraInfo(path, 0.0) for path in adapters]
    p.n_parallel, p.n_ctx = int(slots), int(slots) * int(context)
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = int(threads)
    p.fit_params = p.warmup = p.ui = False
    p.use_jinja = True
    p.n_threads_http = 160
    p.enable_reasoning = 0  # both write the same kind of reply
    p.hostnames, p.port = ["127.0.0.1"], 0
    server = xl.Server(p)
    print(server.listening_address, flush=True)  # noqa: T201
    sys.stdin.read()


if __name__ == "__main__":
    main()
