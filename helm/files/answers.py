"""Asks a server whether it is ready and, with a key, for an answer; fails where it has none."""

import os

import httpx

KEY = os.environ.get("KEY")
headers = {"authorization": f"Bearer {KEY}"} if KEY else {}
with httpx.Client(base_url=os.environ["SERVER"], headers=headers, timeout=60) as server:
    ready = server.get("/readyz")
    print(ready.text)
    ready.raise_for_status()
    if KEY:
        models = server.get("/v1/models").raise_for_status().json()["data"]
        asked = {"model": models[0]["id"], "prompt": "Say hello.", "max_tokens": 4}
        answer = server.post("/v1/completions", json=asked)
        print(answer.status_code, answer.json().get("usage"))
        answer.raise_for_status()
