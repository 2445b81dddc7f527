# Megatron-ProRes on NVIDIA's PyTorch image, which brings torch, Transformer Engine and Apex.
#
#   docker build --tag megatron-prores .
#   bash examples/docker/run.sh examples/pretrain_130m.sh
#
# docs/docker.md explains both.

# Needed: Python 3.12, torch 2.11 or newer, Transformer Engine 2.9 or newer. 26.09 is told to have
# torch 2.14, CUDA 13.4, Transformer Engine 2.19, NCCL 2.31. A digest pins the image for good:
#   --build-arg BASE=nvcr.io/nvidia/pytorch@sha256:...
ARG BASE=nvcr.io/nvidia/pytorch:26.09-py3
# hadolint ignore=DL3006
FROM ${BASE}

# The commit that is built: git rev-parse HEAD.
ARG REVISION=unknown
ARG BASE
LABEL org.opencontainers.image.title="Megatron-ProRes" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE}"

WORKDIR /opt/megatron-prores

# The packages first: a change of the code alone does not install them again.
COPY pyproject.toml constraints.txt ./
COPY scripts/install_in_place.sh scripts/requirements.py scripts/
RUN PYTHON=python3 bash scripts/install_in_place.sh packages

COPY . .
RUN PYTHON=python3 bash scripts/install_in_place.sh project \
 && python3 -m megatron_prores.doctor --need cpu

# A user of its own, not root. examples/docker/run.sh starts the container as the user who calls it:
# hence folders that anybody may write, and a name for user numbers that the image does not know,
# which torch asks for.
RUN useradd --uid 10001 --create-home prores \
 && mkdir -p runs data \
 && chmod 1777 runs data /home/prores
ENV HOME=/home/prores USER=prores LOGNAME=prores PYTHON=python3
USER 10001

# It starts torch, but no GPU: a run keeps all of its memory.
HEALTHCHECK --interval=10m --timeout=5m --start-period=5m \
  CMD ["python3", "-m", "megatron_prores.doctor", "--quiet", "--save", "/tmp"]

CMD ["python3", "-m", "megatron_prores.doctor"]
