# The GPU stack; CUDA comes as wheels, so the host brings only its driver (and the NVIDIA Container Toolkit).
FROM python:3.11.11-slim-bookworm

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

RUN apt-get update && apt-get install -y --no-install-recommends make && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY requirements.txt requirements-gpu.txt requirements-tensorrt.txt constraints.txt ./
RUN pip install -r requirements-gpu.txt
# TensorRT's libraries come from NVIDIA's own index; without them only the TF-TRT export is missing.
RUN pip install -r requirements-tensorrt.txt || echo "TensorRT was not installed; the TF-TRT export says so when it is asked for"
COPY . .

CMD ["python", "-m", "pipeline"]
