# The GPU packages. CUDA is installed as wheels; the host needs only the NVIDIA driver and the NVIDIA Container Toolkit.
FROM python:3.11.11-slim-bookworm

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

RUN apt-get update && apt-get install -y --no-install-recommends make && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY requirements.txt requirements-gpu.txt requirements-tensorrt.txt constraints.txt ./
RUN pip install -r requirements-gpu.txt
# TensorRT's libraries come from NVIDIA's own index; only the TF-TRT export needs them.
RUN pip install -r requirements-tensorrt.txt || echo "TensorRT was not installed; the TF-TRT export will report it"
COPY . .
RUN pip install --no-deps -e .

CMD ["python", "-m", "pipeline"]
