"""A teacher's server that behaves as badly as it is told to: OpenAI's chat completions on loopback.

Usage: python teacher_server.py [--port N] [--delay SECONDS] [--faults NAME,...] [--share 0.3] [--key KEY] [--secret]
It prints its port. A good reply is made of the request alone, so equal requests get equal replies.

A transport fault (400, 429, 500, 503, hang, close, half) hits a share of the tries; the same request comes
through later. A content fault (cut, empty, shape, language, script, answer, rival, large, same, ignore) hits a share
of the requests, for ever. `burst`: everything is refused with 429 for 0.3 s of every 2 s. `down`: always 503;
`outage`: 503 from the first second to the third.
With --key other keys get 401; with --secret every error and every reply repeats the Authorization header.
GET /count tells how many tries there were, how many were answered, how many of them were different, how often the
most frequent was sent, and how often each fault struck.
"""

import argparse
import asyncio
import hashlib
import json
import random
import re
import time
from collections import Counter

TRANSPORT = ("400", "429", "500", "503", "hang", "close", "half")
CONTENT = ("cut", "empty", "shape", "language", "script", "answer", "rival", "large", "same", "ignore")
WORDS = re.findall(
    r"\w+",
    "light sturdy quiet bright quick steady simple handy solid modern useful small warm clear fresh calm early late "
    "plain green round sharp soft tall young heavy narrow broad smooth gentle honest proper cheap costly tidy spare",
)
OPEN = ("/count", "/health")
tries, answered, sent, by_fault = 0, 0, Counter(), Counter()
active = most_active = 0
first, tenths = None, Counter()  # when the first request came; replies in each tenth of a second since


def text(rule, rng):
    if "enum" in rule:
        return rng.choice(rule["enum"])
    words = " ".join(rng.choices(WORDS, k=min(9, max(1, rule.get("maxLength", 108) // 12))))
    return (words.capitalize() + ".")[: rule.get("maxLength", 80)]


def variants(schema, rng):
    if "variants" not in schema["properties"]:
        return {name: text(rule, rng) for name, rule in schema["properties"].items()}
    many = schema["properties"]["variants"]
    one = many["items"]["properties"]
    return {"variants": [{n: text(rule, rng) for n, rule in one.items()} for _ in range(many["minItems"])]}


def spoil(fault, made, rng):
    """The reply's text with one content fault."""
    texts = made.get("variants", [made])
    if fault == "cut":
        whole = json.dumps(made)
        return whole[: rng.randint(1, len(whole) - 2)]
    if fault == "empty":
        return ""
    if fault == "ignore":
        return "Sure, here are some ideas."
    if fault == "large":
        return json.dumps(made) + " " * 10_000_000
    for item in texts:
        name = rng.choice([n for n in item if n != "instruction"] or ["instruction"])
        if fault == "shape":
            item.update({name: 7} if rng.random() < 0.5 else {"more": "x"})
        elif fault == "language":
            item["instruction"] = "Welcher Laptop ist gut für die Schule und nicht zu schwer"
        elif fault == "script":
            item["instruction"] = "\u043a\u0430\u043a\u043e\u0439 \u043d\u043e\u0443\u0442\u0431\u0443\u043a"
        elif fault in ("answer", "rival"):
            item[name] = "MacBook Air" if fault == "rival" else "Dell XPS 13"
        elif fault == "same":
            item["instruction"] = "which one is the best one to buy"
    return json.dumps(made)


def completion(body, options, head):
    request = json.loads(body)
    rng = random.Random(hashlib.sha256(body).digest())
    form = (request.get("response_format") or {}).get("json_schema", {}).get("schema")
    other = random.Random(b"fault" + hashlib.sha256(body).digest())  # its own: a good reply is the same on every server
    fault = other.choice(options.content) if options.content and other.random() < options.share else None
    made = variants(form, rng) if form else {"text": "plain words"}
    content = spoil(fault, made, rng) if fault and form else json.dumps(made)
    by_fault[fault or "good"] += 1
    if options.secret and form and "variants" in made:
        secret = [line for line in head.split("\r\n") if line.lower().startswith("authorization")]
        made["variants"][0]["instruction"] = f"say {secret[0]}"
        content = json.dumps(made)
    tokens = {"prompt_tokens": 20, "completion_tokens": len(content) // 4, "total_tokens": 20 + len(content) // 4}
    choice = {
        "index": 0, "message": {"role": "assistant", "content": content},
        "finish_reason": "length" if fault == "cut" else "stop",
    }  # fmt: skip
    return {"object": "chat.completion", "model": request.get("model"), "choices": [choice], "usage": tokens}


def http(status, value, extra=()):
    data = json.dumps(value).encode()
    reasons = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 429: "Too Many Requests", 500: "Error", 503: "Busy"}
    head = [
        f"HTTP/1.1 {status} {reasons[status]}",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
        *extra,
    ]
    return "\r\n".join([*head, "", ""]).encode() + data


def transport_fault(body, options):
    if "down" in options.faults or ("outage" in options.faults and 1.0 < time.monotonic() - first < 3.0):
        return "503"
    if "burst" in options.faults and (time.monotonic() - options.began) % 2.0 < 0.3:
        return "429"
    rng = random.Random(hashlib.sha256(body).hexdigest() + str(sent[hash(body)]))
    return rng.choice(options.transport) if options.transport and rng.random() < options.share else None


async def answer(body, head, options, writer):
    global tries, answered, first
    tries += 1
    first = first or time.monotonic()
    sent[hash(body)] += 1
    fault = transport_fault(body, options)
    by_fault[fault] += fault is not None
    if fault == "hang":
        await asyncio.sleep(3600)
    await asyncio.sleep(options.delay if fault is None else options.delay / 4)
    said = {"error": {"message": f"no, not now {head if options.secret else ''}"}}
    if fault in ("400", "429", "500", "503"):
        return http(int(fault), said, ["Retry-After: 0.1"] if fault == "429" else ())
    if fault == "close":
        writer.close()
        return b""
    data = http(200, completion(body, options, head))
    if fault == "half":
        writer.write(data[: len(data) // 2])
        writer.close()
        return b""
    answered += 1
    tenths[int((time.monotonic() - first) * 10)] += 1
    return data


async def handle(reader, writer, options):
    global active, most_active
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin1")
            size = next((line for line in head.split("\r\n") if line.lower().startswith("content-length:")), ":0")
            body = await reader.readexactly(int(size.split(":")[1]))
            path = head.split(" ")[1].split("?")[0]
            if options.key and f"bearer {options.key}".lower() not in head.lower() and path not in OPEN:
                data = http(401, {"error": {"message": "wrong key"}})
            elif "chat/completions" in path:
                active += 1
                most_active = max(most_active, active)
                try:
                    data = await answer(body, head, options, writer)
                finally:
                    active -= 1
            elif path == "/health":
                data = http(200, {})
            elif path.endswith("/count"):
                most = max(sent.values(), default=0)
                told = {
                    "tries": tries,
                    "answered": answered,
                    "different": len(sent),
                    "most_sent": most,
                    "most_active": most_active,
                }
                data = http(200, {**told, "faults": by_fault, "tenths": tenths})
            else:
                data = http(200, {"object": "list", "data": [{"id": "mock", "object": "model"}]})
            if not data:
                return
            writer.write(data)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--faults", default="", type=lambda names: [n for n in names.split(",") if n])
    parser.add_argument("--share", type=float, default=0.3)
    parser.add_argument("--key", default="")
    parser.add_argument("--secret", action="store_true")
    options = parser.parse_args()
    options.transport = [name for name in options.faults if name in TRANSPORT]
    options.content = [name for name in options.faults if name in CONTENT]
    options.began = time.monotonic()
    server = await asyncio.start_server(lambda r, w: handle(r, w, options), "127.0.0.1", options.port)
    print(server.sockets[0].getsockname()[1], flush=True)  # noqa: T201
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
