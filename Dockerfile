# A server for the bundles in /engines. On a Jetson: --build-arg BASE=nvcr.io/nvidia/l4t-jetpack:r36.4.0
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE}
# cpu is ONNX Runtime; gpu instead of it: for target cuda.
ARG EXTRAS=cpu,serve

# hadolint ignore=DL3008
RUN command -v pip3 || { apt-get update \
    && apt-get install -y --no-install-recommends python3-pip \
    && rm -rf /var/lib/apt/lists/*; }

COPY . /src
RUN pip3 install --no-cache-dir "/src[${EXTRAS}]" && rm -rf /src \
    && useradd --create-home --uid 10001 visistage

USER 10001
WORKDIR /
EXPOSE 8000
HEALTHCHECK --interval=30s --start-period=60s \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["visistage"]
CMD ["serve", "--host", "0.0.0.0"]
