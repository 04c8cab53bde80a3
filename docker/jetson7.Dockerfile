# mllm-edge on a Jetson with JetPack 7.2 (Orin and Thor): the runtime, llama.cpp with CUDA, and JetPack's TensorRT.
# Build it on the board; for use see docker/jetson.Dockerfile, which is JetPack 6's.
#
#   docker build -f docker/jetson7.Dockerfile -t mllm-edge --build-arg APT=https://HOST/jetson .
#
# APT is the address in the board's own /etc/apt/sources.list.d/nvidia-l4t-apt-source.list, up to `jetson`.
#
# 87 is Orin, 110 is Thor. The release must be the board's own (`mllm-edge doctor`: L4T 39.2 is r39.2).
FROM ubuntu:24.04
ARG APT
ARG RELEASE=r39.2
ARG CUDA=13-2
ARG CUDA_ARCHITECTURE=87

RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates curl \
 && curl -fsSL ${APT}/jetson-ota-public.asc -o /usr/share/keyrings/jetson.asc \
 && for part in common som; do \
      echo "deb [signed-by=/usr/share/keyrings/jetson.asc] ${APT}/${part} ${RELEASE} main"; \
    done > /etc/apt/sources.list.d/jetson.list \
 && apt-get update \
 && apt-get install -y --no-install-recommends \
      python3-pip python3-venv python3-dev python3-libnvinfer g++ cmake ninja-build cuda-toolkit-${CUDA} \
 && rm -rf /var/lib/apt/lists/*

# The system's packages stay visible: TensorRT's Python module comes from apt.
RUN python3 -m venv --system-site-packages /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    CUDACXX=/usr/local/cuda/bin/nvcc \
    PIP_NO_CACHE_DIR=1

# Compiling takes long, so it has a layer of its own that changes of the package leave alone.
RUN CMAKE_ARGS="-DGGML_CUDA=on -DCMAKE_CUDA_ARCHITECTURES=${CUDA_ARCHITECTURE}" \
    pip install --no-binary llama-cpp-python "llama-cpp-python>=0.3.36,<0.4"

COPY . /opt/mllm-edge
RUN pip install "cuda-bindings>=13" "/opt/mllm-edge[runtime,trt]"

ENTRYPOINT ["mllm-edge"]
