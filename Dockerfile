# syntax=docker/dockerfile:1
# The flows, their packages at the versions of constraints.txt, and models if they are asked for.
#
#   docker build -t metaflow-hf .                                               CPU
#   docker build -t metaflow-hf:cuda --build-arg TORCH=cu130 .                  CUDA
#   docker build --build-arg MODELS="gpt2 org/name" --secret id=HF_TOKEN .      with models, gated ones too
#
# To be exact for longer than a tag lasts: --build-arg BASE=python:3.11-slim-bookworm@sha256:…
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
# Which build of PyTorch: cpu, or cu126, cu130, … (its wheels bring CUDA; the machine needs the driver only).
ARG TORCH=cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl
# Optional parts of metaflow-hf, as in pyproject.toml; and what else pods need, such as Metaflow's
# azure-identity azure-storage-blob, or google-cloud-storage google-auth.
ARG EXTRAS=peft
ARG PIP_PACKAGES=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PATH=/opt/venv/bin:$PATH
WORKDIR /build
RUN python -m venv /opt/venv
COPY constraints.txt ./
# By itself, since it is the largest and changes least.
RUN pip install --constraint constraints.txt --extra-index-url "${TORCH_INDEX}/${TORCH}" torch
COPY pyproject.toml setup.py README.md LICENSE ./
COPY src src
COPY metaflow_extensions metaflow_extensions
COPY flows flows
COPY configs configs
RUN pip install --constraint constraints.txt ".[${EXTRAS}]" ${PIP_PACKAGES}

FROM build AS models
ARG MODELS=""
ARG HF_ENDPOINT=https://huggingface.co
# HF_HUB_CACHE and not HF_HOME, which is where tokens are kept too.
ENV HF_HUB_CACHE=/models HF_HUB_DISABLE_TELEMETRY=1
# A file in the environment of one command only: no layer has the token.
RUN --mount=type=secret,id=HF_TOKEN,env=HF_TOKEN \
    mkdir -p /models && for model in ${MODELS}; do hf download --quiet "${model}" || exit 1; done

FROM ${BASE} AS image
# torch.compile needs a compiler.
ARG DEBIAN_PACKAGES=g++
# hadolint ignore=DL3008
RUN if [ -n "${DEBIAN_PACKAGES}" ]; then \
      apt-get update && apt-get install -y --no-install-recommends ${DEBIAN_PACKAGES} && rm -rf /var/lib/apt/lists/*; \
    fi && \
    useradd --create-home --uid 1000 metaflow && \
    install -d -m 1777 /workspace && install -d -o metaflow -g metaflow /datastore
COPY --from=build /opt/venv /opt/venv
COPY --from=models --chown=metaflow:metaflow /models /models
COPY flows /workspace/flows
COPY configs /workspace/configs
ENV PATH=/opt/venv/bin:$PATH \
    HF_HUB_CACHE=/models \
    METAFLOW_USER=metaflow \
    METAFLOW_DATASTORE_SYSROOT_LOCAL=/datastore \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1
WORKDIR /workspace
USER 1000
CMD ["python", "flows/train_flow.py", "run"]
