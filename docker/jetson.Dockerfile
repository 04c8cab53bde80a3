# mllm-edge on a Jetson with JetPack 6: the runtime, llama.cpp with CUDA, and JetPack's TensorRT. For JetPack 7.2
# see docker/jetson7.Dockerfile. Build it on the board:
#
#   docker build -f docker/jetson.Dockerfile -t mllm-edge .
#   docker run --rm -it --runtime nvidia -v "$PWD:/data" -w /data mllm-edge build glamm.bundle
#   docker run --rm -it --runtime nvidia -v "$PWD:/data" -w /data mllm-edge run glamm.bundle "Segment the ring." --image scene.png
#
# The base must be of the board's own L4T release (`mllm-edge doctor`); 87 is Orin.
ARG BASE=nvcr.io/nvidia/l4t-jetpack:r36.4.0
FROM ${BASE}
ARG CUDA_ARCHITECTURE=87

RUN apt-get update \
 && apt-get install -y --no-install-recommends python3-pip python3-dev python3-libnvinfer g++ cmake ninja-build \
 && rm -rf /var/lib/apt/lists/*

ENV CUDACXX=/usr/local/cuda/bin/nvcc \
    PIP_NO_CACHE_DIR=1

# Compiling takes long, so it has a layer of its own that changes of the package leave alone.
RUN python3 -m pip install -U pip \
 && CMAKE_ARGS="-DGGML_CUDA=on -DCMAKE_CUDA_ARCHITECTURES=${CUDA_ARCHITECTURE}" \
    python3 -m pip install --no-binary llama-cpp-python "llama-cpp-python>=0.3.36,<0.4"

COPY . /opt/mllm-edge
# CUDA 12.6 is JetPack 6's. TensorRT's Python module comes from apt, above; pip has none for it.
RUN python3 -m pip install "cuda-bindings>=12.6,<13" "/opt/mllm-edge[runtime,trt]"

ENTRYPOINT ["mllm-edge"]
