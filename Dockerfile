# The image of every workload: what requirements.lock says, without what only tests need. Nothing is fetched at run time.
#   docker build -t images.example.org/instructloop .       TORCH=cpu|cu130 as in the Makefile, BASE by digest

ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS environment
ARG TORCH=
ENV UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never VIRTUAL_ENV=/opt/instructloop
RUN python3 -m venv /opt/uv && /opt/uv/bin/pip install --quiet uv==0.13.8 && /opt/uv/bin/uv venv /opt/instructloop
WORKDIR /src
COPY pyproject.toml requirements.lock ./
RUN /opt/uv/bin/uv pip install --no-cache ${TORCH:+--torch-backend ${TORCH}} --constraint requirements.lock --requirement pyproject.toml
COPY . .
RUN /opt/uv/bin/uv pip install --no-cache --no-deps --build-constraint requirements.lock .

FROM ${BASE}
# vLLM links libnuma, torch.compile and Triton call a compiler, and a backup is made by sqlite3.
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends g++ libnuma1 sqlite3 && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --home-dir /tmp --no-create-home instructloop \
    && install -d -o instructloop -g instructloop /var/lib/instructloop
COPY --from=environment /opt/instructloop /opt/instructloop
ENV PATH=/opt/instructloop/bin:$PATH HOME=/tmp HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 PYTHONUNBUFFERED=1
WORKDIR /var/lib/instructloop
USER 10001:10001
EXPOSE 8000
ENTRYPOINT ["instructloop"]
CMD ["serve", "--host", "0.0.0.0"]
