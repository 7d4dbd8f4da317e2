"""The gateway over a real vLLM: the checks that llama.cpp passes; adapters are named by us. Run: make test-vllm"""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import time
import warnings
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from serving import expert, live, supervised

from serve.doctor import doctor
from serve.market import Probe

ROOT = Path(__file__).parents[1]
POCKET = ROOT / "models" / "pocket"
PYTHON = os.environ.get("DMOE_VLLM", "")
UP_SECONDS = 400

pytestmark = pytest.mark.skipif(not PYTHON or not shutil.which(PYTHON), reason="DMOE_VLLM names no Python with vllm")


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Two random adapters of the pocket base, with what transformers and PEFT say as their probes."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, found = AutoTokenizer.from_pretrained(POCKET), []
    question = "What should I have for lunch?"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, enable_thinking=False, return_tensors="pt",
        return_dict=True,
    )  # fmt: skip
    for seed, name in enumerate(("red", "blue")):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32)
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model = get_peft_model(model, lora)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.1)
        with torch.no_grad():
            said = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        folder = tmp_path_factory.mktemp(name) / "adapter"
        model.save_pretrained(folder)
        says = tokenizer.decode(said[:6], skip_special_tokens=True).strip()
        made = expert(name, [name], adapter=folder / "none.gguf", digest=f"{seed}" * 64, peft=folder)
        found.append(replace(made, probes=(Probe(question, says),)))
    return found


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    """A vLLM that lets adapters in while it runs: its URL and key."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    key = secrets.token_hex(8)
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(POCKET), "--dtype", "float32",
               "--max-model-len", "1024", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port),
               "--enable-lora", "--max-lora-rank", "16", "--max-loras", "4"]  # fmt: skip
    told = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_API_KEY": key, "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}  # fmt: skip
    log = tmp_path_factory.mktemp("vllm") / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, env={**os.environ, **told}, stdout=stream, stderr=stream)
        try:
            end = time.monotonic() + UP_SECONDS
            while time.monotonic() < end and process.poll() is None:
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2, trust_env=False).is_success:
                        break
                time.sleep(1)
            else:
                raise AssertionError(log.read_text(errors="replace")[-3000:])
            yield f"http://127.0.0.1:{port}", key
        finally:
            process.terminate()
            process.wait()


def test_vllm_behind_the_gateway_passes_every_check(vllm, experts, tmp_path, monkeypatch):
    url, key = vllm
    monkeypatch.setenv("DMOE_ENGINE_KEY", key)
    supervisor, settings = supervised(tmp_path, lambda: experts, tmp_path, engine="vllm", url=url)
    with live(supervisor, settings) as gateway:
        findings = list(doctor(gateway))
        models = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}, trust_env=False).json()
    assert all(finding.good for finding in findings), findings
    assert {"red_expert-000000000000", "blue_expert-111111111111"} <= {model["id"] for model in models["data"]}


def test_a_newcomer_is_loaded_into_the_running_vllm_and_another_scale_is_a_copy(vllm, experts, tmp_path, monkeypatch):
    url, key = vllm
    monkeypatch.setenv("DMOE_ENGINE_KEY", key)
    there = [experts[0]]
    supervisor, settings = supervised(tmp_path, lambda: list(there), tmp_path, engine="vllm", url=url)
    with live(supervisor, settings, "t") as gateway, httpx.Client(base_url=gateway, timeout=300) as client:
        there.append(replace(experts[1], name="half", lora_id="half", scale=0.5, digest="2" * 64, probes=()))
        done = client.post("/admin/reload", json={}, headers={"Authorization": "Bearer t"})
        assert done.json()["changed"] == ["half"], done.text

        def said(model):
            body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "temperature": 0}
            reply = client.post("/v1/chat/completions", json={**body, "max_tokens": 20})
            return reply.json()["choices"][0]["message"]["content"]

        assert len({said("red"), said("half"), said("base")}) == 3
        posted = client.post("/lora-adapters", json=[{"id": 1, "scale": 0.7}])
        assert posted.status_code in (200, 400)
        refused = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
        assert refused.status_code == 400 and "scale that it was loaded with" in refused.json()["error"]["message"]
