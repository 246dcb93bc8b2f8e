# vllm-router by itself: it needs neither vLLM nor a GPU.
FROM python:3.12-slim
RUN pip install --no-cache-dir vllm-router==0.1.17
ENTRYPOINT ["vllm-router"]
