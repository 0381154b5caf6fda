# Holdfast in a container, for a CPU or for an NVIDIA GPU:
#
#     docker build -t holdfast .                                    # CPU
#     docker build -t holdfast:cuda --build-arg EXTRAS=cuda .       # CUDA 13
#
# Where the command runs, /runs, is where `outputs/`, your own Python files and your own `conf/` are looked for:
#
#     docker run --rm -v "$PWD:/runs" --user "$(id -u):$(id -g)" holdfast model=mlp data=digits
#     docker run --rm -v "$PWD:/runs" --user "$(id -u):$(id -g)" --gpus all --stop-timeout 120 holdfast:cuda
#
# Typed again it resumes. `docker stop` asks for a save and waits as long as --stop-timeout says: longer than a save takes.
ARG PYTHON_VERSION=3.12

FROM python:${PYTHON_VERSION}-slim-bookworm AS build
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON_VERSION}-slim-bookworm
# Extras of pyproject.toml with a comma between them, such as "cuda" or "cuda,hub,search". CUDA's libraries come with
# jax as wheels; the machine needs only NVIDIA's driver (for CUDA 13: 580 or newer) and its container toolkit.
ARG EXTRAS=""

# tini hands a stop signal on from the first moment, and collects children that end: the first process of a container
# would not. The versions of Debian's packages are those of the base image's release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/*

COPY constraints.txt /tmp/constraints.txt
COPY --from=build /wheels /tmp/wheels
RUN pip install --no-cache-dir --constraint /tmp/constraints.txt \
        "holdfast${EXTRAS:+[${EXTRAS}]} @ file://$(echo /tmp/wheels/holdfast-*.whl)" \
    && rm -rf /tmp/wheels /tmp/constraints.txt

# Any user may run it (--user): compiled programs and caches of libraries are kept where everybody can write. They last as
# long as the container; to keep them, mount a volume of your own at /cache. It holds code that will be executed.
RUN useradd --uid 1000 holdfast \
    && install --directory --mode=1777 /cache \
    && install --directory --owner=holdfast /runs
ENV HOME=/cache XDG_CACHE_HOME=/cache NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
WORKDIR /runs
ENTRYPOINT ["tini", "--", "holdfast"]
