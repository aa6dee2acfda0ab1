# CPU by default. For CUDA: --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04
# --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128
ARG BASE=python:3.12-slim
FROM ${BASE}
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY . /src
RUN /src/.ci/install /opt/liverseg "${TORCH_INDEX}"
ENV PATH=/opt/liverseg/bin:$PATH
WORKDIR /work
ENTRYPOINT ["liverseg"]
