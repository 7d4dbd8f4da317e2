"""NeMo Data Designer on N prompts of one server. Usage: data_designer_rows.py N PORT; prints one line of JSON.

Nothing of the reply is validated: that part of the work is spared it.
"""

import json
import os
import resource
import sys
import tempfile
import time

count, port = int(sys.argv[1]), sys.argv[2]
os.environ["NEMO_TELEMETRY_ENABLED"] = "false"
import data_designer.config as config  # noqa: E402
import pandas  # noqa: E402
from data_designer.interface import DataDesigner  # noqa: E402

prompts = pandas.DataFrame(
    {"instruction": [f"Which laptop is the best one for person number {i}?" for i in range(count)]}
)
server = config.ModelProvider(
    name="mock", endpoint=f"http://127.0.0.1:{port}/v1", provider_type="openai", api_key="none"
)
sampling = config.ChatCompletionInferenceParams(max_parallel_requests=32, max_tokens=64)
model = config.ModelConfig(
    alias="teacher", model="mock", provider="mock", skip_health_check=True, inference_parameters=sampling
)
designer = DataDesigner(artifact_path=tempfile.mkdtemp(), model_providers=[server])
if "otel_metrics_port" in config.RunConfig.model_fields:
    designer.set_run_config(config.RunConfig(otel_metrics_port=None))
builder = config.DataDesignerConfigBuilder(model_configs=[model])
builder.with_seed_dataset(config.DataFrameSeedSource(df=prompts))
builder.add_column(config.LLMTextColumnConfig(name="output", model_alias="teacher", prompt="{{ instruction }}"))
began, cpu = time.perf_counter(), time.process_time()
made = len(designer.create(builder, num_records=count).load_dataset())
cpu, wall = time.process_time() - cpu, time.perf_counter() - began
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"rows": made, "wall": wall, "cpu": cpu, "memory": memory}))  # noqa: T201
