# A small image of fewstep, for a CPU:      docker build -t fewstep .
# for NVIDIA GPUs (CUDA 12.8):              docker build -t fewstep --build-arg WHEELS=https://download.pytorch.org/whl/cu128 .
# Print the help:                           docker run --rm fewstep
# Work in the current folder:               docker run --rm -v "$PWD":/work fewstep demo
# With a GPU, add --gpus all. As yourself on Linux, so that files can be written: --user "$(id -u):$(id -g)".
# The page, on this machine only:           docker run --rm -p 127.0.0.1:7860:7860 fewstep app fashion --host 0.0.0.0
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM python:${PYTHON}-slim
ARG WHEELS=https://download.pytorch.org/whl/cpu
ARG EXTRAS=app,diffusers,lora,video
COPY constraints.txt /install/
COPY --from=build /wheel /install/
RUN PIP_EXTRA_INDEX_URL="$WHEELS" pip install --no-cache-dir -c /install/constraints.txt "$(echo /install/*.whl)[$EXTRAS]" \
    && rm -r /install \
    && useradd --create-home fewstep \
    && chmod 1777 /home/fewstep \
    && install --directory --owner fewstep --mode 1777 /work
# Any user, of --user too, has a name, and a home that caches can be written to.
ENV HOME=/home/fewstep USER=fewstep PYTHONUNBUFFERED=1
USER fewstep
WORKDIR /work
EXPOSE 7860
ENTRYPOINT ["fewstep"]
CMD ["--help"]
