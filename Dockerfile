# syntax=docker/dockerfile:1
# The project with all that `make setup` installs, from the same pins (constraints.txt).
#
#   docker build -t era .                                                   # for a CPU
#   docker build -t era-cuda --build-arg TORCH_INDEX= .                     # for NVIDIA GPUs
#   docker run --rm era make demo
#   docker run --rm --gpus all --shm-size 16g -v /data:/data -v "$PWD/output:/era/output" era-cuda \
#       python tools/train_net.py --config-file configs/era_r101_r50.yaml --num-gpus 8
#
# PyPI's torch brings the CUDA libraries; the index of CPU builds leaves 4 GB of them out. A driver is the host's.
FROM python:3.11.14-slim-bookworm

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# make: the commands of the README. gcc, g++: fvcore and pycocotools may come as sources. libgl1, libglib2.0-0: OpenCV.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends make gcc g++ git libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/*

# Nothing of it needs root; runs, data and downloads lie below /era and /home/era.
RUN useradd --create-home --uid 1000 era && mkdir /era && chown era:era /era
USER 1000:1000
WORKDIR /era

# What is slow to install and seldom changes comes first: a change of the code installs nothing again.
COPY --chown=1000:1000 Makefile setup.cfg pyproject.toml constraints.txt README.md LICENSE ./
COPY --chown=1000:1000 tools/install_detectron2.py tools/
COPY --chown=1000:1000 projects projects
ENV PIP_NO_CACHE_DIR=1 \
    PIP_EXTRA_INDEX_URL=${TORCH_INDEX} \
    MPLCONFIGDIR=/tmp/matplotlib \
    PATH=/era/.venv/bin:$PATH
RUN make setup

COPY --chown=1000:1000 . .
CMD ["make", "demo"]
